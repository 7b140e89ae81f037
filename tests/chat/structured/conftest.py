"""The demo model's vocabulary, and how to walk a text through a constraint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.chat.structured import GrammarVocabulary
from flashmoe.engine.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def vocabulary(demo_bundle: Path) -> GrammarVocabulary:
    """The demo model's, padded by 100 ids."""
    tokenizer = TextTokenizer.open(demo_bundle)
    return GrammarVocabulary(tokenizer, tokenizer.vocab_size + 100)


@pytest.fixture(scope="session")
def allowed() -> Callable[[Any], set[int]]:
    """The ids in a constraint's mask."""

    def ids(constraint: Any) -> set[int]:
        return set(
            np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist()
        )

    return ids


@pytest.fixture(scope="session")
def walk(vocabulary: GrammarVocabulary, allowed: Callable[[Any], set[int]]) -> Callable[[Any, str], str]:
    """Feeds a text, longest allowed token first; returns what the constraint did not take."""
    tokens = vocabulary.tokenizer.token_bytes(vocabulary.vocab_size)
    by_bytes = {token: token_id for token_id, token in reversed(list(enumerate(tokens)))}

    def go(constraint: Any, text: str) -> str:
        rest = text.encode()
        while rest and not constraint.is_done:
            ids = allowed(constraint)
            fits = (by_bytes.get(rest[:n]) for n in range(min(len(rest), 32), 0, -1))
            token_id = next((token_id for token_id in fits if token_id in ids), None)
            if token_id is None:
                break
            constraint.accept(token_id)
            rest = rest[len(tokens[token_id]) :]
        return rest.decode(errors="replace")

    return go
