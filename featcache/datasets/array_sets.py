"""Known sets that keep their images in arrays: MNIST and its kin, CIFAR, SVHN, STL-10.

Each reader takes a folder and gives pixels, class indices and classes, in torchvision's order.
"""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.datasets.path_lists import read_lines
from featcache.errors import DatasetError
from featcache.formats.mat_file import read_mat
from featcache.formats.safe_pickle import load_plain_pickle

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ArraySet:
    """Pixels and class indices by split, and the classes.

    Attributes:
        pixels: (N, H, W) or (N, H, W, 3) by split.
        labels: (N,) by split.
        classes: C rows in index order.
    """

    pixels: dict[str, Pixels]
    labels: dict[str, Labels]
    classes: pd.DataFrame


NUMERALS = tuple("0123456789")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def base_folder(root: Path, *names: str) -> Path:
    """The first of the sub-folders that is there, otherwise `root` itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def read_mnist(root: Path) -> ArraySet:
    """`MNIST/raw/train-images-idx3-ubyte` (or .gz) …; digits by value."""
    return _idx_set(base_folder(root, "MNIST/raw", "raw"), NUMERALS, word=DIGITS)


def read_fashion_mnist(root: Path) -> ArraySet:
    """`FashionMNIST/raw/…`, ten kinds of clothes."""
    return _idx_set(base_folder(root, "FashionMNIST/raw", "raw"), CLOTHES)


def read_kmnist(root: Path) -> ArraySet:
    """`KMNIST/raw/…`, ten hiragana."""
    return _idx_set(base_folder(root, "KMNIST/raw", "raw"), KANA)


def _idx_set(base: Path, names: Sequence[str], **columns: Sequence[str]) -> ArraySet:
    parts = {"train": "train", "test": "t10k"}
    pixels = {split: _idx(base / f"{part}-images-idx3-ubyte", 3) for split, part in parts.items()}
    labels = {
        split: _idx(base / f"{part}-labels-idx1-ubyte", 1).astype(np.int64)
        for split, part in parts.items()
    }
    classes = pd.DataFrame({"name": names, **columns}, dtype=object)
    return _checked(base, ArraySet(pixels, labels, classes))


def _idx(file: Path, num_dimensions: int) -> npt.NDArray[np.uint8]:
    """Bytes of an IDX file: 0, 0, type 8, number of dimensions, sizes (big-endian), values."""
    packed = file.with_name(file.name + ".gz")
    if not file.is_file() and not packed.is_file():
        raise DatasetError(f"{file}: no such file (nor .gz)")
    try:
        data = file.read_bytes() if file.is_file() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as error:
        raise DatasetError(f"{packed}: not a readable .gz file ({error})") from None
    head = 4 + 4 * num_dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, num_dimensions]):
        raise DatasetError(f"{file}: expected IDX data of bytes in {num_dimensions} dimensions")
    shape = np.frombuffer(data, ">u4", num_dimensions, 4).astype(np.int64)
    if len(data) != head + shape.prod():
        sizes = " x ".join(map(str, shape.tolist()))
        raise DatasetError(f"{file}: {len(data) - head} bytes of {sizes}; is it a whole download?")
    return np.frombuffer(data, np.uint8, -1, head).reshape(shape)


def read_cifar10(root: Path) -> ArraySet:
    """`cifar-10-batches-py` (pickles, restricted) or `cifar-10-batches-bin`."""
    files = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
    python = base_folder(root, "cifar-10-batches-py")
    if (python / "batches.meta").is_file():
        names = _pickled(python / "batches.meta", "label_names")
        return _cifar_pickles(python, files, "labels", names)
    binary = base_folder(root, "cifar-10-batches-bin")
    names = _names(binary / "batches.meta.txt")
    return _cifar_binary(binary, {s: [f"{n}.bin" for n in f] for s, f in files.items()}, 1, names)


def read_cifar100(root: Path) -> ArraySet:
    """`cifar-100-python` (pickles, restricted) or `cifar-100-binary`; `coarse` = superclass."""
    python = base_folder(root, "cifar-100-python")
    if (python / "meta").is_file():
        fine, coarse = (_pickled(python / "meta", f"{k}_label_names") for k in ("fine", "coarse"))
        files = {"train": ["train"], "test": ["test"]}
        found = _cifar_pickles(python, files, "fine_labels", fine)
        groups = {
            split: _array(python / split, "coarse_labels", np.int64) for split in ("train", "test")
        }
    else:
        base = base_folder(root, "cifar-100-binary")
        fine, coarse = (_names(base / f"{k}_label_names.txt") for k in ("fine", "coarse"))
        found = _cifar_binary(base, {"train": ["train.bin"], "test": ["test.bin"]}, 2, fine)
        groups = {
            split: _records(base / f"{split}.bin", 2)[:, 0].astype(np.int64)
            for split in ("train", "test")
        }
    superclass = [""] * len(fine)
    for split, labels in found.labels.items():
        for label, group in np.unique(np.stack([labels, groups[split]], 1), axis=0).tolist():
            superclass[label] = coarse[group]
    return ArraySet(found.pixels, found.labels, found.classes.assign(coarse=superclass))


def _cifar_pickles(base: Path, files: dict[str, list[str]], key: str, names: list[str]) -> ArraySet:
    pixels, labels = {}, {}
    for split, parts in files.items():
        rows = [_array(base / part, "data") for part in parts]
        for part, data in zip(parts, rows, strict=True):
            if data.ndim != 2 or data.shape[1] != 3072 or data.dtype != np.uint8:
                raise DatasetError(
                    f"{base / part}: expected rows of 3072 bytes, found {data.shape}"
                )
        pixels[split] = np.concatenate(rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        known = [_array(base / part, key, np.int64) for part in parts]
        labels[split] = np.concatenate(known)
    return _checked(base, ArraySet(pixels, labels, pd.DataFrame({"name": names}, dtype=object)))


def _array(file: Path, key: str, dtype: type[np.generic] | None = None) -> npt.NDArray[Any]:
    """A pickled list or array."""
    found = _pickled(file, key)
    try:
        return np.asarray(found, dtype)
    except (ValueError, TypeError):  # rows of unequal length, or text for numbers
        raise DatasetError(f"{file}: {key!r} is no array of numbers; download it again") from None


def _pickled(file: Path, key: str) -> Any:
    found = load_plain_pickle(file)
    if not isinstance(found, dict) or key not in found:
        raise DatasetError(f"{file}: expected a dictionary with {key!r}")
    return found[key]


def _cifar_binary(
    base: Path, files: dict[str, list[str]], num_labels: int, names: list[str]
) -> ArraySet:
    """Records of `num_labels` bytes, the last being the class, and 3x32x32 bytes."""
    pixels, labels = {}, {}
    for split, parts in files.items():
        records = np.concatenate([_records(base / part, num_labels) for part in parts])
        labels[split] = records[:, num_labels - 1].astype(np.int64)
        pixels[split] = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _checked(base, ArraySet(pixels, labels, pd.DataFrame({"name": names}, dtype=object)))


def _records(file: Path, num_labels: int) -> npt.NDArray[np.uint8]:
    if not file.is_file():
        raise DatasetError(f"{file}: no such file; expected CIFAR's Python or binary version")
    data = np.fromfile(file, np.uint8)
    if len(data) == 0 or len(data) % (3072 + num_labels):
        raise DatasetError(
            f"{file}: {len(data)} bytes are no records of {3072 + num_labels}; is it a whole "
            "download?"
        )
    return data.reshape(-1, 3072 + num_labels)


def read_svhn(root: Path) -> ArraySet:
    """`train_32x32.mat`, `test_32x32.mat`; label 10 is the digit 0; `extra` is left out."""
    pixels, labels = {}, {}
    for split in ("train", "test"):
        file = base_folder(root, "svhn") / f"{split}_32x32.mat"
        images, numbers = read_mat(file, ["X", "y"])
        if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
            raise DatasetError(f"{file}: X is {images.shape}; expected (32, 32, 3, N) bytes")
        pixels[split] = images.transpose(3, 0, 1, 2)
        labels[split] = numbers.astype(np.int64) % 10
    classes = pd.DataFrame({"name": NUMERALS, "word": DIGITS}, dtype=object)
    return _checked(root, ArraySet(pixels, labels, classes))


def read_stl10(root: Path) -> ArraySet:
    """`stl10_binary/train_X.bin` …; images are stored column by column; `unlabeled` is left out."""
    base = base_folder(root, "stl10_binary")
    pixels, labels = {}, {}
    for split in ("train", "test"):
        for file in (base / f"{split}_X.bin", base / f"{split}_y.bin"):
            if not file.is_file():
                raise DatasetError(f"{file}: no such file; expected STL-10's binary version")
        data = np.fromfile(base / f"{split}_X.bin", np.uint8)
        if len(data) % (3 * 96 * 96):
            raise DatasetError(f"{base / f'{split}_X.bin'}: no whole images; download it again")
        pixels[split] = data.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        labels[split] = np.fromfile(base / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
    names = _names(base / "class_names.txt")
    return _checked(base, ArraySet(pixels, labels, pd.DataFrame({"name": names}, dtype=object)))


def _names(file: Path) -> list[str]:
    return [line.text for line in read_lines(file, "the class names, one a line")]


def _checked(base: Path, found: ArraySet) -> ArraySet:
    for split, labels in found.labels.items():
        if len(labels) != len(found.pixels[split]):
            raise DatasetError(
                f"{base}: {len(labels)} labels for {len(found.pixels[split])} images of {split}"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < len(found.classes):
            raise DatasetError(
                f"{base}: {split} has label {labels.min() if labels.min() < 0 else labels.max()}; "
                f"expected 0 to {len(found.classes) - 1}"
            )
    return found


ARRAY_SETS: dict[str, Callable[[Path], ArraySet]] = {
    "mnist": read_mnist,
    "fashion_mnist": read_fashion_mnist,
    "kmnist": read_kmnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "svhn": read_svhn,
    "stl10": read_stl10,
}
"""Readers by name."""
