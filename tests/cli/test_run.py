"""`flashmoe run` over a scripted engine: arguments, streamed text, JSON, the closing line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe.cli import demo, main
from flashmoe.cli.run import closing_line

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
CLOSING = (
    "8.00 tok/s (80% of the 10.00 tok/s bound), hit rate 75.0%, 2.000 GB read, "
    "peak memory 1.00 GiB of a 2.00 GiB budget"
)


@pytest.fixture
def model(engine: Any, write_json: Any) -> Any:
    """The scripted engine with a chat template and the answer "héy"."""
    write_json("tokenizer_config.json", {"chat_template": TEMPLATE})
    from flashmoe.engine.tokenizer import TextTokenizer

    engine.answer = TextTokenizer.open(engine.bundle.path).encode("héy")
    engine.text_of = TextTokenizer.open(engine.bundle.path).decode
    return engine


def run(model: Any, *arguments: str) -> int:
    return main(["run", str(model.bundle.path), *arguments])


def test_text_goes_to_stdout_and_one_line_to_stderr(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "Hi") == 0
    out, err = capsys.readouterr()
    assert out == "héy\n"
    assert err == f"{CLOSING}\n"
    assert model.text_of(model.prompt) == "[user]Hi>"
    assert model.closed


def test_json_is_exactly_one_object(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "Hi", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert list(report) == ["text", "token_ids", "finish_reason", "stats"]
    assert (report["text"], report["token_ids"], report["finish_reason"]) == ("héy", model.answer, "length")
    assert set(report["stats"]) == {
        "decode_tok_s",
        "prefill_tok_s",
        "bound_tok_s",
        "hit_rate",
        "bytes_read",
        "peak_memory_bytes",
        "budget_bytes",
    }
    assert err == ""


def test_another_number_of_experts_is_said_twice(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "Hi", "--json", "--experts-per-token", "2") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["experts_per_token"], report["lossy"]) == (2, True)
    assert err == "flashmoe: lossy: 2 experts per token instead of the model's own 4\n"


def test_an_int8_cache_is_named(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "Hi", "--kv-cache", "int8", "--json") == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["kv_cache"], err) == ("int8", "flashmoe: lossy: keys and values in 8 bits\n")


def test_the_models_own_number_of_experts_is_not_lossy(
    model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "Hi", "--json", "--experts-per-token", "4") == 0
    out, err = capsys.readouterr()
    assert "lossy" not in out + err


def test_raw_and_system(model: Any) -> None:
    run(model, "Hi", "--raw")
    assert model.text_of(model.prompt) == "Hi"
    run(model, "Hi", "--system", "Be brief.")
    assert model.text_of(model.prompt) == "[system]Be brief.[user]Hi>"


def test_options_may_stand_anywhere(model: Any) -> None:
    path = str(model.bundle.path)
    assert main(["run", "--memory", "1GiB", path, "--seed", "3", "Hi", "--threads", "1"]) == 0
    assert (model.options.memory_bytes, model.options.threads, model.params.seed) == (1 << 30, 1, 3)
    assert model.text_of(model.prompt) == "[user]Hi>"


def test_a_prompt_may_begin_with_a_dash(model: Any) -> None:
    assert main(["run", str(model.bundle.path), "--raw", "--", "-5 + 3 ="]) == 0
    assert model.text_of(model.prompt) == "-5 + 3 ="


def test_the_prompt_may_come_from_stdin(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("long\ntext"))
    assert run(model, "-", "--raw") == 0
    assert model.text_of(model.prompt) == "long\ntext"


def test_sampling_options_override_the_models_defaults(model: Any) -> None:
    given = "--temperature 0.5 --top-p 0.8 --min-p 0.1 --presence-penalty 1 --frequency-penalty 0.5"
    run(model, "Hi", *given.split(), "--repetition-penalty", "1.1", "--seed", "7", "--max-tokens", "9")
    params = model.params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 20, 0.8, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, 0.5, 1.1)
    assert (params.seed, params.max_tokens) == (7, 9)


def test_machine_options_reach_the_engine(model: Any) -> None:
    run(
        model,
        "Hi",
        "--context",
        "99",
        "--io",
        "buffered",
        "--activations",
        "f32",
        "--expert-slots",
        "50%",
        "--kv-cache",
        "int8",
        "--verify-reads",
        "--experts-dir",
        "/a",
        "--experts-dir=/b",
    )
    options = model.options
    assert (options.context, options.io, options.activations) == (99, "buffered", "f32")
    assert (options.expert_slots, options.kv_cache, options.verify_reads) == (8, "int8", True)
    assert options.experts_dirs == (Path("/a"), Path("/b"))


def test_ctrl_c_keeps_what_was_shown(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Iterator[int]:
        yield model.answer[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate_ids", interrupted)
    assert run(model, "Hi") == 130
    assert capsys.readouterr() == ("h\n", "flashmoe: interrupted\n")
    assert model.closed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "b", "c"],
        ["x", "--memory", "lots"],
        ["x", "--max-tokens", "0"],
        ["x", "--temperature", "nan"],
        ["x", "--seed", "-1"],
        ["x", "--io", "psychic"],
        ["x", "--expert-slots", "0%"],
        ["x", "--activations", "f64"],
        ["x", "--kv-cache", "int4"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    assert "flashmoe run: error:" in capsys.readouterr().err


def test_a_value_out_of_range_is_one_line(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "Hi", "--temperature", "-1") == 1
    err = capsys.readouterr().err
    assert err.startswith("flashmoe: error: ")
    assert err.count("\n") == 1


def test_without_a_bundle_the_demo_model_is_needed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "lib" / "python" / "flashmoe" / "__init__.py"
    monkeypatch.setattr(demo.flashmoe, "__file__", str(package))
    assert main(["run", "Hi"]) == 1
    err = capsys.readouterr().err
    assert "no demo model at" in err
    assert "name a bundle" in err


def test_a_missing_bundle_names_its_path(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "nowhere"), "Hi"]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in err
    assert err.count("\n") == 1


def test_a_single_token_has_no_speed() -> None:
    stats = {"decode_tok_s": None, "bound_tok_s": None, "hit_rate": None, "bytes_read": 0}
    line = closing_line(stats | {"peak_memory_bytes": 1 << 20, "budget_bytes": 1 << 30})
    assert line == "0.000 GB read, peak memory 1.0 MiB of a 1.00 GiB budget"


def test_the_closing_line_says_what_decided_a_budget_nobody_named() -> None:
    stats = {"decode_tok_s": None, "bound_tok_s": None, "hit_rate": None, "bytes_read": 0}
    stats |= {"peak_memory_bytes": 1 << 20, "budget_bytes": 1 << 30, "budget_reason": "the machine has 2 GiB"}
    assert closing_line(stats).endswith("a 1.00 GiB budget (auto: the machine has 2 GiB)")


def test_memory_may_be_auto(demo_bundle: Any) -> None:
    def run(memory: str) -> subprocess.CompletedProcess[str]:
        # A process of its own: a budget counts what the process holds, and here that is what other tests left.
        command = [
            str(Path(sys.executable).with_name("flashmoe")),
            "run",
            "Hello",
            "--memory",
            memory,
            "--max-tokens",
            "2",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    auto, named = run("auto"), run("500MiB")
    assert (auto.returncode, named.returncode) == (0, 0), auto.stderr + named.stderr
    assert "(auto: " in auto.stderr
    assert "(auto: " not in named.stderr
    assert run("some").returncode == 2


def test_the_demo_model_speaks(demo_bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--max-tokens", "4", "--temperature", "0", "--expert-slots", "25%"]
    assert main(["run", "Hello", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 1 <= len(report["token_ids"]) <= 4
    assert report["finish_reason"] in ("stop", "length")
    assert report["stats"]["bytes_read"] > 0
    assert report["stats"]["peak_memory_bytes"] > 0
