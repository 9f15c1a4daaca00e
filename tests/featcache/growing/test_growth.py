"""A cache whose dataset changed: nothing known is encoded again, nothing is ever lost."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from featcache import extraction, info
from featcache.class_text import class_text_features, open_cache_backbone
from featcache.errors import CacheError, CacheMismatchError
from featcache.extract import ExtractConfig, plan, run
from featcache.extraction import Extraction
from featcache.growing import changes, growth, survey, swap
from featcache.info import InfoConfig
from featcache.reader import open_cache
from featcache.store import Store, verify

EXACT = {"precision": "fp32", "features": {"storage_dtype": "float32"}}


class Meter:
    """Counts what is encoded, and what is read to be compared."""

    def __init__(self, monkeypatch):
        self.images = self.texts = 0
        self.read: list[str] = []
        encode, read = extraction.encode_views, survey.read_many
        encode_texts = Extraction._encode_texts

        def counted(backbone, pixels, request, rows, *rest):
            self.images += rows
            return encode(backbone, pixels, request, rows, *rest)

        def counted_texts(session, texts, *rest):
            self.texts += len(texts)
            return encode_texts(session, texts, *rest)

        def noted(root, paths):
            self.read += paths
            return read(root, paths)

        monkeypatch.setattr(extraction, "encode_views", counted)
        monkeypatch.setattr(Extraction, "_encode_texts", counted_texts)
        monkeypatch.setattr(survey, "read_many", noted)

    def reset(self):
        self.images = self.texts = 0
        self.read = []


@pytest.fixture
def meter(monkeypatch):
    return Meter(monkeypatch)


@pytest.fixture
def make(image_folder, tiny_clip, tmp_path, opened_once):
    """Configuration of an extraction of the small image folder; keywords override."""

    def build(cache="cache", **changed):
        values = {
            "dataset": {"root": str(image_folder)},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": str(tmp_path / cache),
            "device": "cpu",
            "batch_size": 4,
            "shard_rows": 4,
            "num_readers": 2,
            **EXACT,
            **changed,
        }
        return ExtractConfig.model_validate(values)

    return build


def by_id(path, name="image/projected"):
    cache = open_cache(path)
    return dict(zip(cache.ids, cache.array(name).read(), strict=True))


def assert_like_fresh(grown: Path, fresh: Path) -> None:
    """Everything equal to a cache extracted anew: features up to rounding, all else exactly."""
    assert verify(grown) == []
    first, second = open_cache(grown), open_cache(fresh)
    assert first.fingerprint == second.fingerprint
    assert (first.ids, first.paths, first.splits) == (second.ids, second.paths, second.splits)
    for name in ("rows/valid", "rows/content", "rows/stamp"):
        assert np.array_equal(first.store.read(name), second.store.read(name)), name
    assert first.feature_names() == second.feature_names()
    for name in first.feature_names():
        a, b = first.array(name).read(), second.array(name).read()
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=0, atol=1e-6 * np.nanmax(np.abs(b)), equal_nan=True), name
    assert first.classes.equals(second.classes)
    invalid = [
        [item for _, report in sorted(reports.items()) for item in report["invalid"]]
        for reports in (first.store.reports("image"), second.store.reports("image"))
    ]
    assert invalid[0] == invalid[1]


def leftovers(path: Path) -> list[str]:
    names = {p.name for p in path.parent.iterdir() if p.name.startswith(path.name)}
    return sorted(names - {path.name, f"{path.name}.lock"})


def change_everything(folder: Path, make_jpeg) -> None:
    """Gains, losses, moves, another label, other content, duplicates, a new class."""
    (folder / "train/cat/00.jpg").unlink()
    (folder / "train/dog/01.jpg").rename(folder / "val/dog/01.jpg")  # another split
    (folder / "train/cat/02.jpg").rename(folder / "train/dog/02.jpg")  # another label
    (folder / "train/cat/04.jpg").write_bytes(make_jpeg(33, 44, 104))  # other content
    for name, seed in (("a", 101), ("m", 102), ("z", 103)):
        (folder / f"train/cat/{name}.jpg").write_bytes(make_jpeg(40, 40, seed))
    (folder / "train/owl").mkdir()
    (folder / "val/owl").mkdir()
    shutil.copy(folder / "train/cat/a.jpg", folder / "train/owl/same.jpg")  # new twice
    shutil.copy(folder / "val/dog/11.jpg", folder / "train/owl/known.jpg")  # known already
    (folder / "val/owl/x.jpg").write_bytes(make_jpeg(50, 30, 105))


def test_only_new_content_is_encoded_and_the_rest_is_equal_to_the_bit(
    make, meter, image_folder, make_jpeg, capsys
):
    config = make()
    run(config)
    before = by_id(config.cache)
    change_everything(image_folder, make_jpeg)
    meter.reset()
    report = run(config)
    assert meter.images == 5  # a, m, z, x and the changed 04
    # Moved, gained and changed files are read to be compared; the other ten are not even opened.
    assert len(meter.read) == 9
    assert (report.num_rows, report.num_extracted, report.num_copied) == (19, 5, 14)
    out = capsys.readouterr().out
    assert "6 gained, 1 lost, 2 moved, 1 changed, 1 new class" in out
    assert "5 images to encode, 14 taken over" in out
    after = by_id(config.cache)
    for name in before.keys() & after.keys() - {"train/cat/04.jpg"}:
        assert np.array_equal(before[name], after[name]), name
    assert np.array_equal(before["train/dog/01.jpg"], after["val/dog/01.jpg"])
    assert np.array_equal(after["train/owl/known.jpg"], before["val/dog/11.jpg"])
    assert np.array_equal(after["train/owl/same.jpg"], after["train/cat/a.jpg"])
    assert leftovers(config.cache) == []
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)
    meter.reset()
    assert run(config).num_extracted == 0
    assert meter.images == 0


def table(tmp_path: Path, image_folder: Path, label, captions) -> dict[str, str]:
    """A table over the folder's images; `label` and `captions` say what row number i holds."""
    lines = ["path,label,split,captions"]
    for number, file in enumerate(sorted(image_folder.rglob("*.jpg"))):
        texts = json.dumps(captions(number)).replace('"', '""')
        lines.append(f'{file.relative_to(image_folder)},{label(number)},train,"{texts}"')
    file = tmp_path / "table.csv"
    file.write_text("\n".join(lines) + "\n")
    return {"kind": "table", "file": str(file), "root": str(image_folder)}


