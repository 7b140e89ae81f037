"""The cost of structured output: the synthetic vocabulary is a working tokenizer; the report has what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "structured_cost.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structured_cost", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vocabulary_is_extended_by_tokens_that_the_tokenizer_makes(
    tool: ModuleType, demo_bundle: Path
) -> None:
    spec = json.loads((demo_bundle / "tokenizer.json").read_text())
    known = len(spec["model"]["vocab"])
    larger = Tokenizer.from_str(json.dumps(tool.extended(spec, known + 3000)))
    assert larger.get_vocab_size() == known + 3000
    text = "Größe 日本語 한국 words"
    assert larger.decode(larger.encode(text).ids) == text
    made = [larger.decode([i]) for i in range(known, known + 3000)]
    assert sum("\ufffd" not in token for token in made) > 1500


def test_what_is_measured(tool: ModuleType, tmp_path: Path, demo_bundle: Path) -> None:
    made = tool.vocabulary(demo_bundle / "tokenizer.json", tmp_path)
    measured = tool.measure(made, 3, 30)
    assert len(measured["compiles"]) == 3
    assert 0 < len(measured["tokens"]) <= 3 * 29
    assert np.all(measured["tokens"] > 0)


def test_the_report_is_in_microseconds_and_milliseconds(tool: ModuleType) -> None:
    text = tool.report({"tokens": np.full(100, 25e-6), "compiles": np.full(2, 0.003)})
    assert "100 tokens of 2 schemas: median 25.0 us" in text
    assert "p99 25.0 us" in text
    assert "median 3.00 ms" in text
