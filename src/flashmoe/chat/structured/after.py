"""A form that begins only behind a text, such as the </think> of a model that reasons first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flashmoe.chat.structured.constraint import GrammarConstraint, Words, token_mask
from flashmoe.chat.structured.vocabulary import GrammarVocabulary

# Models put one or two tokens of line breaks between their reasoning and the answer.
_MOST_BLANKS = 4
_MOST_MARKERS = 8  # kept, of 31 kB for each of their bytes


@dataclass(frozen=True)
class MarkerMasks:
    """Which tokens may come before a marker is complete.

    free: [bytes of the marker, words], row n where the text so far ends with the marker's first n bytes: all tokens of
    the tokenizer, except those that complete the marker and hold more than blanks behind it, for what is behind
    belongs to the form.  blanks: [words], tokens of ASCII blanks alone.
    """

    marker: bytes
    free: Words
    blanks: Words

    @classmethod
    def of(cls, marker: bytes, vocabulary: GrammarVocabulary) -> MarkerMasks:
        """Some 0.5 s with 248,320 tokens; the caller keeps it per marker."""
        tokens = vocabulary.tokenizer.token_bytes(vocabulary.vocab_size)
        ends = [(token_id, token) for token_id, token in enumerate(tokens) if marker[-1] in token]
        known = token_mask((i for i, token in enumerate(tokens) if token), vocabulary.vocab_size)
        rows = [
            known
            & ~token_mask(
                (i for i, token in ends if _overshoots(marker, known_bytes, token)), vocabulary.vocab_size
            )
            for known_bytes in range(len(marker))
        ]
        blanks = token_mask((i for i, token in enumerate(tokens) if token.isspace()), vocabulary.vocab_size)
        return cls(marker, np.stack(rows), blanks)


def marker_masks(text: str, vocabulary: GrammarVocabulary) -> MarkerMasks:
    """The masks of a marker, made once per vocabulary.  Thread-safe: two threads may make the same ones at once."""
    masks: MarkerMasks | None = vocabulary.marker_masks.get(text)
    if masks is None:
        if len(vocabulary.marker_masks) >= _MOST_MARKERS:
            vocabulary.marker_masks.clear()
        masks = vocabulary.marker_masks[text] = MarkerMasks.of(text.encode(), vocabulary)
    return masks


class AfterText:
    """An engine Constraint: nothing is asked of the answer up to a marker, a form of what follows it.

    No stop token is allowed before the form is complete, so an answer that ends with "stop" always has it.  Up to four
    tokens of blanks may stand between the marker and the form.  Not thread-safe.
    """

    def __init__(
        self,
        masks: MarkerMasks,
        form: GrammarConstraint,
        vocabulary: GrammarVocabulary,
        stop_ids: Iterable[int],
    ) -> None:
        self._masks, self._form, self._trie = masks, form, vocabulary.trie
        self._no_stops = ~token_mask((*vocabulary.stop_ids, *stop_ids), vocabulary.vocab_size)
        self._tail: bytes | None = b""  # the end of the text that begins the marker; None behind the marker
        self._blanks_left = _MOST_BLANKS

    def mask(self) -> Words:
        """Tokens that may come next, [ceil(vocab / 32)] words, valid until the next call; raises StructureError."""
        if self._tail is not None:
            free: Words = self._masks.free[len(self._tail)]
            return free & self._no_stops
        if self._blanks_left:
            return self._form.mask() | self._masks.blanks
        return self._form.mask()

    def accept(self, token_id: int) -> None:
        """Go on behind a token that mask() allowed; raises StructureError for any other."""
        if self._tail is not None:
            self._search(self._tail + self._trie.decode_bytes([token_id]))
        elif self._blanks_left and not _has(self._form.mask(), token_id):
            self._blanks_left -= 1
        else:
            self._blanks_left = 0
            self._form.accept(token_id)

    @property
    def is_done(self) -> bool:
        """True when the form is complete and nothing may follow it."""
        return self._tail is None and self._form.is_done

    def _search(self, text: bytes) -> None:
        marker = self._masks.marker
        if marker in text:
            self._tail = None
            return
        longest = min(len(text), len(marker) - 1)
        self._tail = next((text[-n:] for n in range(longest, 0, -1) if marker.startswith(text[-n:])), b"")


def _overshoots(marker: bytes, known: int, token: bytes) -> bool:
    """Whether a token behind the marker's first ``known`` bytes completes it and holds more than blanks behind it."""
    text = marker[:known] + token
    at = text.find(marker)
    return at >= 0 and bool(text[at + len(marker) :].strip())


def _has(mask: Words, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))