def inodes(path: Path, array: str) -> dict[str, int]:
    return {f.parent.name: f.stat().st_ino for f in (path / array / "c").rglob("*") if f.is_file()}


def test_other_labels_and_captions_rewrite_no_feature_file(
    make, meter, tmp_path, image_folder, monkeypatch
):
    create, needs_no_room = growth.create, []
    monkeypatch.setattr(
        growth,
        "create",
        lambda path, plan, room: needs_no_room.append(room) or create(path, plan, room),
    )
    dataset = table(tmp_path, image_folder, lambda n: "ab"[n % 2], lambda n: [f"photo {n}"])
    config = make(dataset=dataset)
    run(config)
    files = {name: inodes(config.cache, name) for name in ("image/projected", "text/projected")}
    assert [len(found) for found in files.values()] == [4, 4]
    meter.reset()
    # Three classes instead of two, and one more caption at the end.
    table(
        tmp_path,
        image_folder,
        lambda n: "abc"[n % 3],
        lambda n: [f"photo {n}", "another", "photo 3"][: 3 if n == 13 else 1],
    )
    report = run(config)
    assert (meter.images, meter.texts, meter.read) == (0, 1, [])
    assert (report.num_rows, report.num_captions, report.num_copied) == (14, 16, 14)
    assert inodes(config.cache, "image/projected") == files["image/projected"]
    after = inodes(config.cache, "text/projected")
    assert {chunk: after[chunk] for chunk in "012"} == {
        chunk: files["text/projected"][chunk] for chunk in "012"
    }
    # Of 4 image and 4 caption chunks, each 4 rows of 32 float32 and a checksum, one is new.
    assert needs_no_room == [7 * (4 * 32 * 4 + 4)]
    changed = open_cache(config.cache).history[0]["changed"]
    assert (changed["relabelled"], changed["recaptioned"], changed["new_classes"]) == (8, 1, ["c"])
    assert (changed["gained"], changed["lost"], changed["moved"], changed["changed"]) == (0,) * 4
    texts = features(config.cache, "text/projected")
    assert np.array_equal(texts[15], texts[3])
    fresh = make("fresh", dataset=dataset)
    run(fresh)
    assert_like_fresh(config.cache, fresh.cache)


