"""Locations: a local folder and a bucket answer the same; errors are one line without secrets."""

import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from featcache.config import Config
from featcache.errors import ConfigError, StorageDeniedError, StorageError
from featcache.remote import object_store
from featcache.remote.object_store import Uploads
from featcache.storage import CachePath, Location, StoreUrl, locate, place

Open = Callable[[], Location]


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return locate(tmp_path / "data")
    return locate(request.getfixturevalue("bucket") + "/some/data")


def test_files_come_back_as_written(folder: Location) -> None:
    content = bytes(range(256)) * 40
    for key in ("a/b 1.bin", "a/é/c%20#+.bin", "z"):
        assert not folder.exists(key)
        folder.write(key, content[:100], content[100:])
        assert folder.read(key) == content
    found = folder.entry("a/b 1.bin")
    assert found is not None
    assert (found.key, found.size) == ("a/b 1.bin", len(content))
    folder.write("a/b 1.bin", b"other")
    assert folder.read("a/b 1.bin") == b"other"
    changed = folder.entry("a/b 1.bin")
    assert changed is not None
    assert changed.version != found.version
    assert [entry.key for entry in folder.list()] == ["a/b 1.bin", "a/é/c%20#+.bin", "z"]
    assert [entry.size for entry in folder.list("a")] == [5, len(content)]
    folder.copy("z", folder, "y/z")
    folder.delete("z", "a/é/c%20#+.bin", "never there")
    assert [entry.key for entry in folder.list()] == ["a/b 1.bin", "y/z"]
    assert folder.read("y/z") == content
    with pytest.raises(FileNotFoundError):
        folder.read("z")


def test_ranges_are_cut_at_the_end(folder: Location) -> None:
    content = bytes(range(100))
    folder.write("f", content)
    assert folder.read_range("f", 10, 20) == content[10:20]
    starts, stops = [0, 50, 90, 100, 150, 7], [1, 60, 120, 110, 160, 7]
    expected = [content[start:stop] for start, stop in zip(starts, stops, strict=True)]
    assert folder.read_ranges("f", starts, stops) == expected
    long = bytes(range(256)) * 8000
    folder.write("long", long)
    starts = [1_900_000, 5, 100, 900_000, 2_047_000]
    expected = [long[start : start + 3000] for start in starts]
    assert folder.read_ranges("long", starts, [start + 3000 for start in starts]) == expected
    with pytest.raises(FileNotFoundError):
        folder.read_range("g", 0, 10)


def test_other_folders_of_the_bucket_are_not_listed(bucket: str) -> None:
    for name in ("cache", "cache.lock", "cached/x"):
        locate(bucket).write(name, b"1")
    locate(bucket + "/cache").write("k", b"1")
    assert [entry.key for entry in locate(bucket + "/cache").list()] == ["k"]
    keys = [entry.key for entry in locate(bucket).list()]
    assert keys == ["cache", "cache.lock", "cache/k", "cached/x"]


def test_addresses_are_named_like_paths() -> None:
    url = place("s3://b/some/birds/")
    assert isinstance(url, StoreUrl)
    assert (str(url), url.name, str(url.parent)) == ("s3://b/some/birds", "birds", "s3://b/some")
    assert str(url.with_name("birds.next") / "x") == "s3://b/some/birds.next/x"
    assert place(Path("s3://b/some/birds")) == url  # pathlib drops a slash
    assert place("cache/birds") == Path("cache/birds")
    bare = StoreUrl.parse("s3://b/")
    assert (bare, bare.prefix, bare.parent, bare / "x") == ("s3://b", "", bare, "s3://b/x")
    assert pickle.loads(pickle.dumps(url)).with_name("y") == "s3://b/some/y"
    for text in ("s3://", "s3://b/x//y", "s3://b/../x", "gs://b/x", "https://host/x"):
        with pytest.raises(ConfigError, match="expected a local folder or s3://bucket/prefix"):
            place(text)


