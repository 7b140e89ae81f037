"""Scores against what a few lines of numpy give from the engine's own logits, on the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.chat.llm import LLM
from flashmoe.cli import main
from flashmoe.errors import ConfigError
from flashmoe.evaluation.answers import json_validity, tool_success
from flashmoe.evaluation.choices import choice_accuracy
from flashmoe.evaluation.divergence import LiveReference, divergence
from flashmoe.evaluation.perplexity import perplexity
from flashmoe.evaluation.windows import Window, cut

TEXT = (
    "Once upon a time there was a mouse who lived in a small house. It was brave, and its house was warm. "
    * 2
)


@pytest.fixture(scope="module")
def llm(demo_bundle: Path) -> Iterator[LLM]:
    """Blocks of 8 rows, so that windows take several."""
    with LLM(demo_bundle, context=512, logit_rows=8) as opened:
        yield opened


@pytest.fixture(scope="module")
def windows(llm: LLM) -> list[Window]:
    return list(cut(llm.tokenizer.encode(TEXT), 24, 10))


def log_probabilities(llm: LLM, ids: list[int]) -> Any:
    logits = llm.engine.logits(ids).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_perplexity(llm: LLM, windows: list[Window]) -> None:
    losses = []
    for window in windows:
        logs = log_probabilities(llm, window.ids)
        losses += [-logs[i - 1, window.ids[i]] for i in range(window.first_scored, len(window.ids))]
    seen: list[tuple[int, int]] = []
    result = perplexity(llm.engine, windows, lambda done, total: seen.append((done, total)))
    assert result.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    assert (result.scored_tokens, result.windows) == (len(losses), len(windows))
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == len(windows)


def test_divergence(llm: LLM, windows: list[Window], demo_bundle: Path) -> None:
    with LLM(demo_bundle, context=512, activations="f32", logit_rows=5) as reference:
        found = divergence(llm.engine, LiveReference(reference.engine), windows[:2])
        kl, same = [], []
        for window in windows[:2]:
            own, better = (
                log_probabilities(m, window.ids)[window.first_scored - 1 : -1] for m in (llm, reference)
            )
            kl += list((np.exp(better) * (better - own)).sum(axis=1))
            same += list(own.argmax(axis=1) == better.argmax(axis=1))
    assert found.mean_kl == pytest.approx(np.mean(kl), rel=1e-5)
    assert found.max_kl == pytest.approx(np.max(kl), rel=1e-5)
    assert (found.same_top, found.positions) == (pytest.approx(np.mean(same)), len(kl))
    assert 0 < found.mean_kl < 0.05


def test_nothing_diverges_from_itself(llm: LLM, windows: list[Window]) -> None:
    found = divergence(llm.engine, LiveReference(llm.engine), [Window(windows[0].ids[:8], 1)])
    assert (found.max_kl, found.same_top) == (0.0, 1.0)


def write(file: Path, *tasks: object) -> Path:
    file.write_text("".join(json.dumps(task) + "\n\n" for task in tasks))
    return file


def test_choices_are_scored_as_continuations(llm: LLM, tmp_path: Path) -> None:
    prompt, choices = "Once upon a ", ["time", "xylophone"]
    sums = []
    for choice in choices:
        ids = llm.tokenizer.encode(prompt + choice)
        first = len(llm.tokenizer.encode(prompt.rstrip()))
        logs = log_probabilities(llm, ids)
        sums.append(sum(logs[i - 1, ids[i]] for i in range(first, len(ids))))
    assert sums[0] > sums[1]  # any model of English agrees
    tasks = [{"prompt": prompt, "choices": choices, "answer": answer} for answer in (0, 0, 1)]
    report = choice_accuracy(llm, write(tmp_path / "q.jsonl", *tasks))
    assert (report.questions, report.chance) == (3, 0.5)
    assert report.accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "choices"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer"),
        ("", "no task"),
    ],
)
def test_bad_questions_are_named(llm: LLM, tmp_path: Path, line: str, word: str) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=word) as caught:
        choice_accuracy(llm, tmp_path / "q.jsonl")
    assert "q.jsonl" in str(caught.value)


def test_json_is_whole_or_cut(llm: LLM, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    long = {"type": "object", "properties": {"a": {"const": "x" * 200}}, "required": ["a"]}
    tasks = [{"prompt": "Is water wet?", "schema": s} for s in (schema, long)]
    report = json_validity(llm, write(tmp_path / "j.jsonl", *tasks), max_tokens=16)
    assert (report.tasks, report.valid_held) == (2, 0.5)


def test_tool_calls_are_compared(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are scripted: what counts here is how they are judged."""
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    task = {"prompt": "Weather in Rome?", "tools": [tool], "name": "weather", "arguments": {"city": "Rome"}}

    def call(name: str, city: str) -> str:
        return f"<tool_call>\n<function={name}>\n<parameter=city>\n{city}\n</parameter>\n</function>\n</tool_call>"

    answers = iter([call("weather", "Rome"), call("weather", "Oslo"), call("clock", "Rome"), "It is warm."])

    class Answer:
        def __init__(self, text: str) -> None:
            self.token_ids = llm.tokenizer.encode(text, add_special_tokens=False)

    monkeypatch.setattr(llm, "generate", lambda *_: Answer(next(answers)))
    report = tool_success(llm, write(tmp_path / "t.jsonl", *[task] * 4))
    assert (report.any_call, report.right_name, report.exact) == (0.75, 0.5, 0.25)


def test_the_command_reports(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = ["eval", str(demo_bundle), "--text", str(tmp_path / "text"), "--window", "32", "--limit", "1"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert (found["scored_tokens"], found["windows"], found["bos"]) == (31, 1, None)
    assert main([*arguments, "--against", str(demo_bundle)]) == 0
    assert "same top token" in capsys.readouterr().out
    assert main(["eval", str(demo_bundle)]) == 2
    (tmp_path / "text").write_bytes(b"\xff")
    assert main(arguments) == 1
    assert "UTF-8" in capsys.readouterr().err
