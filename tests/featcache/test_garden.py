"""The drawn garden: deterministic, atomic, balanced as asked, and learnable but not trivial."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from featcache.datasets import garden as garden_module
from featcache.datasets.garden import GardenConfig
from featcache.errors import DatasetError
from featcache.garden.scene import OBJECTS, companions
from featcache.garden.species import FAMILIES, MAX_SPECIES, make_species
from featcache.garden.worker import draw_image, make_garden
from featcache.manifest import Manifest
from featcache.pictures import contact_sheet


def tiny(root: Path, **options: object) -> GardenConfig:
    return GardenConfig.model_validate(
        {"root": root, "num_images": 60, "num_species": 6, "image_size": 16, **options}
    )


def file_bytes(manifest: Manifest) -> list[bytes]:
    return [(manifest.root / path).read_bytes() for path in manifest.paths]


@pytest.mark.parametrize("num_species", [2, 7, 40, 48, 333, MAX_SPECIES])
def test_species_are_distinct_and_nested(num_species: int) -> None:
    rows = [one.row() for one in make_species(num_species)]
    assert len({row["name"] for row in rows}) == num_species
    assert len({row["scientific_name"] for row in rows}) == num_species
    for lower, upper in (("genus", "family"), ("family", "order")):
        assert len({row[lower] for row in rows}) == len({(r[lower], r[upper]) for r in rows})


def test_neighbours_in_a_genus_differ_in_one_word() -> None:
    species = make_species(48)
    assert Counter(one.genus_name + one.noun for one in species).most_common()[-1][1] == 3
    for left, right in itertools.pairwise(species):
        if left.genus == right.genus:
            words = zip(left.common_name.split(), right.common_name.split(), strict=True)
            assert sum(a != b for a, b in words) == 1


def test_rows_classes_and_captions(tmp_path: Path) -> None:
    manifest = tiny(tmp_path, num_captions=3).open()
    assert Counter(manifest.splits) == {"train": 42, "val": 6, "test": 12}
    assert manifest.classes["count"].tolist() == [7] * 6
    assert {"common_name", "scientific_name", "genus", "family", "order"} <= set(manifest.classes)
    assert np.diff(manifest.caption_offsets).tolist() == [3] * 60
    own = 0
    for row in manifest.rows.to_pylist():
        name = manifest.classes["name"][row["labels"][0]]
        own += any(name in caption for caption in row["captions"])
    assert own > 40
    with Image.open(manifest.root / manifest.paths[0]) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")


def test_images_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tiny(tmp_path / "one").open()
    monkeypatch.setattr(garden_module, "_ALONE", 0)
    together = tiny(tmp_path / "three", num_workers=3).open()
    assert file_bytes(alone) == file_bytes(together)
    assert alone.identity == together.identity


def test_progress_is_not_written_where_results_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(garden_module, "_ALONE", 10)
    tiny(tmp_path, num_workers=1).open()
    shown = capfd.readouterr()
    assert "drawing the garden" in shown.err
    assert shown.out == ""


def test_another_run_reuses_and_other_options_get_another_folder(tmp_path: Path) -> None:
    first = tiny(tmp_path).open()
    stamps = [(first.root / path).stat().st_mtime_ns for path in first.paths]
    again = tiny(tmp_path, num_workers=2).open()
    assert again.paths == first.paths
    assert [(again.root / path).stat().st_mtime_ns for path in again.paths] == stamps
    other = tiny(tmp_path, seed=1).open()
    assert other.paths[0] != first.paths[0]
    assert file_bytes(other) != file_bytes(first)
    assert not list(tmp_path.glob(".*"))


def test_covered_pictures_and_vague_captions_leave_all_others_as_they_were(tmp_path: Path) -> None:
    plain = tiny(tmp_path, num_captions=2).open()
    manifest = tiny(tmp_path, num_captions=2, covered=0.4, vague=0.5).open()
    assert manifest.rows.column("labels").equals(plain.rows.column("labels"))
    assert manifest.paths[0] != plain.paths[0]
    same = [one == other for one, other in zip(*map(file_bytes, (plain, manifest)), strict=True)]
    told = manifest.rows.column("captions").to_pylist()
    before = plain.rows.column("captions").to_pylist()
    usual = [one == other for one, other in zip(before, told, strict=True)]
    assert 0.4 < np.mean(same) < 0.8
    assert 0.3 < np.mean(usual) < 0.7
    assert len(set(zip(same, usual, strict=True))) == 4, "lots of their own"
    nouns = {noun for _, noun, _ in FAMILIES} | {name for name, _, _ in OBJECTS}
    for captions in (one for one, kept in zip(told, usual, strict=True) if not kept):
        assert len(captions) == 2
        assert not any(noun in caption for noun in nouns for caption in captions)


def test_a_covered_picture_shows_nothing_but_leaves(tmp_path: Path) -> None:
    manifest = tiny(tmp_path, covered=1.0, image_size=32).open()
    pixels = np.stack([np.asarray(Image.open(manifest.root / one)) for one in manifest.paths])
    means = pixels.reshape(len(pixels), -1, 3).mean(1)
    assert (means[:, 1] > means[:, 0]).all(), "green everywhere"
    assert (means[:, 1] > means[:, 2]).all()
    centred = pixels - pixels.mean((1, 2), keepdims=True)
    labels = np.asarray([row["labels"][0] for row in manifest.rows.to_pylist()])
    between = np.stack([centred[labels == c].mean(0) for c in np.unique(labels)])
    size = np.bincount(labels).min()
    assert between.std() < 1.5 * centred.std() / size**0.5, "classes differ by chance alone"


def test_rare_things_bring_their_company_along() -> None:
    def things(company: float, domain: str = "meadow") -> list[set[int]]:
        garden = make_garden(
            {"num_species": 40, "task": "multi_label", "domain": domain, "imbalance": 5.0,
             "num_captions": 0, "covered": 0.0, "vague": 0.0, "company": company, "seed": 0}
        )  # fmt: skip
        return [set(garden.scene(index, 0)[0].objects) for index in range(300)]

    triples = [companions(thing) for thing in range(8, 16)]
    assert len({frozenset(triple) for triple in triples}) == 8
    assert not any(companions(thing) for thing in range(8))
    before, always, mostly = things(0.0), things(1.0), things(0.7)
    brought, possible = 0, 0
    for without, found, some in zip(before, always, mostly, strict=True):
        company = {other for thing in without for other in companions(thing)} - without
        assert found == without | company
        assert without <= some <= found
        brought, possible = brought + len(some - without), possible + len(company)
    assert 0.65 < brought / possible < 0.85, "some are companions of two"
    sun = [name for name, _, _ in OBJECTS].index("sun")
    assert any(sun in one for one in always)
    assert not any(sun in one for one in things(1.0, "night"))
    with pytest.raises(ValidationError, match=r"company 0\.5 needs task=multi_label"):
        GardenConfig(company=0.5)


def test_options_that_change_nothing_leave_a_garden_where_it_is(tmp_path: Path) -> None:
    """Caches made before there were such options go on fitting."""
    assert tiny(tmp_path).open().paths[0].startswith("meadow-single_label-2907c99c7c/")


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garden_module, "_ALONE", 0)
    monkeypatch.setattr(garden_module, "image_path", lambda index: f"elsewhere/{index}.jpg")
    with pytest.raises(DatasetError, match=r"drawing stopped: .*images/000") as error:
        tiny(tmp_path, num_workers=2).open()
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_row_of_options_draws(tmp_path: Path) -> None:
    species = make_species(48)
    garden = make_garden(
        {"num_species": 48, "task": "single_label", "domain": "meadow", "imbalance": 1.0,
         "num_captions": 1, "covered": 0.0, "vague": 0.0, "company": 0.0,
         "seed": 0}
    )  # fmt: skip
    for one in species[::3]:
        by_mode = {}
        for index in range(20):
            mode = garden.scene(index, one.index)[0].subjects[0].mode
            by_mode.setdefault(mode, draw_image(garden, index, one.index, 16))
        assert set(by_mode) == {0, 1}
        assert all(np.asarray(image).std() > 4 for image in by_mode.values())


def test_imbalance_thins_training_and_leaves_the_rest_even(tmp_path: Path) -> None:
    manifest = tiny(tmp_path, num_images=400, imbalance=20, image_size=16).open()
    counts = np.sort(manifest.classes["count"].to_numpy())
    assert counts.sum() == 280
    assert 12 < counts[-1] / counts[0] < 25
    labels = manifest.label_values[np.asarray(manifest.splits, dtype=object) == "test"]
    assert np.ptp(np.bincount(labels, minlength=6)) <= 1


def test_the_rarest_species_has_one_training_image(tmp_path: Path) -> None:
    assert tiny(tmp_path, imbalance=10000).open().classes["count"].min() == 1


def test_multi_label_has_a_long_tail_and_no_sun_at_night(tmp_path: Path) -> None:
    options = {"task": "multi_label", "num_images": 450, "num_species": 40}
    manifest = tiny(tmp_path, **options, num_workers=1).open()
    names = manifest.classes["name"].tolist()
    counts = manifest.classes["count"].to_numpy()
    assert manifest.task == "multi_label"
    assert names[-len(OBJECTS) :] == [name for name, _, _ in OBJECTS]
    assert counts.max() > 30 * counts.min()
    night = tiny(tmp_path, **options, domain="night", num_workers=1).open()
    assert night.classes["name"].tolist() == names
    assert night.classes["count"][names.index("sun")] == 0 < counts[names.index("sun")]


def test_night_is_darker(tmp_path: Path) -> None:
    means, identities = {}, []
    for domain in ("meadow", "night"):
        manifest = tiny(tmp_path, domain=domain, num_captions=0).open()
        identities.append(manifest.identity)
        pictures = [np.asarray(Image.open(manifest.root / path)) for path in manifest.paths]
        means[domain] = np.mean(pictures)
    assert means["night"] < 0.6 * means["meadow"]
    assert identities[0] != identities[1]  # though ids, labels and captions are the same


def test_colours_tell_more_than_chance_and_genera_more_than_species(tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    manifest = GardenConfig(root=tmp_path, num_images=700, num_species=24, image_size=24).open()
    pictures = [Image.open(manifest.root / path).resize((8, 8)) for path in manifest.paths]
    features = np.stack([np.asarray(image, np.float32).ravel() for image in pictures])
    labels = manifest.label_values
    train = np.asarray(manifest.splits, dtype=object) == "train"
    predicted = (
        KNeighborsClassifier(5).fit(features[train], labels[train]).predict(features[~train])
    )
    genera = manifest.classes["genus"].to_numpy()
    species_right = np.mean(predicted == labels[~train])
    genus_right = np.mean(genera[predicted] == genera[labels[~train]])
    assert 3 / 24 < species_right < 0.6
    assert genus_right > species_right + 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.6, "test_fraction": 0.4}, r"val_fraction 0\.6 and test_fraction 0\.4"),
        ({"num_species": 1}, "greater than or equal to 2"),
        ({"domain": "desert"}, "'meadow' or 'night'"),
    ],
)
def test_illegal_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(tmp_path, **options)


def test_more_species_than_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="num_images 60 leaves 42 training images for 50"):
        tiny(tmp_path, num_species=50).open()


def test_the_worker_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, featcache.garden.worker; "
        "print([m for m in ('torch', 'pydantic', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_contact_sheet(tmp_path: Path) -> None:
    manifest = tiny(tmp_path).open()
    sheet = contact_sheet(
        manifest, tmp_path / "new" / "sheet.png", num_rows=3, num_columns=4, tile=20
    )
    with Image.open(sheet) as image:
        assert image.size == (40 + 4 * 24 + 4, 3 * 24 + 4)
        assert np.asarray(image)[:, 44:].std() > 10


def test_a_taxonomy_labels_the_same_pictures_three_times(tmp_path: Path) -> None:
    one = tiny(tmp_path, num_species=12, imbalance=10.0).manifest()
    several = tiny(tmp_path, num_species=12, imbalance=10.0, task="taxonomy").manifest()
    assert several.paths == one.paths, "drawn once"
    assert several.task == "multi_label"
    names, levels = list(several.classes["name"]), list(several.classes["level"])
    assert len(set(names)) == len(names)
    for row, own in zip(one.rows.to_pylist(), several.rows.to_pylist(), strict=True):
        species = one.classes.iloc[row["labels"][0]]
        found = [(levels[c], names[c]) for c in own["labels"]]
        assert found == [(level, species[level]) for level in ("name", "genus", "family")]
    long_tailed = tiny(tmp_path, num_images=200, task="taxonomy").manifest().classes
    counts = long_tailed["count"][long_tailed["level"] == "name"]
    assert counts.max() > 30 * counts.min(), "imbalance 100 unless another is given"
