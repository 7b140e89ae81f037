"""No tools: the reasoning is split from the answer, everything else is text."""

from __future__ import annotations

from flashmoe.chat.dialects.parsing import ParserOptions
from flashmoe.chat.dialects.tagged import TaggedParser


class PlainParser(TaggedParser):
    """See EventParser: for models whose template knows no tools."""

    def __init__(self, reasoning_open: bool = False) -> None:
        super().__init__(ParserOptions.of(None, reasoning_open, eager=False, new_id=None))