def test_killed_at_any_shard_and_resumed_equals_uninterrupted(
    make, meter, image_folder, make_jpeg, monkeypatch
):
    config, other = make(), make("other")
    run(config)
    shutil.copytree(config.cache, other.cache)
    before = open_cache(config.cache).array("image/projected").read()
    change_everything(image_folder, make_jpeg)
    run(other)
    meter.reset()
    extract = Extraction.extract
    for stop in range(6):

        def cut(self, shard, stop=stop):
            if shard.index >= stop:
                raise KeyboardInterrupt
            return extract(self, shard)

        monkeypatch.setattr(Extraction, "extract", cut)
        if stop < 5:
            with pytest.raises(KeyboardInterrupt):
                run(config)
            # All the while the old state is whole, and open to everybody.
            assert np.array_equal(open_cache(config.cache).array("image/projected").read(), before)
            assert leftovers(config.cache) == ["cache.next"]
    monkeypatch.setattr(Extraction, "extract", extract)
    monkeypatch.setattr(swap, "replace", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert Store.open(swap.next_path(config.cache)).complete
    monkeypatch.undo()
    meter = Meter(monkeypatch)
    assert run(config).num_rows == 19
    assert meter.images == 0
    assert leftovers(config.cache) == []
    assert_same_bytes(config.cache, other.cache)


def features(path, name="image/projected"):
    return open_cache(path).array(name).read()


def assert_same_bytes(first: Path, second: Path) -> None:
    names = ["image/projected", "rows/valid", "rows/content", "rows/stamp"]
    assert open_cache(first).fingerprint == open_cache(second).fingerprint
    for name in names:
        assert features(first, name).tobytes() == features(second, name).tobytes(), name


def test_equal_new_images_are_encoded_once(make, meter, image_folder, make_jpeg):
    config = make()
    run(config)
    data, broken = make_jpeg(44, 44, 200), b"\xff\xd8 not an image, but twice the same"
    # Shards hold four rows: the copies fall into the same shard and into later ones.
    for number in range(9):
        (image_folder / f"train/cat/a{number}.jpg").write_bytes(data)
    for number in range(2):
        (image_folder / f"train/cat/b{number}.jpg").write_bytes(broken)
    (image_folder / "val/dog/a.jpg").write_bytes(data)
    (image_folder / "val/dog/b.jpg").write_bytes(broken)
    meter.reset()
    again = make(max_invalid=0.2)
    report = run(again)
    assert report.num_invalid == 3
    assert meter.images == 3  # the image, and the broken one in each of two shards
    fresh = make("fresh", max_invalid=0.2)
    run(fresh)
    assert_like_fresh(config.cache, fresh.cache)
    found = by_id(config.cache)
    assert all(
        np.array_equal(found[f"train/cat/a{n}.jpg"], found["val/dog/a.jpg"]) for n in range(9)
    )


def test_unreadable_images_are_tried_again_when_they_changed_or_it_is_asked_for(
    make, meter, image_folder, make_jpeg
):
    bad, worse = image_folder / "train/cat/02.jpg", image_folder / "train/dog/03.jpg"
    good = {file: file.read_bytes() for file in (bad, worse)}
    for file in good:
        file.write_bytes(b"broken")
    run(make(max_invalid=0.5))
    (image_folder / "val/cat/new.jpg").write_bytes(make_jpeg(40, 40, 300))
    meter.reset()
    run(make(max_invalid=0.5))
    assert meter.images == 1
    worse.write_bytes(good[worse])
    (image_folder / "val/cat/new2.jpg").write_bytes(make_jpeg(40, 40, 301))
    meter.reset()
    assert run(make(max_invalid=0.5)).num_invalid == 1
    assert meter.images == 2
    # A marker that lies: the bytes changed, size and time did not.
    before = bad.stat()
    bad.write_bytes(good[bad][:6])
    os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    (image_folder / "val/cat/new3.jpg").write_bytes(make_jpeg(40, 40, 302))
    meter.reset()
    assert run(make(max_invalid=0.5, retry_invalid=True)).num_invalid == 1
    assert meter.images == 2
    fresh = make("fresh", max_invalid=0.5)
    run(fresh)
    assert_like_fresh(make().cache, fresh.cache)


def test_the_wrong_dataset_does_not_wipe_a_cache(make, meter, image_folder, make_jpeg, tmp_path):
    config = make()
    run(config)
    wrong = tmp_path / "wrong"
    for number in range(12):
        file = wrong / "train/cat" / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make_jpeg(40, 40, 400 + number))
    shutil.copy(image_folder / "train/cat/00.jpg", wrong / "train/cat/99.jpg")
    meter.reset()
    other = make(dataset={"root": str(wrong)})
    with pytest.raises(CacheMismatchError, match=r"13 of its 14 images \(92.9 %\) are not in this"):
        run(other)
    assert meter.images == 0
    assert leftovers(config.cache) == []
    run(config)
    assert meter.images == 0
    assert run(make(dataset={"root": str(wrong)}, max_lost=1)).num_extracted == 12


