"""The sweep's table holds what convert and eval give for each form alone; what it cannot vary is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe.cli import main
from flashmoe.convert import convert
from flashmoe.evaluation.sweep import default_experts

HOW = ["--window", "32", "--limit", "3"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(33 + 7 * i % 60) for i in range(150)), encoding="utf-8")
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_row_is_that_bundle_measured_alone(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "room").mkdir()
    sweep = ["--sweep", "bits,experts-per-token", "--bits", "8", "--bits", "3", "--experts", "2,1"]
    machine = ["--temporary", str(tmp_path / "room"), "--repeats", "1", "--plot", str(tmp_path / "plot.png")]
    report = run(capsys, str(source), *sweep, *machine, "--text", str(text), *HOW)
    rows = report["variants"]
    assert [(row["bits"], row["experts_per_token"]) for row in rows] == [
        ("8", 2),
        ("8", 1),
        ("3", 2),
        ("3", 1),
    ]
    assert (rows[0]["mean_kl"], rows[0]["max_kl"], rows[0]["same_top"]) == (0, 0, 1)
    assert all(row["mean_kl"] > 0 for row in rows[1:])
    assert list((tmp_path / "room").iterdir()) == []
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    whole = convert(source, tmp_path / "b8", bits="8")
    for bits in ("8", "3"):
        bundle = whole if bits == "8" else convert(source, tmp_path / "b3", bits=bits)
        for experts in (2, 1):
            row = next(r for r in rows if (r["bits"], r["experts_per_token"]) == (bits, experts))
            few = ["--experts-per-token", str(experts)]
            alone = run(capsys, str(bundle.path), "--text", str(text), *HOW, *few)["text"]
            assert row["nbytes"] == bundle.nbytes
            assert row["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-9)
            assert row["positions"] == alone["scored_tokens"]
    assert len({row["token_nbytes"] for row in rows}) == 4
    assert report["text"]["xxh3"] == alone["xxh3"]


def test_the_fit_and_one_axis(source: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--sweep", "bits", "--bits", "8", "--bits", "2", "--repeats", "1", "--text", str(text), *HOW]
    squares = run(capsys, str(source), *common)["variants"]
    plain = run(capsys, str(source), *common, "--fit", "range")["variants"]
    assert [row["experts_per_token"] for row in squares] == [2, 2]
    assert squares[0]["perplexity"] == plain[0]["perplexity"], "at eight bits the fit makes no difference"
    assert squares[1]["perplexity"] != plain[1]["perplexity"]
    assert main(["eval", str(source), *common]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| bits | experts a token |")
    assert sum(line.startswith(("| 8 | 2 |", "| 2 | 2 |")) for line in lines) == 2


@pytest.mark.parametrize(
    ("options", "status", "word"),
    [
        (["--sweep", "bits"], 2, "give --text"),
        (["--sweep", "experts-per-token", "--bits", "4", "--bits", "3"], 1, "--sweep does not vary them"),
        (["--sweep", "bits", "--experts", "2,1"], 1, "--sweep does not vary them"),
        (["--sweep", "bits", "--bits", "8", "--bits", "5"], 1, "bits are not offered"),
    ],
)
def test_refusals_come_before_any_work(
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    word: str,
) -> None:
    (tmp_path / "room").mkdir()
    told = [] if status == 2 else ["--text", str(text)]
    assert main(["eval", str(source), "--temporary", str(tmp_path / "room"), *options, *told]) == status
    assert word in capsys.readouterr().err
    assert list((tmp_path / "room").iterdir()) == []


def test_an_unknown_axis_is_a_usage_error(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(source), "--sweep", "bits,layers"]) == 2
    assert "is not made of" in capsys.readouterr().err


def test_the_experts_that_are_tried_without_a_word() -> None:
    assert default_experts(4) == [4, 3, 2, 1]
    assert default_experts(10) == [10, 5, 4, 3, 2, 1]
    assert default_experts(1) == [1]
