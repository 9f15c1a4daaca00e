"""Folders of S3-compatible object stores, through obstore.

Endpoint and credentials come from the environment, as obstore reads them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP,
AWS_SKIP_SIGNATURE, ... They are never written anywhere, and no message shows them.
"""

import bisect
import functools
import os
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from featcache.errors import StorageDeniedError, StorageError
from featcache.layout.chunks import Content
from featcache.storage import Entry, Location, StoreUrl

CONNECT_SECONDS = 10
REQUEST_SECONDS = 120
"""Longest time of one request: 64 MB, the largest chunk, at half a megabyte a second."""
MAX_RETRIES = 8
"""Further attempts after a failed request, with growing pauses: up to half a minute in all."""
_BACKOFF = {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=8), "base": 3}
PARALLEL_REQUESTS = 12
"""Requests under way at a time; a single one does not fill a network."""
UPLOAD_BYTES = 256 << 20
"""Bytes handed over for upload and not yet stored; more makes the writer wait."""
_DELETED_AT_ONCE = 1000
_MERGED_GAP = 256 << 10
"""Bytes between two ranges that are read along rather than costing another request."""
_CLIENT_OPTIONS = ("timeout", "connect_timeout", "proxy_url", "proxy_ca_certificate")
_CLIENT_SWITCHES = ("allow_http", "allow_invalid_certificates")


