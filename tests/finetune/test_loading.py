"""Batches in plan order, the same whatever decodes them; unreadable images; workers that end."""

import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.backbones.base import PixelSpec
from featcache.errors import DatasetError, UnreadableImagesError
from featcache.image_bytes import tar_member_path
from finetune.images.augmentation import AugmentationConfig
from finetune.images.loading import Images, LoadingConfig
from finetune.images.training_images import TrainingImages

SPEC = PixelSpec((24, 24), (0.5,) * 3, (0.5,) * 3)
COLOURFUL = AugmentationConfig(min_area=0.2, brightness=0.4, policy="random", erasing=0.3)
CROPPED = AugmentationConfig(min_area=0.2)
NUM = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures of several sizes and formats; the red channel's mean tells the row."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for row in range(NUM):
        height, width = 30 + row, 60 - row
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        kind = "jpg" if row % 3 else "png"
        Image.fromarray(pixels).save(folder / f"{row:02d}.{kind}")
    return folder


def paths_of(root: Path) -> list[str]:
    return sorted(file.name for file in root.iterdir())


def opened(
    root: Path,
    num_workers: int,
    augmentation: AugmentationConfig | None = COLOURFUL,
    max_unreadable: float = 0.0,
    paths: list[str] | None = None,
) -> Images:
    options = LoadingConfig(max_unreadable=max_unreadable, num_readers=3)
    return Images(root, paths or paths_of(root), SPEC, augmentation, options, num_workers)


def plan(epoch: int, size: int = 7) -> list[np.ndarray]:
    order = np.random.default_rng([5, epoch]).permutation(NUM)
    return [order[start : start + size] for start in range(0, NUM, size)]


def test_same_batches_by_threads_by_workers_and_from_the_middle(root: Path, tmp_path: Path) -> None:
    names = paths_of(root)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(root / names[4], names[4])
    with tarfile.open(tmp_path / "some.tar") as tar:
        where = tar.getmembers()[0]
    (tmp_path / "pictures").symlink_to(root)
    paths = [f"pictures/{name}" for name in names]
    paths.append(tar_member_path("some.tar", where.offset_data, where.size, names[4]))
    with opened(tmp_path, 0, paths=paths) as threads, opened(tmp_path, 2, paths=paths) as workers:
        reference = list(threads.stream(plan(1), (3, 1)))
        assert [which.tolist() for _, which in reference] == [p.tolist() for p in plan(1)]
        assert reference[0][0].shape == (7, 3, 24, 24)
        assert reference[0][0].dtype == torch.uint8
        for images, start in ((workers, 0), (workers, 2), (threads, 2)):
            found = list(images.stream(plan(1)[start:], (3, 1)))
            assert len(found) == len(reference) - start
            for (pixels, which), (expected, rows) in zip(found, reference[start:], strict=True):
                assert which.tolist() == rows.tolist()
                assert torch.equal(pixels, expected)
        # Alone, in a batch of another size, in another order: a row's own draws stay its own.
        row = int(reference[1][1][3])
        alone, _ = next(workers.stream([np.array([row])], (3, 1)))
        assert torch.equal(alone[0], reference[1][0][3])
        for other in ((3, 2), (4, 1)):
            again, _ = next(threads.stream([np.array([row])], other))
            assert not torch.equal(again[0], alone[0])
        # Two streams of one set of workers, read in turn.
        first, second = workers.stream(plan(1), (3, 1)), workers.stream(plan(2))
        plain = list(threads.stream(plan(2)))
        for expected_first, expected_second in zip(reference, plain, strict=True):
            assert torch.equal(next(first)[0], expected_first[0])
            assert torch.equal(next(second)[0], expected_second[0])
        left = workers.stream(plan(1), (3, 1))
        next(left)
        left.close()
        pixels, which = workers.take(np.array([4, NUM, 2]))
        assert which.tolist() == [4, NUM, 2]
        assert torch.equal(pixels[1], pixels[0])
        assert torch.equal(pixels, threads.take(np.array([4, NUM, 2]))[0])
        assert first.rows == NUM
        assert 0 < first.waited <= workers.waited


@pytest.mark.parametrize("num_workers", [0, 2])
def test_f07_unreadable_images_are_never_black(
    root: Path, tmp_path: Path, num_workers: int
) -> None:
    paths = paths_of(root)
    for number, path in enumerate(paths):
        data = (root / path).read_bytes()
        if number != 11:
            (tmp_path / path).write_bytes(data[:500] if number in (10, 29) else data)
    bad = {paths[10], paths[11], paths[29]}
    with opened(tmp_path, num_workers, CROPPED, 0.1, paths) as images:
        left_out = list(images.stream(plan(0)))
        rows = np.concatenate([which for _, which in left_out])
        assert sorted(rows.tolist()) == [r for r in range(NUM) if r not in (10, 11, 29)]
        assert [len(pixels) for pixels, _ in left_out] == [len(which) for _, which in left_out]
        assert set(images.problems) == bad
        assert images.problems[paths[11]] == "missing"
        spares = np.array([r for r in range(NUM) if r != 12])
        full = list(images.stream(plan(0), (0, 0), spares))
        with opened(root, 0, CROPPED) as whole:
            for (pixels, which), wanted in zip(full, plan(0), strict=True):
                same = ~np.isin(wanted, [10, 11, 29])
                assert np.array_equal(which[same], wanted[same])
                assert len(set(which.tolist())) == len(which)
                replaced = which[~same].tolist()
                assert 12 not in replaced  # not a spare
                assert not {10, 11, 29} & set(replaced)
                expected, _ = next(whole.stream([which], (0, 0)))
                assert torch.equal(pixels, expected)
        # The next spare behind the unreadable one; behind the last one comes the first.
        _, which = next(images.stream([np.array([10, 29, 13])], (0, 0), np.arange(NUM)))
        assert which.tolist() == [12, 0, 13]
    with (
        opened(tmp_path, 0, CROPPED, 0.05, paths) as images,
        pytest.raises(UnreadableImagesError, match="2 images are unreadable, at most 1 of 30"),
    ):
        list(images.stream([np.array([10, 11, 12])]))


