"""A cache whose dataset changed: what is known, what is taken over, how it is replaced."""