class ObjectFolder(Location):
    """A folder of an object store."""

    url: StoreUrl

    def __init__(self, url: StoreUrl) -> None:
        self.url = url
        _obstore()

    def read(self, key: str) -> bytes:
        """See `Location.read`."""
        return self.read_versioned(key)[0]

    def read_versioned(self, key: str) -> tuple[bytes, Entry]:
        """Everything in an object, and the version that was read; see `Location.read`."""
        with _explained(self.url / key):
            found = _obstore().get(self._client, self._full(key))
            return bytes(found.bytes()), _entry(key, found.meta)

    def read_ranges(self, key: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """See `Location.read_ranges`."""
        spans = _merged(starts, stops)
        if len(spans) > 1:
            with ThreadPoolExecutor(min(len(spans), PARALLEL_REQUESTS)) as pool:
                read = list(pool.map(lambda span: self._read_span(key, *span), spans))
        else:
            read = [self._read_span(key, *span) for span in spans]
        parts = []
        for start, stop in zip(starts, stops, strict=True):
            number = bisect.bisect_right(spans, (start, sys.maxsize)) - 1
            first = start - spans[number][0] if start < stop else 0
            parts.append(read[number][first : first + stop - start] if start < stop else b"")
        return parts

    def _read_span(self, key: str, start: int, stop: int) -> bytes:
        with _explained(self.url / key):
            try:
                # Not `get_ranges`: it panics where merged ranges pass the end of the object.
                found = _obstore().get_range(self._client, self._full(key), start=start, end=stop)
            except _obstore().exceptions.BaseError as error:
                if "416" not in str(error).partition("\n")[0]:
                    raise
                return b""  # all of it lies past the end
        return bytes(found)

    def entry(self, key: str) -> Entry | None:
        """See `Location.entry`."""
        found = self._head(key)
        return None if found is None else _entry(key, found)

    def age_seconds(self, key: str, now: float) -> float | None:
        """Seconds since an object was written by the store's clock, `now` by this machine's."""
        written = self.written(key)
        return None if written is None else now - written

    def written(self, key: str) -> float | None:
        """When an object was written, in seconds of the epoch by the store's clock."""
        found = self._head(key)
        return None if found is None else float(found["last_modified"].timestamp())

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Location.list`."""
        start = f"{self.url.prefix}/{prefix}".strip("/")
        cut = len(self.url.prefix) + 1 if self.url.prefix else 0
        with _explained(self.url / prefix):
            entries = [
                _entry(each["path"][cut:], each)
                for part in _obstore().list(self._client, start or None)
                for each in part
            ]
        yield from sorted(entries, key=lambda entry: entry.key)

    def write(self, key: str, *parts: Content) -> None:
        """See `Location.write`; one request, since a cut-off multipart upload would leave parts."""
        with _explained(self.url / key):
            _obstore().put(self._client, self._full(key), _joined(parts), use_multipart=False)

    def write_if(self, key: str, content: bytes, version: str | None) -> str | None:
        """Writes an object only if it still is what the caller knows.

        Args:
            key: the object.
            content: what to write.
            version: ETag that it has to have; None = there must be no such object.

        Returns:
            The new ETag; None if somebody else came first.
        """
        known = _obstore().exceptions
        mode: Any = "create" if version is None else {"e_tag": version}
        with _explained(self.url / key):
            try:
                done = _obstore().put(self._client, self._full(key), content, mode=mode)
            except (known.AlreadyExistsError, known.PreconditionError):
                return None
            except FileNotFoundError as error:
                if version is None or "NoSuchBucket" in str(error):
                    raise
                return None  # deleted meanwhile
        return str(done["e_tag"])

    def delete(self, *keys: str) -> None:
        """See `Location.delete`."""
        with _explained(self.url):
            for first in range(0, len(keys), _DELETED_AT_ONCE):
                part = keys[first : first + _DELETED_AT_ONCE]
                _obstore().delete(self._client, [self._full(key) for key in part])

    def copy(self, key: str, to: Location, to_key: str) -> None:
        """See `Location.copy`; the store copies by itself."""
        assert isinstance(to, ObjectFolder)
        assert to.url.bucket == self.url.bucket, f"{to.url} is in another bucket than {self.url}"
        with _explained(self.url / key):
            _obstore().copy(self._client, self._full(key), to._full(to_key))

    def zarr_store(self) -> Any:
        """The folder as a store of zarr's, read-only."""
        from zarr.storage import ObjectStore

        return ObjectStore(_client(self.url.bucket, self.url.prefix, _settings()), read_only=True)

    def _head(self, key: str) -> Any:
        try:
            with _explained(self.url / key):
                return _obstore().head(self._client, self._full(key))
        except FileNotFoundError:
            return None

    @property
    def _client(self) -> Any:
        return _client(self.url.bucket, "", _settings())

    def _full(self, key: str) -> str:
        return f"{self.url.prefix}/{key}".strip("/")


class Uploads:
    """Objects on their way to a folder, several at a time and bounded in bytes.

    `put` returns before the object is stored; `flush` waits for all. An upload that failed is told
    once: to the thread that handed it over, or to who asks for its key. Shards that are written at
    the same time so fail one by one.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="upload")
        self._changed = threading.Condition()
        self._open = 0
        self._open_bytes = 0
        self._failed: dict[str, tuple[int, BaseException]] = {}

    def put(self, key: str, *parts: Content) -> None:
        """Hands an object over; the bytes are copied, so the caller may reuse its buffer."""
        content = _joined(parts)
        with self._changed:
            self._changed.wait_for(
                lambda: not self._open or self._open_bytes + len(content) <= UPLOAD_BYTES
            )
            self._failed.pop(key, None)
            self._raise(())
            self._open += 1
            self._open_bytes += len(content)
        self._pool.submit(self._write, key, content, threading.get_ident())

    def flush(self, keys: Collection[str] = ()) -> None:
        """Waits until everything handed over is stored.

        Args:
            keys: objects whose failure is raised here, beside those this thread handed over.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
            self._raise(keys)

    def _write(self, key: str, content: bytes, thread: int) -> None:
        try:
            self.folder.write(key, content)
        except BaseException as error:  # raised by the thread that waits
            with self._changed:
                self._failed[key] = (thread, error)
        finally:
            with self._changed:
                self._open -= 1
                self._open_bytes -= len(content)
                self._changed.notify_all()

    def _raise(self, keys: Collection[str]) -> None:
        me = threading.get_ident()
        mine = [key for key, (thread, _) in self._failed.items() if thread == me or key in keys]
        errors = [self._failed.pop(key)[1] for key in mine]
        if errors:
            raise errors[0]


def _merged(starts: Sequence[int], stops: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges that cover all those given, ascending, near ones as one."""
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(zip(starts, stops, strict=True)):
        if start >= stop:
            continue
        if spans and start - spans[-1][1] <= _MERGED_GAP:
            spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
        else:
            spans.append((start, stop))
    return spans


def _entry(key: str, found: Any) -> Entry:
    return Entry(key, found["size"], found["e_tag"] or str(found["last_modified"]))


def _joined(parts: Sequence[Content]) -> bytes:
    return b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ModuleNotFoundError:
        raise StorageError(
            "s3:// addresses need the package obstore: pip install 'featcache[s3]'"
        ) from None
    return obstore


def _settings() -> tuple[tuple[str, str], ...]:
    """What the environment says about stores: a client lives as long as this stays."""
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))


@functools.lru_cache(maxsize=32)
def _client(bucket: str, prefix: str, settings: tuple[tuple[str, str], ...]) -> Any:
    # obstore reads the environment too, but client options given here hide all of those there.
    given = {name.removeprefix("AWS_").lower(): value for name, value in settings}
    options: dict[str, Any] = {
        "timeout": f"{REQUEST_SECONDS}s",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        **{name: given[name] for name in _CLIENT_OPTIONS if name in given},
        **{name: given[name].lower() == "true" for name in _CLIENT_SWITCHES if name in given},
    }
    return _obstore().store.S3Store(
        bucket,
        prefix=prefix or None,
        client_options=options,
        retry_config={"max_retries": MAX_RETRIES, "backoff": _BACKOFF},
    )


@contextmanager
def _explained(url: StoreUrl) -> Iterator[None]:
    """Turns the store's errors into one line: what happened, and what to do.

    Raises:
        FileNotFoundError: if there is no such object.
        StorageDeniedError: if the store does not let us.
        StorageError: for everything else.
    """
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise _no_bucket(url) from None
        raise FileNotFoundError(2, "no such object", str(url)) from None
    except _obstore().exceptions.BaseError as error:
        raise _explain(url, error) from None


def _explain(url: StoreUrl, error: Exception) -> StorageError:
    text = str(error)
    first = " ".join(text.partition("\nDebug source")[0].split())
    denied = ("PermissionDenied", "Unauthenticated")
    if "NoSuchBucket" in text:
        return _no_bucket(url)
    if "169.254.169.254" in text or "169.254.170.2" in text:
        return StorageDeniedError(
            f"{url}: no credentials in the environment; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public bucket)"
        )
    if type(error).__name__.startswith(denied) or any(
        code in text for code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
    ):
        return StorageDeniedError(
            f"{url}: {_endpoint()} denies access; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_REGION and the bucket's policy"
        )
    if "NotSupported" in type(error).__name__ or "NotImplemented" in text:
        return StorageError(
            f"{url}: {_endpoint()} does not offer conditional writes, which the writer's lock "
            f"needs: {first[:200]}"
        )
    if "BadScheme" in text:
        return StorageError(
            f"{url}: {_endpoint()} is plain http; set AWS_ALLOW_HTTP=true if that is meant"
        )
    if any(word in text for word in ("error sending request", "timed out", "HTTP error")):
        return StorageError(
            f"{url}: {_endpoint()} cannot be reached or does not answer; check AWS_ENDPOINT_URL "
            "and the network; what is written stays, the same command resumes"
        )
    return StorageError(f"{url}: {_endpoint()} answers: {first[:300]}")


def _no_bucket(url: StoreUrl) -> StorageError:
    return StorageError(
        f"s3://{url.bucket}: no such bucket at {_endpoint()}; create it, or check the name and "
        "AWS_ENDPOINT_URL"
    )


def _endpoint() -> str:
    """Host and port of the store; an address may hold a password, which is not shown."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if os.environ.get(name):
            return urlsplit(os.environ[name]).netloc.rpartition("@")[2] or "the endpoint"
    return "Amazon S3"
