"""Files other tools write: tars, Arrow, MATLAB, JSON, pickles; read safely, in pieces."""
