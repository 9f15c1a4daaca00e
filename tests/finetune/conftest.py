from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def painted() -> None:
    """Asked for by tests that look at pictures: these are drawn, see `_blank_pictures`."""


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are set up, then saved blank: drawing them took half of a short training's time."""
    if "painted" in request.fixturenames:
        return
    save = Figure.savefig

    def savefig(self: Figure, file: Any, **options: Any) -> None:
        save(Figure((0.2, 0.2)), file, format=options.get("format"))

    monkeypatch.setattr(Figure, "savefig", savefig)
