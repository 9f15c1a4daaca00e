"""The files of a cache: plan, chunks, tables, arrays over mapped files."""
