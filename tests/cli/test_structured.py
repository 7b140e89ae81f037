"""`flashmoe run` with a form for the answer: the options, and what is wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flashmoe.cli import main

DEMO = ["run", "--context", "512", "--max-tokens", "150", "--temperature", "1", "--seed", "1"]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture
def schema_file(tmp_path: Path) -> str:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    return str(file)


@pytest.fixture
def grammar_file(tmp_path: Path) -> str:
    file = tmp_path / "grammar.lark"
    file.write_text('start: "ab" | "cd"')
    return str(file)


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert main([*DEMO, *options, "Hi"]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_each_form(capsys: pytest.CaptureFixture[str], schema_file: str, grammar_file: str) -> None:
    assert json.loads(answer(capsys, "--json-schema", schema_file))["n"] in (1, 2)
    assert answer(capsys, "--lark", grammar_file) in ("ab", "cd")
    assert answer(capsys, "--choice", "red,light green") in ("red", "light green")
    assert re.fullmatch(r"\d{3}", answer(capsys, "--regex", r"\d{3}"))
    assert re.fullmatch(r"(?s)[^.]+\.\s*yes", answer(capsys, "--choice", "yes", "--after", "."))


def test_a_report_says_how_it_ended(capsys: pytest.CaptureFixture[str], schema_file: str) -> None:
    report = json.loads(answer(capsys, "--json-schema", schema_file, "--json"))
    assert report["finish_reason"] == "stop"
    assert json.loads(report["text"])["n"] in (1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json-schema", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--json-schema", "{grammar}"], "is no JSON"),
        (["--choice", "a,,b"], "choice needs a list"),
        (["--regex", "("], "unclosed group"),
        (["--after", "</think>"], "--json-schema"),
        (["--json-object", "--after", ""], "1 to 64"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], grammar_file: str
) -> None:
    given = [option.replace("{grammar}", grammar_file) for option in options]
    assert main([*DEMO, *given, "Hi"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flashmoe: error: ")
    assert words in err
    assert err.count("\n") == 1


def test_two_forms_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, "--json-object", "--regex", "a", "Hi"]) == 2
    assert "not allowed with" in capsys.readouterr().err
