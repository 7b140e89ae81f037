"""Tool calls and reasoning in a model's answer: one file per dialect, text in, events out.

    dialect = detect(template.source)
    parser = dialect.parser(tools, dialect.opens_reasoning(prompt))
    for piece in pieces:
        events = parser.push(piece)
    events = parser.finish()

A call that is malformed or cut comes out as the text that the model wrote, never as a call and never not at all.
"""

from flashmoe.chat.dialects.base import (
    Dialect,
    Event,
    EventParser,
    ReasoningDelta,
    TextDelta,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from flashmoe.chat.dialects.detect import detect
from flashmoe.chat.dialects.plain import PlainParser

__all__ = [
    "Dialect",
    "Event",
    "EventParser",
    "PlainParser",
    "ReasoningDelta",
    "TextDelta",
    "ToolCallAborted",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "detect",
]
