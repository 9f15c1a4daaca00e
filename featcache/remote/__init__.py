"""Caches in S3-compatible object stores."""
