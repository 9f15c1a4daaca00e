"""Thin Prefect flows: order, retries, parameters. No tensors, no arithmetic."""

import os

# Read when Prefect is imported, hence here: nothing below this package reports usage.
os.environ.setdefault("DO_NOT_TRACK", "1")