def test_an_interrupted_update_of_another_state_still_gives_its_rows(
    make, meter, image_folder, make_jpeg, monkeypatch
):
    config = make()
    run(config)
    for number in range(6):
        file = image_folder / f"train/cat/00-{number}.jpg"  # before 00.jpg
        file.write_bytes(make_jpeg(40, 40, 500 + number))
    encode = Extraction._encode_batch

    def cut(self, batch, rows, *rest, **more):
        if rows[0] >= 4:
            raise KeyboardInterrupt
        return encode(self, batch, rows, *rest, **more)

    monkeypatch.setattr(Extraction, "_encode_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    (image_folder / "val/cat/z.jpg").write_bytes(make_jpeg(40, 40, 510))
    meter = Meter(monkeypatch)
    monkeypatch.setattr(Extraction, "extract", lambda self, shard: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    monkeypatch.undo()
    assert len(swap.donor_paths(config.cache)) == 1
    meter = Meter(monkeypatch)
    run(config)
    assert meter.images == 7 - 4  # the first shard was done
    assert leftovers(config.cache) == []
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)


def test_an_unfinished_cache_whose_dataset_changed_gives_what_it_has(
    make, meter, image_folder, make_jpeg, monkeypatch
):
    config = make()
    with plan(config) as session:
        for shard in session.pending()[:2]:
            session.extract(shard)
    (image_folder / "val/cat/z.jpg").write_bytes(make_jpeg(40, 40, 600))
    meter.reset()
    # The rows that are not done are not lost: they never were there.
    assert run(config).num_extracted == 7
    assert open_cache(config.cache).history == []
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)


def test_damaged_rows_are_encoded_again_instead_of_copied(
    make, meter, image_folder, make_jpeg, capsys
):
    config = make()
    run(config)
    (image_folder / "train/cat/a.jpg").write_bytes(make_jpeg(40, 40, 700))  # moves all that follow
    file = config.cache / "image/projected/c/2/0"
    damaged = bytearray(file.read_bytes())
    damaged[9] ^= 4
    file.write_bytes(damaged)
    (config.cache / "image/projected/c/0/0").unlink()
    meter.reset()
    run(config)
    assert meter.images == 1 + 4 + 4
    out = capsys.readouterr().out
    assert "c/2/0: checksum does not match the bytes; its rows are encoded again" in out
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)


