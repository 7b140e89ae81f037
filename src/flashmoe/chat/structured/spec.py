"""What form an answer must have, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from flashmoe.errors import StructureError

Kind = Literal["json_object", "json_schema", "regex", "lark", "choice"]
_LONGEST_MARKER = 64  # each of its bytes costs a mask of the vocabulary


@dataclass(frozen=True)
class StructuredOutput:
    """A form and what defines it; made by the functions of the same names.  Immutable.

    payload: None, a schema (a dict or a bool), a pattern, a grammar, or a tuple of texts.
    after: the form begins only behind this text, such as "</think>"; what comes before it is free.
    """

    kind: Kind
    payload: Any = None
    after: str | None = None

    def __post_init__(self) -> None:
        """Raises StructureError when ``after`` is empty or long."""
        if self.after is not None and not 0 < len(self.after) <= _LONGEST_MARKER:
            raise StructureError(
                f"the text that structured output begins after has {len(self.after)} characters: give 1 to "
                f'{_LONGEST_MARKER}, like "</think>"'
            )

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Self:
        """JSON that is valid by this schema (Draft 2020-12, docs/structured.md lists the keywords)."""
        return cls("json_schema", schema)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """A text that this regular expression matches from its first to its last character."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """A text of this grammar, in llguidance's dialect of Lark; its first rule is named start."""
        return cls("lark", grammar)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Self:
        """Exactly one of these texts.  Raises StructureError when there is none or an empty one."""
        if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
            raise StructureError(f"choice needs a list of texts that are not empty, got {options!r:.80}")
        return cls("choice", tuple(options))

    def begin_after(self, text: str) -> Self:
        """The same form, behind the first occurrence of ``text``.  Raises StructureError when it is empty or long."""
        return replace(self, after=text)
