"""What a command of several steps says of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says what begins and, once it is done, how long it took."""
    print(f"\n--- {title} ---", flush=True)
    began = time.monotonic()
    yield
    print(f"({time.monotonic() - began:.1f} s)", flush=True)
