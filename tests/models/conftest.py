"""Bundles of the tiny checkpoints of tests/golden, made when a test first asks and kept for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmoe.bundle.reader import Bundle
from flashmoe.bundle.verify import verify
from flashmoe.convert import convert

GOLDEN = Path(__file__).parents[1] / "golden"


class Bundles(dict[str, Path]):
    """Form -> folder of its bundle."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, form: str) -> Path:
        report = convert(GOLDEN / form, self._folder / form)
        assert report.unknown == []
        assert not verify(Bundle.open(report.path)).damaged
        return self.setdefault(form, report.path)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Of every form."""
    return Bundles(tmp_path_factory.mktemp("bundles"))