def test_augmented_views_follow_the_row_id(make, meter, image_folder, make_jpeg):
    config = make(views={"num_views": 2})
    run(config)
    (image_folder / "train/cat/00.jpg").rename(image_folder / "train/cat/000.jpg")
    shutil.copy(image_folder / "val/dog/11.jpg", image_folder / "train/dog/copy.jpg")
    meter.reset()
    run(config)
    assert meter.images == 2 * 2 or meter.images == 2  # a call encodes all views of its rows
    fresh = make("fresh", views={"num_views": 2})
    run(fresh)
    assert_like_fresh(config.cache, fresh.cache)


def test_one_writer_at_a_time(make, image_folder, make_jpeg):
    config = make()
    run(config)
    (image_folder / "train/cat/a.jpg").write_bytes(make_jpeg(40, 40, 850))
    with plan(config) as session:
        with pytest.raises(CacheError, match="is writing this cache"):
            run(config)
        for shard in session.pending():
            session.extract(shard)
        with pytest.raises(CacheError, match="is writing this cache"):
            run(config)
        session.finish()
    assert run(config).num_extracted == 0


def test_somebody_elses_folder_is_left_alone(make, image_folder, make_jpeg):
    config = make()
    run(config)
    other = make("cache.next")
    run(other)
    (image_folder / "train/cat/a.jpg").write_bytes(make_jpeg(40, 40, 800))
    with pytest.raises(CacheError, match=r"cache.next: in the way, and not an update of .*cache"):
        run(config)
    assert len(open_cache(other.cache).ids) == 14
    assert run(make(restart=True)).num_extracted == 15
    assert other.cache.exists()


def test_a_swap_by_two_renames_that_is_cut_between_is_finished(
    make, image_folder, make_jpeg, monkeypatch
):
    config = make()
    run(config)
    (image_folder / "train/cat/a.jpg").write_bytes(make_jpeg(40, 40, 900))
    monkeypatch.setattr(swap, "exchange", lambda first, second: False)
    rename = Path.rename

    def cut(self, target):
        if str(target) == str(config.cache):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not config.cache.exists()
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    report = run(config)
    assert (report.num_rows, report.num_extracted) == (15, 0)
    assert leftovers(config.cache) == []
    assert len(open_cache(config.cache).history) == 1


def test_names_are_exchanged_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    if not swap.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a/was-b").exists()
    assert (tmp_path / "b/was-a").exists()
    with pytest.raises(FileNotFoundError):
        swap.exchange(tmp_path / "a", tmp_path / "missing")


def test_an_open_cache_keeps_what_it_mapped_and_refuses_the_rest(make, image_folder, make_jpeg):
    config = make(features={"storage_dtype": "float32", "pooled": True})
    run(config)
    cache = open_cache(config.cache)
    mapped = cache.array("image/projected")
    before = mapped.read()
    change_everything(image_folder, make_jpeg)
    run(config)
    assert np.array_equal(mapped.read(), before)
    for use in (lambda: cache.array("image/pooled"), lambda: cache.ids, lambda: cache.classes):
        with pytest.raises(CacheError, match="updated while it was open; open it again"):
            use()
    assert len(open_cache(config.cache).array("image/pooled")) == 19


def test_a_dataset_that_changes_during_the_update_is_noticed(
    make, image_folder, make_jpeg, monkeypatch
):
    config = make()
    run(config)
    first, second = image_folder / "train/cat/a.jpg", image_folder / "val/dog/a.jpg"
    for file in (first, second):
        file.write_bytes(make_jpeg(40, 40, 1000))
    other = image_folder / "train/cat/b.jpg"
    other.write_bytes(first.read_bytes())
    surveyed = growth.survey

    def then_changed(*args, **options):
        found = surveyed(*args, **options)
        first.write_bytes(make_jpeg(41, 41, 1001))
        return found

    monkeypatch.setattr(growth, "survey", then_changed)
    with pytest.raises(CacheError, match=r"train/cat/a.jpg: changed while the cache was updated"):
        run(config)
    monkeypatch.setattr(growth, "survey", surveyed)
    run(config)
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)


