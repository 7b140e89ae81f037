"""flashmoe bench warm-start: both kinds of start do the same work to the bit, and the warm one begins with hits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe.bench.warm_start import WarmStartOptions, compare
from flashmoe.cli import main


def test_a_warm_start_fills_slots_and_changes_no_bit(demo_bundle: Path) -> None:
    wanted = WarmStartOptions(str(demo_bundle), None, tokens=4, idle_seconds=1.0, expert_slots=60)
    notes: list[str] = []
    cold, warm = compare(wanted, teach=8, repeats=1, note=notes.append)
    assert [cold["start"], warm["start"]] == ["cold", "warm"]
    assert len(notes) == 3
    assert cold["filled_slots"] == 0 < warm["filled_slots"] <= warm["slots"] == 60
    assert cold["logits_xxh3"] == warm["logits_xxh3"]
    assert warm["peak_memory_bytes"] <= warm["memory_bytes"]
    other = replace(wanted, seed=5)
    assert compare(other, teach=1, repeats=1, note=notes.append)[0]["logits_xxh3"] != cold["logits_xxh3"]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    words = ["--memory", "260MiB", "--tokens", "2", "--teach", "2", "--idle", "0.1", "--repeats", "1"]
    assert main(["bench", "warm-start", *words, "--json", "--results", str(results)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(results.read_text()) == report
    assert [run["start"] for run in report["runs"]] == ["cold", "warm"]
    assert main(["bench", "warm-start", *words]) == 0
    assert "all starts gave the same logits" in capsys.readouterr().out
