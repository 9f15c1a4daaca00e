"""Pictures and tables that compare runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heads import pictures
from heads.run_folder import RunError


def write_run(folder: Path, head: str, **metrics: float) -> Path:
    folder.mkdir(parents=True)
    values = {"metric": "top1", "seconds": 1.5, "num_parameters": 1234, "val": {"top1": 0.1}}
    (folder / "metrics.json").write_text(json.dumps(values | {"test": metrics}))
    record = {"kind": head, "cache": {"path": "cache/birds"}}
    (folder / "head.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    common = {"top5": 0.9, "num_rows": 100, "genus": 0.75, "family": 0.8}
    return [
        write_run(tmp_path / "a", "linear", top1=0.5, top1_head=0.6, top1_tail=0.4, **common),
        write_run(tmp_path / "b", "zero_shot", top1=0.25, top1_head=0.3, **common),
        write_run(tmp_path / "c", "linear", top1=0.125, **common),
    ]


def test_comparison_reads_the_test_rows(runs: list[Path]) -> None:
    records = pictures.comparison(runs)
    assert [record["top1"] for record in records] == [0.5, 0.25, 0.125]
    assert records[0]["split"] == "test"
    assert records[1]["cache"] == "birds"


def test_table_has_a_line_a_run_and_names_runs_of_one_kind_apart(runs: list[Path]) -> None:
    lines = pictures.comparison_table(runs).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        *("head", "split", "top-1", "top-5", "many-shot", "few-shot", "genus", "family"),
        *("trained", "seconds"),
    ]
    assert [line[0] for line in cells[2:]] == ["a", "zero_shot", "c"]
    assert cells[2][2:4] == ["50.00%", "90.00%"]
    assert cells[3][5] == "-"
    assert len({len(line) for line in lines}) == 1


def test_bars_show_every_run(runs: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "compare.png"
    pictures.compare_runs(runs, picture, "Birds")
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    for color in pictures.PALETTE[:3]:
        wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        assert (pixels == wanted).all(1).sum() > 500, f"no bar in {color}"
    assert not list(tmp_path.glob("*.partial"))


def test_curves_are_drawn_for_one_epoch_and_many(tmp_path: Path) -> None:
    history = [
        {"epoch": e, "loss": 10.0 / e, "lr": 1.0 / e, "val_top1": 1 - 1 / e} for e in range(1, 40)
    ]
    for number in (1, 39):
        picture = tmp_path / f"{number}.png"
        pictures.draw_curves(history[:number], picture, "t", "top1")
        assert np.asarray(Image.open(picture).convert("L")).std() > 5


def test_nothing_to_compare_is_refused(runs: list[Path], tmp_path: Path) -> None:
    multi = write_run(tmp_path / "m", "linear", map=0.5)
    with pytest.raises(RunError, match="all single-label or all multi-label"):
        pictures.compare_runs([runs[0], multi], tmp_path / "x.png")
    with pytest.raises(RunError, match="no such file"):
        pictures.comparison([tmp_path / "nowhere"])


def test_pyplots_global_state_is_left_alone() -> None:
    code = "import heads.pictures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
