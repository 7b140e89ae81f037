"""Tiny float checkpoints with a tokenizer of one token a character."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the checkpoints of tests/golden."""

    def make(form: str) -> Path:
        folder = tmp_path / "sources" / form
        shutil.copytree(GOLDEN / form, folder)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:64]
        tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.fixture
def source(with_tokenizer: Callable[[str], Path]) -> Path:
    """Qwen3.5 with experts."""
    return with_tokenizer("hf_text_f32")
