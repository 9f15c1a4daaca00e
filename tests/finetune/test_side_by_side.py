from pathlib import Path

import pytest

from finetune.tuning.side_by_side import Line, Stage, picture, table, write_page
from heads.compare import Difference


@pytest.fixture
def lines() -> list[Line]:
    gain = Difference(0.55, 0.5, 0.05, -0.01, 0.112, 0.09)
    return [
        Line("frozen", "top1", 0.2, None, 0.5, 0.51, None, 0, None, None),
        Line("lora", "top1", 0.4, 0.54, 0.55, 0.56, gain, 49152, 65.0, 10),
    ]


def test_table_has_gains_in_points_and_nothing_where_nothing_was_trained(
    lines: list[Line],
) -> None:
    header, rule, frozen, lora = table(lines).splitlines()
    assert len({len(row) for row in (header, rule, frozen, lora)}) == 1
    cells = [cell.strip() for cell in lora.strip("|").split("|")]
    assert cells[:5] == ["lora", "40.0%", "54.0%", "55.0%", "+5.0 [-1.0, +11.2]"]
    assert cells[5:7] == ["49,152", "10"]
    cells = [cell.strip() for cell in frozen.strip("|").split("|")]
    assert cells == ["frozen", "20.0%", "", "50.0%", "", "", "", ""]


def test_bars_are_as_long_as_the_figures_and_missing_ones_are_left_out(lines: list[Line]) -> None:
    (axes,) = picture(lines, "night").axes
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]  # type: ignore[attr-defined]
    assert widths == [[0.2, 0.4], [0.54], [0.5, 0.55]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["frozen", "lora"]
    assert {text.get_text() for text in axes.texts} == {"20.0%", "40.0%", "54.0%", "50.0%", "55.0%"}


def test_page_holds_table_picture_and_folders(lines: list[Line], tmp_path: Path) -> None:
    stages = [
        Stage("frozen", Path("r/frozen-zero_shot"), Path("r/frozen-linear")),
        Stage("lora", Path("r/lora-zero_shot"), Path("r/lora-linear"), Path("r/lora")),
    ]
    write_page(tmp_path / "page.html", lines, stages, "night <1>", "seed 0")
    text = (tmp_path / "page.html").read_text()
    assert "night &lt;1&gt;" in text
    assert "+5.0 [-1.0, +11.2]" in text
    assert "data:image/svg+xml;base64," in text
    for folder in ("r/frozen-linear", "r/lora-zero_shot", "r/lora<"):
        assert folder in text
