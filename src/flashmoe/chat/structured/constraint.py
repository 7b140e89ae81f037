"""One answer's way through a grammar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.chat.structured.vocabulary import GrammarVocabulary
from flashmoe.errors import StructureError

Words = NDArray[np.uint32]


class GrammarConstraint:
    """An engine Constraint over a llguidance matcher.  Not thread-safe; mask() runs outside the interpreter's lock.

    Stop tokens are allowed exactly where the grammar may end.
    """

    def __init__(
        self, matcher: Any, vocabulary: GrammarVocabulary, stop_ids: Iterable[int], what: str
    ) -> None:
        """what: "JSON Schema", "grammar", ... for errors.  Raises StructureError when no text is allowed at all."""
        self._matcher, self._what = matcher, what
        self._mask = np.zeros(-(-vocabulary.vocab_size // 32), np.uint32)
        self._address, self._nbytes = self._mask.ctypes.data, self._mask.nbytes
        # The matcher sets the bits of the model's own stop tokens itself.
        extra = set(stop_ids) - vocabulary.stop_ids
        self._extra = token_mask(extra, vocabulary.vocab_size) if extra else None
        placeholders = () if vocabulary.stop_ids else vocabulary.trie.eos_tokens
        self._hidden = token_mask(placeholders, vocabulary.vocab_size) if placeholders else None
        self._fresh = False
        self.mask()

    def mask(self) -> Words:
        """Tokens that may come next, [ceil(vocab / 32)] words of one array that the next mask() overwrites.

        Raises StructureError when the grammar became too complex here to be followed.
        """
        if not self._fresh:
            self._matcher.unsafe_compute_mask_ptr(self._address, self._nbytes)
            if self._matcher.is_error():
                raise self._failure()
            self._fresh = True
            if self._hidden is not None:
                self._mask &= ~self._hidden
            if self._extra is not None:
                self._set_extra_stops(self._extra)
        return self._mask

    def accept(self, token_id: int) -> None:
        """Go on behind a token that mask() allowed; raises StructureError for any other."""
        self._fresh = False
        if not self._matcher.consume_token(token_id):
            raise self._failure()

    @property
    def may_end(self) -> bool:
        """True when the text so far is complete, whether or not it could go on."""
        return bool(self._matcher.is_accepting())

    @property
    def is_done(self) -> bool:
        """True when the text is complete and nothing may follow it."""
        return bool(self._matcher.is_stopped())

    def _set_extra_stops(self, extra: Words) -> None:
        if self.may_end:
            self._mask |= extra
        else:
            self._mask &= ~extra

    def _failure(self) -> StructureError:
        if "NoExtensionBias" in self._matcher.get_error():
            return StructureError(f"the {self._what} allows no text that could stand here: correct it")
        reason = " ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())[:300]
        return StructureError(f"the {self._what} cannot be followed here: {reason}: simplify it")


def token_mask(ids: Iterable[int], vocab_size: int) -> Words:
    """A mask of these tokens, [ceil(vocab / 32)] words; ids outside the vocabulary are left out."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[[token_id for token_id in ids if 0 <= token_id < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
