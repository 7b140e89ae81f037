"""A chat as its commands and its two faces (terminal, pipe) see it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flashmoe.errors import ToolError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.chat.session import AnswerEnd, AnswerEvent, ChatSession
    from flashmoe.chat.tool_loop import TurnEvent
    from flashmoe.chat.toolbox import Toolboxes
    from flashmoe.chat.transcript import Transcript


class View(Protocol):
    """Where a turn is shown."""

    def show(self, event: TurnEvent) -> None:
        """The next event."""

    def close(self) -> None:
        """The turn has ended, or was interrupted."""


@dataclass
class Chat:
    """One conversation with one model.

    sampling: values by the names of SamplingParams.  variables: the chat template's own.  wanted_tool: the one that the
    next answer must call.
    """

    session: ChatSession
    name: str
    transcript: Transcript
    toolbox: Toolboxes
    most_rounds: int
    sampling: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    show_reasoning: bool = True
    wanted_tool: str | None = None
    last: AnswerEnd | None = None

    def run_turn(self, view: View) -> None:
        """Answer the transcript's last message.  A question that nothing at all has answered is taken back.

        Raises FlashmoeError, or KeyboardInterrupt when the user does not want to wait.
        """
        try:
            with closing(self._turn()) as events:
                for event in events:
                    view.show(event)
        finally:
            view.close()
            self.wanted_tool = None
            if self.transcript.unanswered:
                self.transcript.take_back()

    def _turn(self) -> Generator[TurnEvent, None, None]:
        from flashmoe.chat.session import AnswerEnd
        from flashmoe.chat.tool_loop import take_turn

        params = self.session.llm.sampling_params(**self.sampling)
        wanted = [tool for tool in self.toolbox.tools if tool["function"]["name"] == self.wanted_tool]
        if self.wanted_tool is not None and not wanted:
            raise ToolError(f"there is no tool {self.wanted_tool!r}: /tools lists them")

        def answer(messages: Sequence[dict[str, Any]], first: bool) -> Generator[AnswerEvent, None, None]:
            tools = wanted if first and wanted else self.toolbox.tools
            return self.session.answer(
                messages, params, tools or None, self.variables, forced=bool(first and wanted)
            )

        with closing(take_turn(self.transcript, answer, self.toolbox, self.most_rounds)) as events:
            for event in events:
                if isinstance(event, AnswerEnd):
                    self.last = event
                yield event

    @property
    def context_used(self) -> int:
        """Tokens of the conversation after its last answer."""
        return 0 if self.last is None else self.last.prompt_tokens + self.last.completion_tokens

    def statistics(self) -> list[tuple[str, str]]:
        """What /stats shows."""
        from flashmoe import env

        plan = self.session.llm.plan
        rows = [
            ("model", self.name),
            ("experts in memory", f"{plan.slots} of {plan.experts}"),
            ("memory", f"{format_size(env.current_memory())}, ceiling {format_size(plan.budget_nbytes)}"),
            ("context", f"{self.context_used:,} of {plan.context:,} tokens"),
            ("messages", str(len(self.transcript.messages))),
        ]
        return rows if self.last is None else rows + _measured(self.last)


def _measured(end: AnswerEnd) -> list[tuple[str, str]]:
    """Of the last answer."""
    rows = [("last prompt", f"{end.prompt_tokens:,} tokens, {end.cached_tokens:,} of them known already")]
    if end.first_token_seconds is not None:
        rows.append(("first token after", f"{end.first_token_seconds:.2f} s"))
    speed = "" if end.decode_tok_s is None else f", {end.decode_tok_s:.2f} tok/s"
    rows.append(("last answer", f"{end.completion_tokens:,} tokens{speed}"))
    if end.hit_rate is not None:
        rows.append(("experts hit", f"{end.hit_rate:.1%}, {end.bytes_read / 1e9:.3f} GB read"))
    return rows