def test_a_cache_of_before_version_marks_were_kept_grows_too(make, meter, image_folder, make_jpeg):
    config = make()
    run(config)
    store = Store.open(config.cache, write=True)
    arrays = store.attributes["arrays"]
    arrays["image"].remove("rows/stamp")
    store.update_attributes(arrays=arrays)
    shutil.rmtree(config.cache / "rows/stamp")
    (image_folder / "train/cat/a.jpg").write_bytes(make_jpeg(40, 40, 1100))
    meter.reset()
    run(config)
    assert (meter.images, len(meter.read)) == (1, 15)
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)


def test_images_changed_in_place_are_found_when_it_is_asked_for(
    make, meter, image_folder, make_jpeg
):
    config = make()
    fingerprint = run(config).fingerprint
    (image_folder / "train/cat/04.jpg").write_bytes(make_jpeg(33, 44, 104))
    meter.reset()
    for recheck, expected in ((False, 0), (True, 1), (True, 1)):
        assert run(make(recheck=recheck)).fingerprint == fingerprint
        assert meter.images == expected
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)
    assert leftovers(config.cache) == []
    assert open_cache(config.cache).history == []


def test_a_dataset_that_gains_its_first_captions(make, meter, tmp_path, image_folder):
    dataset = table(tmp_path, image_folder, lambda n: "ab"[n % 2], lambda n: [])
    config = make(dataset=dataset)
    run(config)
    assert not open_cache(config.cache).has("text/projected")
    for captions in (lambda n: [f"photo {n % 5}"], lambda n: []):
        meter.reset()
        table(tmp_path, image_folder, lambda n: "ab"[n % 2], captions)
        run(config)
        assert (meter.images, meter.texts) == (0, 5 if captions(0) else 0)
        fresh = make(f"fresh{meter.texts}", dataset=dataset)
        run(fresh)
        assert_like_fresh(config.cache, fresh.cache)


def test_class_text_is_carried_over_while_its_sentences_hold(
    make, image_folder, make_jpeg, monkeypatch
):
    config = make()
    run(config)
    templates = ["a {name}.", "a photo of a {name}."]
    opened = open_cache(config.cache)
    before = class_text_features(opened, templates, lambda: open_cache_backbone(opened))
    (image_folder / "val/cat/x.jpg").write_bytes(make_jpeg(40, 40, 1200))
    run(config)
    cache = open_cache(config.cache)
    never = class_text_features(cache, templates, lambda: pytest.fail("a text pass"))
    assert np.array_equal(never, before)
    (image_folder / "train/owl").mkdir()
    (image_folder / "train/owl/x.jpg").write_bytes(make_jpeg(40, 40, 1201))
    run(config)
    assert list((config.cache / "class_text").glob("*/c")) == []
    assert verify(config.cache) == []


def test_history_says_how_a_cache_came_to_be(make, image_folder, make_jpeg, capsys):
    config = make()
    states = [run(config).fingerprint]
    for number in range(2):
        (image_folder / f"train/cat/a{number}.jpg").write_bytes(make_jpeg(40, 40, number))
        states.append(run(config).fingerprint)
    cache = open_cache(config.cache)
    assert [entry["fingerprint"] for entry in cache.history] == states[:2]
    assert [entry["num_rows"] for entry in cache.history] == [14, 15]
    info.run(InfoConfig(cache=config.cache))
    out = capsys.readouterr().out
    assert f"earlier      15 rows until {cache.history[1]['date']}: 1 gained" in out
    line = "it had 14 rows then; since: 1 gained; then 1 gained"
    assert changes.since(cache.history, states[0]) == line
    assert changes.since(cache.history, states[2]) is None
