"""flashmoe bench stream: every budget does the same work to the bit, and tells what the drive had to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe.bench.stream import StreamOptions, measure_in_process
from flashmoe.cli import bench_stream, main
from flashmoe.errors import FlashmoeError


def test_budgets_differ_in_reads_only(demo_bundle: Path) -> None:
    wanted = StreamOptions(str(demo_bundle), None, warm=4, tokens=4, prompt=48)
    small, large = (measure_in_process(replace(wanted, expert_slots=slots)) for slots in (60, None))
    assert small["slots"] == 60 < large["slots"] == large["experts"]
    assert small["logits_xxh3"] == large["logits_xxh3"]
    assert small["decode"]["missed_bytes_per_token"] > 0 == large["decode_after"]["missed_bytes_per_token"]
    assert large["decode_after"]["hit_rate"] == 1.0
    for row in (small, large):
        assert row["peak_memory_bytes"] <= row["memory_bytes"]
        for kind in ("decode", "prefill", "decode_after"):
            assert row[kind]["share_of_bound"] > 0
            if kind != "prefill":
                assert row[kind]["share_of_bound"] <= row[kind]["share_of_reachable"]
            assert 0 <= row[kind]["stall_share"] < 1


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    words = ["--memory", "260MiB,400MiB", "--tokens", "2", "--warm", "1", "--repeats", "1"]
    assert main(["bench", "stream", *words, "--json", "--results", str(results)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(results.read_text()) == report
    assert report["same_logits"] is True
    assert [row["memory_bytes"] for row in report["results"]] == [260 << 20, 400 << 20]
    assert main(["bench", "stream", *words, "--prompt", "20"]) == 0
    table = capsys.readouterr().out
    assert "all budgets gave the same logits" in table
    assert "ms a layer" in table
    assert "memory at" in table
    assert "decode after" in table
    assert "reachable" not in table, "everything is in memory: no read can be foreseen or not"
    report["results"][0]["decode"]["missed_bytes_per_token"] = 1.0
    bench_stream._show(report)
    assert capsys.readouterr().out.count("reachable") == 1


def test_a_budget_that_cannot_work_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "stream", "--memory", "20MiB"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flashmoe: error: a memory budget of 20.0 MiB is too small")
    assert error.count("\n") == 1
    with pytest.raises(FlashmoeError, match="not a flashmoe bundle"):
        measure_in_process(StreamOptions("/nowhere", None))
