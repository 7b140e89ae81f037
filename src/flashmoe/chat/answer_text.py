"""An answer on its way from tokens to events."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.chat.continuation import Said
from flashmoe.chat.dialects import Event, ReasoningDelta
from flashmoe.chat.dialects.base import EventParser
from flashmoe.chat.stopping import StopStrings
from flashmoe.engine.tokenizer import TextDecoder


class AnswerText:
    """Tokens to text, to what comes before a stop string, to the dialect's events.  Not thread-safe."""

    def __init__(
        self, decoder: TextDecoder, stops: Sequence[str], parser: EventParser, reasoning: bool
    ) -> None:
        """reasoning: the answer begins inside the reasoning."""
        self._decoder, self._stops, self._parser = decoder, StopStrings(stops), parser
        self._reasoning, self.reasoning_tokens = reasoning, 0
        self.said = Said()

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def stop_found(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stopped is not None

    def push(self, token_id: int) -> list[Event]:
        """What became certain with the next token."""
        text, _ = self._stops.push(self._decoder.push(token_id))
        events = self._parser.push(text) if text else []
        self.reasoning_tokens += self._reasoning  # the marker that ends it is a part of it
        if events:
            self._reasoning = isinstance(events[-1], ReasoningDelta)
        return self._heard(events)

    def finish(self) -> list[Event]:
        """The rest."""
        events = []
        if self.stopped is None:
            text, stopped = self._stops.push(self._decoder.flush())
            events = self._parser.push(text if stopped else text + self._stops.flush())
        return self._heard(events + self._parser.finish())

    def _heard(self, events: list[Event]) -> list[Event]:
        for event in events:
            self.said.add(event)
        return events