def test_a_cache_field_takes_both() -> None:
    class Job(Config):
        cache: CachePath
        """Where."""

    assert Job.from_command_line(["--cache", "cache/birds"]).cache == Path("cache/birds")
    job = Job.from_command_line(["--cache", "s3://b/birds"])
    assert isinstance(job.cache, StoreUrl)
    assert (job.cache.bucket, job.cache.prefix) == ("b", "birds")
    assert job.record() == {"cache": "s3://b/birds"}
    assert Job.model_validate(job.record()) == job
    schema = TypeAdapter(CachePath).json_schema()
    assert schema == {"type": "string", "format": "path"}
    for text in ("", "s3://bucket", "ftp://b/x", "/"):
        with pytest.raises(ConfigError, match=r"^cache: "):
            Job.from_command_line(["--cache", text])


def test_a_cache_is_the_same_under_all_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "link").symlink_to("birds")
    assert place(tmp_path / "link") == tmp_path.resolve() / "birds"
    assert place(tmp_path / "birds") == tmp_path / "birds"
    monkeypatch.chdir(tmp_path / "birds")
    assert place(".") == tmp_path.resolve() / "birds"
    assert place("cache") == Path("cache")


def test_a_store_that_refuses_says_so_in_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = locate("s3://no-such-bucket/x")
    for use in (
        lambda: absent.read("a"),
        lambda: absent.write("a", b""),
        lambda: list(absent.list()),
    ):
        with pytest.raises(StorageError, match=r"s3://no-such-bucket: no such bucket at 127") as e:
            use()
        assert "\n" not in str(e.value)
    monkeypatch.setattr(object_store, "MAX_RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:1")
    with pytest.raises(
        StorageError, match=r"127.0.0.1:1 cannot be reached .*AWS_ENDPOINT_URL"
    ) as e:
        locate(bucket).read("a")
    assert "hidden" not in str(e.value)
    assert "\n" not in str(e.value)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageError, match="AWS_ALLOW_HTTP"):
        locate(bucket).read("a")


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """`answering(code, body)`: address of a server that says nothing else."""
    servers = []

    def start(code: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("code", "body"),
    [(403, b"<Error><Code>AccessDenied</Code></Error>"), (401, b""), (403, b"")],
)
def test_a_store_that_denies_access_is_told_apart(
    bucket: str,
    code: int,
    body: bytes,
    answering: Callable[[int, bytes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", answering(code, body))
    with pytest.raises(StorageDeniedError, match="denies access; check AWS_ACCESS_KEY_ID") as e:
        locate(bucket).read("a")
    assert "not-to-be-shown" not in str(e.value)


def test_uploads_are_bounded_and_their_errors_are_raised(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "UPLOAD_BYTES", 1000)
    folder = locate(bucket + "/x")
    uploads = Uploads(folder)
    for number in range(20):
        uploads.put(str(number), bytes([number]) * 600)
        assert uploads._open_bytes <= 1000
    uploads.put("empty")
    uploads.flush()
    assert len(list(folder.list())) == 21
    assert folder.read("7") == bytes([7]) * 600
    broken = Uploads(locate("s3://no-such-bucket/x"))
    broken.put("a", b"1")
    with pytest.raises(StorageError, match="no such bucket"):
        broken.flush()
    broken.flush()  # said once


def test_an_upload_that_failed_is_told_to_who_it_concerns(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = object_store.ObjectFolder.write

    def denied(self: object_store.ObjectFolder, key: str, *parts: bytes) -> None:
        if key == "theirs":
            raise StorageDeniedError("denied")
        original(self, key, *parts)

    monkeypatch.setattr(object_store.ObjectFolder, "write", denied)
    uploads = Uploads(locate(bucket))
    other = threading.Thread(target=lambda: uploads.put("theirs", b"1"))
    other.start()
    other.join()
    uploads.put("mine", b"2")
    uploads.flush({"mine"})
    with pytest.raises(StorageDeniedError):
        uploads.flush({"theirs"})
    uploads.flush({"theirs"})
