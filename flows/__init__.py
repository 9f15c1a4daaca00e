"""Thin Prefect flows: order, retries, parameters. No tensors, no arithmetic."""
