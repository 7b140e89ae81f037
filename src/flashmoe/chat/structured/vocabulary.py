"""A model's tokens as llguidance sees them: their bytes, which of them are no text, and which end an answer."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from flashmoe.engine.tokenizer import TextTokenizer
from flashmoe.errors import BundleError, StructureError

# Tokens that lie wholly in one of these are allowed or refused together, the inside of a JSON string above all.  The
# first two, beside llguidance's own, serve strings with a maximal length: p99 of a mask 2.2 to 1.6 ms.
_STRING = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(_STRING + times for times in ("{1,3}", "{1,6}", "{1,10}", "{1,30}", "+")),
]


class GrammarVocabulary:
    """The token trie over which masks are computed, built once per bundle.

    Immutable, so safe to share between threads.  248,320 tokens take 1.1 s and 52 MiB: only the bytes of the tokens
    are given to llguidance, for its own copy of the tokenizer would take 90 MiB more.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        """vocab_size: the model's, which may be padded beyond the tokenizer's; padding is never allowed.

        Raises StructureError when llguidance is not installed, BundleError when the tokenizer does not fit the model.
        """
        self.guidance = _import_guidance()
        if tokenizer.vocab_size > vocab_size:
            raise BundleError(
                f"tokenizer.json has {tokenizer.vocab_size} tokens and the model {vocab_size}: copy both from one model"
            )
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.stop_ids = frozenset(i for i in tokenizer.stop_ids if 0 <= i < vocab_size)
        self.marker_masks: dict[str, Any] = {}  # of StructuredOutput.after, kept here because they cost 0.5 s
        source = _TokenBytes(tokenizer, vocab_size)
        self.trie: Any = self.guidance.LLTokenizer(
            source, n_vocab=vocab_size, eos_token=source.eos_token_ids, slices=_SLICES
        )


class _TokenBytes:
    """What LLTokenizer reads from its argument, by the names it wants."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens: Sequence[bytes] = tokenizer.token_bytes(vocab_size)
        # One that ends nothing where the model names none: the trie wants at least one, the mask hides it again.
        self.eos_token_ids = sorted(i for i in tokenizer.stop_ids if 0 <= i < vocab_size) or [vocab_size - 1]
        self.eos_token_id = self.eos_token_ids[0]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


def _import_guidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise StructureError(
            "structured output needs the package llguidance: pip install 'flashmoe[structured]'"
        ) from error