def test_a_worker_that_is_killed_ends_the_run(root: Path) -> None:
    with opened(root, 2, CROPPED) as images:
        images.take(np.arange(3))
        process = images._decoders._process  # type: ignore[union-attr]
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(child) for child in listed.split()]
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        stream = images.stream(np.arange(NUM) for _ in range(400))
        with pytest.raises(DatasetError, match="a decoding process has died"):
            list(stream)
        process.wait(10)
        assert not Path(f"/proc/{children[1]}").exists()


def test_an_augmented_stream_needs_an_augmentation(root: Path) -> None:
    with (
        opened(root, 0, augmentation=None) as images,
        pytest.raises(ValueError, match="opened with augmentation"),
    ):
        images.stream(plan(0), (0, 0))


def test_number_of_workers_follows_the_device() -> None:
    cores = len(os.sched_getaffinity(0))
    assert LoadingConfig().workers_for(torch.device("cpu")) == 0
    assert LoadingConfig().workers_for(torch.device("cuda")) == max(1, min(16, cores - 1))
    assert LoadingConfig(num_workers=3).workers_for(torch.device("cpu")) == 3


def test_images_in_memory_are_those_of_the_files(root: Path, tmp_path: Path) -> None:
    paths = [*paths_of(root)[:9], "missing.png"]
    row_gib = 3 * 24 * 24 / 2**30
    batches = [np.array([3, 9, 0]), np.array([9, 8, 1]), np.array([8, 2, 3])]
    read = Images(root, paths, SPEC, None, LoadingConfig(max_unreadable=0.9, ram_budget_gib=0.0))
    assert not read.in_memory
    for room in (10, 4):
        folder = tmp_path / str(room)
        folder.mkdir()
        for path in paths[:9]:
            (folder / path).write_bytes((root / path).read_bytes())
        options = LoadingConfig(max_unreadable=0.9, ram_budget_gib=(room + 0.1) * row_gib)
        with Images(folder, paths, SPEC, None, options) as kept:
            assert kept.in_memory == (room == 10)
            for spares in (None, np.arange(10)):
                for one, other in zip(
                    kept.stream(batches, None, spares),
                    read.stream(batches, None, spares),
                    strict=True,
                ):
                    assert torch.equal(one[0], other[0])
                    assert np.array_equal(one[1], other[1])
            assert kept.problems == read.problems == {"missing.png": "missing"}
            for path in paths[:9]:
                (folder / path).unlink()
            rows = np.array([3, 0, 8, 1, 2])
            pixels, which = kept.take(rows)
            assert len(which) == min(5, room)
            assert torch.equal(pixels, read.take(which)[0])
    read.close()


def test_training_images_go_the_quick_or_the_full_way(root: Path) -> None:
    cpu = torch.device("cpu")
    quick = AugmentationConfig(min_area=0.7)
    full = AugmentationConfig(min_area=0.7, max_aspect=4 / 3)
    for options in (quick, full):
        assert options.on_device == (options is quick)
        with TrainingImages(root, paths_of(root), SPEC, options, LoadingConfig(), cpu) as images:
            first, second = images.stream(plan(0)[:2], (0, 0)), images.stream(plan(0)[1:2], (0, 0))
            next(first)
            one, again = next(first), next(second)
            assert np.array_equal(one.which, again.which)
            inputs = images.inputs(one)
            assert torch.equal(inputs, images.inputs(again))  # whatever came before
            assert inputs.shape == (7, 3, 24, 24)
            assert inputs.dtype == torch.float32
            assert -1.0 <= inputs.min() < inputs.max() <= 1.0
            pieces = one.chunks(3)
            assert [len(piece) for piece in pieces] == [3, 2, 2]
            joined = torch.cat([images.inputs(piece) for piece in pieces])
            torch.testing.assert_close(joined, inputs)
    same = AugmentationConfig(min_area=1.0, flip=False)
    with (
        TrainingImages(
            root, paths_of(root), SPEC, same, LoadingConfig(decode="fast"), cpu
        ) as images,
        opened(root, 0, augmentation=None) as plain,
    ):
        batch = next(images.stream(plan(0), (0, 0)))
        assert batch.views is None
        pixels, _ = plain.take(batch.which)
        torch.testing.assert_close(images.inputs(batch), pixels / 127.5 - 1.0)
