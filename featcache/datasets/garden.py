"""A garden drawn by code: plants and animals in a four-level taxonomy, with captions and clutter.

Needs no download, and is harder than it looks: species of a genus differ in one shade or marking,
every species has two appearances, and most pictures hold other things too.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from featcache.datasets.base import DatasetConfig
from featcache.errors import DatasetError
from featcache.garden.scene import OBJECTS, Domain, GardenTask, multi_label_names
from featcache.garden.species import FAMILIES, MAX_SPECIES, make_species
from featcache.garden.worker import ART, draw_rows, image_path, make_garden
from featcache.identity import fingerprint
from featcache.manifest import ROW_SCHEMA, Manifest

_LEVELS = ("name", "genus", "family")
"""Columns of the class table of species that become labels of a taxonomy."""

_ALONE = 200
"""Up to this many images are drawn by this process: starting others takes longer."""


class GardenConfig(DatasetConfig):
    """Drawn plants and animals: 48 species by default, or several labels an image."""

    kind: Literal["garden"] = "garden"
    """Dataset kind."""
    root: Path = Path("data/garden")
    """Folder to draw into, once for every set of options, in a directory of its own."""
    num_images: PositiveInt = 6000
    """Images of all splits together."""
    num_species: int = Field(default=48, ge=2, le=MAX_SPECIES)
    """Species, 2..1536; the taxonomy depends on this number alone."""
    image_size: int = Field(default=64, ge=16, le=1024)
    """Height and width in pixels, 16..1024."""
    task: GardenTask | Literal["taxonomy"] = "single_label"
    """single_label: the species; multi_label: the families and things that are in the picture;
    taxonomy: pictures of single_label with three labels each, species, genus and family."""
    domain: Domain = "meadow"
    """meadow: by day; night: dark, noisy and blurred, the same classes."""
    imbalance: float | None = Field(default=None, ge=1, le=10000)
    """Most frequent over rarest class, 1..10000: training images of the species (val and test stay
    even), or chances of the labels; unset = 1 for single_label, otherwise 100."""
    num_captions: int = Field(default=2, ge=0, le=5)
    """Captions an image, 0..5."""
    covered: float = Field(default=0.0, ge=0, le=1)
    """Share of the images, drawn by lot, in which leaves right in front hide everything, 0..1;
    captions and labels are those of what is behind."""
    vague: float = Field(default=0.0, ge=0, le=1)
    """Share of the images, drawn by lot, whose captions name nothing that is in them, 0..1. With
    `covered`, neither pictures nor captions are enough alone."""
    company: float = Field(default=0.0, ge=0, le=1)
    """Chance that each of the three frequent things that a rare one keeps company with is there
    with it, 0..1; multi_label only. Shows heads that learn from labels occurring together."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images that becomes `val`, 0 up to but not 1."""
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of the images that becomes `test`, 0 up to but not 1."""
    quality: int = Field(default=92, ge=50, le=100)
    """JPEG quality, 50..100."""
    seed: NonNegativeInt = 0
    """Seed of all images, 0 or larger."""
    num_workers: PositiveInt | None = None
    """Processes that draw; unset = one for each processor. The images do not depend on it."""

    @model_validator(mode="after")
    def _company_of_labels(self) -> "GardenConfig":
        if self.company and self.task != "multi_label":
            raise ValueError(
                f"company {self.company:g} needs task=multi_label, found {self.task}; one label "
                "an image keeps no company"
            )
        return self

    @model_validator(mode="after")
    def _leave_train(self) -> "GardenConfig":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} "
                "leave nothing to train on; their sum must stay below 1"
            )
        return self

    def manifest(self) -> Manifest:
        """Rows in shuffled class order; draws the images unless they are there.

        Raises:
            DatasetError: if there are fewer training images than species.
        """
        options = self._options()
        # Options that came later name a folder only where they change something.
        named = {k: v for k, v in options.items() if v or k not in ("covered", "vague", "company")}
        folder = self.root / f"{self.domain}-{self._drawn}-{fingerprint(named)[:10]}"
        if not (folder / "rows.parquet").is_file():
            _draw(folder, options, *self._plan(), self.num_workers or os.cpu_count() or 1)
        rows = pq.read_table(folder / "rows.parquet", schema=ROW_SCHEMA)
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=rows.column("id").combine_chunks(),
            # With the folder's name, so that a cache of other options has another identity.
            paths=[f"{folder.name}/{path}" for path in rows.column("path").to_pylist()],
            splits=rows.column("split").combine_chunks(),
            labels=self._labels(rows.column("labels").combine_chunks()),
            classes=self._classes(),
            task="single_label" if self.task == "single_label" else "multi_label",
            captions=rows.column("captions").combine_chunks() if self.num_captions else None,
        )

    def _options(self) -> dict[str, Any]:
        """Everything that changes an image or a caption."""
        options = self.model_dump(mode="json", exclude={"kind", "root", "limit", "num_workers"})
        usual = 1.0 if self.task == "single_label" else 100.0
        options["imbalance"] = usual if self.imbalance is None else self.imbalance
        return {**options, "task": self._drawn, "art": ART}

    @property
    def _drawn(self) -> GardenTask:
        """The task whose pictures these are."""
        return "single_label" if self.task == "taxonomy" else self.task

    def _plan(self) -> tuple[list[str], list[int]]:
        """Split and species of each image, in random order within a split."""
        num_val = round(self.num_images * self.val_fraction)
        num_test = round(self.num_images * self.test_fraction)
        num_train = self.num_images - num_val - num_test
        if self._drawn == "single_label" and num_train < self.num_species:
            raise DatasetError(
                f"dataset.num_images {self.num_images} leaves {num_train} training images for "
                f"{self.num_species} species; expected at least one each, so raise num_images"
            )
        ratio = self._options()["imbalance"] if self._drawn == "single_label" else 1.0
        rng = np.random.default_rng([self.seed, self.num_species])
        # Which species are rare has nothing to do with the taxonomy.
        ranks = rng.permutation(self.num_species) / max(1, self.num_species - 1)
        weights = {"train": ratio**-ranks, "val": np.ones_like(ranks), "test": np.ones_like(ranks)}
        splits: list[str] = []
        species: list[int] = []
        for split, count in (("train", num_train), ("val", num_val), ("test", num_test)):
            counts = _apportion(count, weights[split], at_least=1 if split == "train" else 0)
            classes = np.repeat(np.arange(self.num_species), counts)
            species += rng.permutation(classes).tolist()
            splits += [split] * len(classes)
        return splits, species

    def _labels(self, drawn: pa.Array) -> pa.Array | list[list[int]]:
        """Labels of the rows, from those that were drawn."""
        if self.task != "taxonomy":
            return drawn
        rows = pd.DataFrame([one.row() for one in make_species(self.num_species)])
        codes = [pd.factorize(rows[level])[0] for level in _LEVELS]
        first = np.cumsum([0, *(int(part.max()) + 1 for part in codes)])
        own = np.stack([part + start for part, start in zip(codes, first[:-1], strict=True)], 1)
        found: list[list[int]] = own[[labels[0] for labels in drawn.to_pylist()]].tolist()
        return found

    def _classes(self) -> pd.DataFrame:
        species = make_species(self.num_species)
        if self.task == "single_label":
            return pd.DataFrame([one.row() for one in species])
        if self.task == "taxonomy":
            rows = pd.DataFrame([one.row() for one in species])
            return pd.DataFrame(
                [(name, level) for level in _LEVELS for name in dict.fromkeys(rows[level])],
                columns=["name", "level"],
            )
        groups = {noun: order for order, noun, _ in FAMILIES}
        groups |= {name: group for name, group, _ in OBJECTS}
        names = multi_label_names(species)
        return pd.DataFrame({"name": names, "group": [groups[name] for name in names]})


def _apportion(
    total: int, weights: npt.NDArray[np.float64], at_least: int
) -> npt.NDArray[np.int64]:
    """Whole counts in proportion to `weights` that add up to `total` (largest remainders)."""
    at_least = min(at_least, total // len(weights))
    exact = weights / weights.sum() * (total - at_least * len(weights))
    counts: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    missing = total - at_least * len(weights) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    counts += at_least
    return counts


def _draw(
    folder: Path, options: dict[str, Any], splits: list[str], species: list[int], num_workers: int
) -> None:
    """Draws all images into `folder`; there is no folder until all are written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        for first in range(0, len(species), 1000):
            (partial / image_path(first)).parent.mkdir(parents=True)
        job = {"options": options, "species": species}
        (partial / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _draw_images(partial, job, num_workers)
        pq.write_table(_rows(options, splits, species), partial / "rows.parquet")
        try:
            partial.rename(folder)
        except OSError:  # another process was faster: its images are the same
            if not (folder / "rows.parquet").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rows(options: dict[str, Any], splits: list[str], species: list[int]) -> pa.Table:
    garden = make_garden(options)
    scenes = [garden.scene(index, one)[0] for index, one in enumerate(species)]
    return pa.table(
        {
            "id": [f"{index:06d}" for index in range(len(species))],
            "path": [image_path(index) for index in range(len(species))],
            "split": splits,
            "labels": [list(scene.labels) for scene in scenes],
            "captions": [list(scene.captions) for scene in scenes],
        },
        schema=ROW_SCHEMA,
    )


def _draw_images(folder: Path, job: dict[str, Any], num_workers: int) -> None:
    total = len(job["species"])
    num_workers = 1 if total <= _ALONE else min(num_workers, total)
    columns = ("drawing the garden", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Console(stderr=True)  # standard output may be a result
    with Progress(*columns, console=shown, disable=total <= _ALONE) as progress:
        bar = progress.add_task("images", total=total)
        if num_workers == 1:
            for done in draw_rows(job, folder, 0, 1):
                progress.advance(bar, done)
            return
        _draw_in_processes(folder, num_workers, lambda done: progress.advance(bar, done))


def _draw_in_processes(folder: Path, num_workers: int, advance: Any) -> None:
    """Runs `featcache.garden.worker` as often as there are workers.

    Not `multiprocessing`: its spawned processes import the caller's main module again, which breaks
    scripts without a `__main__` guard and notebooks.
    """
    command = [sys.executable, "-m", "featcache.garden.worker", str(folder / "job.json")]
    package_root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, (package_root, os.environ.get("PYTHONPATH", "")))
        ),
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [*command, str(first), str(num_workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for first in range(num_workers)
    ]
    failed = threading.Event()

    def follow(worker: "subprocess.Popen[str]") -> str:
        assert worker.stdout is not None
        assert worker.stderr is not None
        for line in worker.stdout:
            advance(int(line))
        errors = worker.stderr.read()
        if worker.wait() == 0:
            return ""
        if not failed.is_set():  # the others' errors are only that we stopped them
            failed.set()
            for other in workers:
                other.kill()
            return errors or f"exit status {worker.returncode}"
        return ""

    try:
        with ThreadPoolExecutor(num_workers) as pool:
            errors = [text for text in pool.map(follow, workers) if text]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdout, worker.stderr):
                if stream is not None:
                    stream.close()
    if errors:
        raise DatasetError(
            f"{folder}: drawing stopped: {errors[0].strip().splitlines()[-1]}; "
            "check the room on the disk and start again"
        )
