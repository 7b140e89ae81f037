"""Warm start of a whole engine: same bits, same slots, and files that are ignored with a notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.warming import usage_path

SLOTS = 60


def run(bundle: Path, usage_file: Any, tokens: int = 24, wait: bool = False) -> tuple[Any, Any, str]:
    """(logits, counters of the first token, notice)."""
    ids = json.loads((bundle / "golden.json").read_text())["long"]["ids"][:tokens]
    engine = Engine.open(
        bundle, EngineOptions(expert_slots=SLOTS, usage_file=usage_file, context=256, lookahead="off")
    )
    with engine:
        if wait and engine._parts.warming._reading is not None:
            engine._parts.warming._reading._thread.join(20)
        before = engine.cache_stats()
        rows = [engine.feed(ids[:1])]
        first = engine.cache_stats().since(before)
        rows += [engine.feed([token]) for token in ids[1:]]
        assert engine.plan.slots == SLOTS
    return np.concatenate(rows), first, engine.notice


def test_a_second_start_hits_at_once_with_the_same_bits(demo_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "usage"
    cold, first_cold, notice = run(demo_bundle, file)
    assert notice == ""
    assert first_cold.total.hits == 0
    warm, first_warm, notice = run(demo_bundle, file, wait=True)
    assert notice == ""
    assert first_warm.total.hits > 0
    assert np.array_equal(cold, warm)
    racing, _, _ = run(demo_bundle, file)
    assert np.array_equal(cold, racing)


def test_off_reads_and_writes_nothing(demo_bundle: Path, cache_dir: Path) -> None:
    _, _, notice = run(demo_bundle, "off", tokens=2)
    assert notice == ""
    assert not (cache_dir / "flashmoe" / "usage" / "off").exists()


def test_auto_is_in_the_cache_directory(cache_dir: Path) -> None:
    assert usage_path("auto", "abc") == cache_dir / "flashmoe" / "usage" / "abc"
    assert usage_path("off", "abc") is None


def test_a_damaged_file_is_ignored_and_replaced(demo_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "usage"
    run(demo_bundle, file, tokens=2)
    whole = len(file.read_bytes())
    file.write_bytes(file.read_bytes()[:-5])
    _, first, notice = run(demo_bundle, file, tokens=2)
    assert f"{file}: usage counts were not used (is damaged): they begin anew" == notice
    assert first.total.hits == 0
    assert len(file.read_bytes()) == whole


@pytest.mark.parametrize("kind", ["letter", "directory"])
def test_what_is_not_ours_is_left_alone(demo_bundle: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "usage"
    if kind == "letter":
        file.write_text("Dear aunt")
    else:
        file.mkdir()
    _, _, notice = run(demo_bundle, file, tokens=2)
    assert notice.startswith(f"{file}: usage counts were not used (")
    assert notice.endswith(": name another --usage-file")
    assert file.is_dir() if kind == "directory" else file.read_text() == "Dear aunt"


def test_a_file_of_another_bundle_is_left_alone(demo_bundle: Path, tmp_path: Path) -> None:
    from flashmoe.store.usage import UsageCounts

    file = tmp_path / "usage"
    UsageCounts({0: 4}).save(file, "another")
    before = file.read_bytes()
    _, _, notice = run(demo_bundle, file, tokens=2)
    assert "belongs to another bundle" in notice
    assert file.read_bytes() == before


def test_a_directory_that_cannot_be_written_costs_the_counts_only(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, _, notice = run(demo_bundle, tmp_path / "file" / "usage", tokens=2)
    assert "usage counts were not saved" in notice
