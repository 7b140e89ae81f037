"""flashmoe bench: what it counts, that it alternates with a peer, and what it says when something is missing."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bench.measure import BenchOptions, measure, profile
from flashmoe.bench.peer import Peer
from flashmoe.cli import main
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.workbench import Workbench
from flashmoe.errors import ConfigError

FAST = ["--prompt", "5", "--context", "3", "--tokens", "2", "--repeats", "2"]


@pytest.fixture
def peer(tmp_path: Path) -> Peer:
    """A program that answers as llama-bench does and writes down how it was called."""
    program, model = tmp_path / "llama-bench", tmp_path / "model.gguf"
    program.write_text(
        f"""#!{sys.executable}
import json, sys
open({str(tmp_path / "calls")!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
prompts = sys.argv[sys.argv.index("-p") + 1]
print(json.dumps([{{"n_prompt": int(n), "avg_ts": 7.0}} for n in prompts.split(",")]))
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    model.write_bytes(b"GGUF")
    return Peer(program, model)


@pytest.fixture
def bench(demo_bundle: Path) -> Any:
    with Engine.open(demo_bundle, EngineOptions(context=64)) as engine:
        yield Workbench(engine)


def test_results_name_speed_and_bound(bench: Workbench) -> None:
    results = measure(bench, BenchOptions(prompts=[4, 9], contexts=[0, 20], tokens=2, repeats=3))
    assert [row["name"] for row in results] == ["decode at 0", "decode at 20", "prefill 4", "prefill 9"]
    for row in results:
        speed, share = row["tok_s"], row["share_of_bound"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
        assert 0 < share["low"] <= share["high"]
        assert row["rate"] == pytest.approx(speed["median"] * row["work_per_token"])
        assert row["drive_bytes_read"] == 0  # everything is in memory before the first measurement
        assert "peer_tok_s" not in row


def test_what_a_token_reads_and_multiplies(bench: Workbench) -> None:
    """Counted from the configuration, by hand."""
    config = bench.engine._parts.model.config
    h, experts, k = config.hidden_size, config.num_experts, config.num_experts_per_tok
    each = 0
    for layer in range(config.num_hidden_layers):
        each += (
            3 * h * (k * config.moe_intermediate_size + config.shared_expert_intermediate_size) + experts * h
        )
        if config.is_linear(layer):
            keys = config.linear_num_key_heads * config.linear_key_head_dim
            values = config.linear_num_value_heads * config.linear_value_head_dim
            each += h * (2 * keys + 3 * values + 2 * config.linear_num_value_heads)
        else:
            width = config.num_attention_heads * config.head_dim
            each += h * (3 * width + 2 * config.num_key_value_heads * config.head_dim)
    assert bench.multiply_adds() == (each, config.vocab_size * h)
    attention = sum(not config.is_linear(layer) for layer in range(config.num_hidden_layers))
    keys_and_values = 2 * attention * config.num_key_value_heads * config.head_dim * 2
    assert bench.step_nbytes(30) - bench.step_nbytes(10) == 20 * keys_and_values


def test_a_filled_context_goes_on_where_a_prompt_would(bench: Workbench) -> None:
    bench.fill_context(40)
    assert np.isfinite(bench.engine.feed([1, 2], "last")).all()
    assert bench.engine._parts.states[0].position == 42
    with pytest.raises(ConfigError, match="context of 64"):
        bench.fill_context(64)


def test_profile_adds_up(bench: Workbench) -> None:
    report = profile(bench, 3)
    native = sum(report["operations"].values())
    assert 0 < native < report["seconds_per_token"]
    assert report["python_share"] == pytest.approx(1 - native / report["seconds_per_token"])
    assert {"linear", "routed_ffn", "attention"} <= set(report["operations"])
    assert bench.engine._parts.ops.linear.__qualname__ != "_timed.<locals>.timed"


def test_the_peer_runs_between_repetitions(bench: Workbench, peer: Peer, tmp_path: Path) -> None:
    heard: list[str] = []
    results = measure(bench, BenchOptions([4, 9], [0], tokens=2, repeats=2), peer, heard.append)
    assert [text for text in heard if not text.startswith("warming")] == [
        f"{name}, {i} of 2" for i in (1, 2) for name in ("decode at 0", "prefill 4", "prefill 9", "llama.cpp")
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4
    assert "-p 4,9 -n 0" in calls[1]
    for row in results:
        assert row["peer_tok_s"]["median"] == 7
        assert row["ratio_to_peer"]["median"] == pytest.approx(row["tok_s"]["median"] / 7, rel=0.5)


@pytest.mark.parametrize(
    "script", ["print('no json')", "print('[{}]')", "import sys; sys.exit('out of memory')"]
)
def test_a_peer_that_fails_is_an_error(peer: Peer, script: str) -> None:
    peer.program.write_text(f"#!{sys.executable}\n{script}\n")
    with pytest.raises(ConfigError, match="llama-bench"):
        peer.run([4], 2, [], 1)


def test_the_command_reports_appends_and_draws(
    demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, results = tmp_path / "plot.png", tmp_path / "new" / "results.jsonl"
    assert main(["bench", *FAST, "--profile", "--plot", str(plot), "--results", str(results)]) == 0
    out = capsys.readouterr().out
    for text in ("decode at 3", "prefill 5", "GB/s", "TOPS", "Python, binding"):
        assert text in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", str(demo_bundle), *FAST, "--json", "--results", str(results)]) == 0
    shown = json.loads(capsys.readouterr().out)
    first, second = map(json.loads, results.read_text().splitlines())
    assert shown == second
    assert first["options"] == {"prompts": [5], "contexts": [3], "tokens": 2, "repeats": 2}
    assert shown["machine"]["threads"] >= 1
    assert shown["read_bandwidth"] > 0 < shown["int8_peak"]


def test_a_shape_is_made_for_the_occasion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((Path(__file__).parents[1] / "golden" / "mlx_q4" / "config.json").read_text())
    (config.get("text_config") or config)["vocab_size"] = 300  # room for bytes and special tokens
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "config.json", "--layers", "2", *FAST]) == 0
    assert "2 layers" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer-bench", "x"], "--peer-model"),
        (["--peer-bench", "/nowhere/llama-bench", "--peer-model", "/nowhere/x.gguf"], "docs/benchmarks.md"),
        (["--layers", "2"], "config.json"),
        (["/nowhere/bundle"], "/nowhere/bundle"),
        (["--plot", "/nowhere/plot.png"], "/nowhere/plot.png"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, *FAST]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plots_without_matplotlib_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["bench", *FAST, "--plot", str(tmp_path / "x.png")]) == 1
    assert "flashmoe[bench]" in capsys.readouterr().err
