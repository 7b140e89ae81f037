"""The items of a response, built as the answer comes, and the events by which a stream tells of them."""

from __future__ import annotations

import uuid
from typing import Any

from flashmoe.chat.dialects import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from flashmoe.server.openai_chat import logprob_entry
from flashmoe.server.service import AnswerEvent, Done, TokenText

Change = dict[str, Any]

_PART_OF = {"message": "output_text", "reasoning": "reasoning_text"}
_PREFIX_OF = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class Output:
    """An answer's items, of which the last may be open.

    logprobs: whether texts carry them.
    """

    def __init__(self, logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] | None = [] if logprobs else None  # of text that is to come
        self._is_open = False

    def changes(self, event: AnswerEvent) -> list[Change]:
        """What the event changes, as events without their sequence numbers."""
        if isinstance(event, TextDelta | ReasoningDelta):
            kind = "message" if isinstance(event, TextDelta) else "reasoning"
            return [*self._in(kind), self._more(event.text)] if event.text else []
        if isinstance(event, TokenText):
            if self._logprobs is not None:
                self._logprobs.append(logprob_entry(event))
            return []
        if isinstance(event, ToolCallStart):
            call = {"call_id": event.id, "name": event.name, "arguments": ""}
            return [*self._close(), *self._begin("function_call", call)]
        if isinstance(event, ToolCallArguments):
            self.items[-1]["arguments"] += event.json_delta
            return [self._of_item("function_call_arguments.delta", delta=event.json_delta)]
        if isinstance(event, ToolCallEnd):
            return self._close()
        if isinstance(event, Done):
            # Clients look for a message even where there is nothing to say.
            empty = [] if self.items else self._in("message")
            return [*empty, *self._close("completed" if event.reason == "stop" else "incomplete")]
        return []

    def _in(self, kind: str) -> list[Change]:
        """Make an item of that kind the open one."""
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        part: dict[str, Any] = {"type": _PART_OF[kind], "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
        changes = [*self._close(), *self._begin(kind, more | {"content": []})]
        self.items[-1]["content"].append(part)
        return [*changes, self._of_part("content_part.added", part=_copy(part))]

    def _more(self, text: str) -> Change:
        item = self.items[-1]
        part = item["content"][0]
        part["text"] += text
        entries, self._logprobs = self._logprobs or [], None if self._logprobs is None else []
        if item["type"] == "reasoning":
            return self._of_part("reasoning_text.delta", delta=text)
        part["logprobs"] += entries
        return self._of_part("output_text.delta", delta=text, logprobs=entries)

    def _begin(self, kind: str, fields: dict[str, Any]) -> list[Change]:
        name = f"{_PREFIX_OF[kind]}_{uuid.uuid4().hex}"
        self.items.append({"id": name, "type": kind, "status": "in_progress", **fields})
        self._is_open = True
        return [self._whole("output_item.added")]

    def _close(self, status: str = "completed") -> list[Change]:
        """End the open item, if there is one."""
        if not self._is_open:
            return []
        self._is_open, item = False, self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = [self._of_item("function_call_arguments.done", arguments=item["arguments"])]
        else:
            part = _copy(item["content"][0])
            text = {key: part[key] for key in ("text", "logprobs") if key in part}
            done = [
                self._of_part(f"{part['type']}.done", **text),
                self._of_part("content_part.done", part=part),
            ]
        return [*done, self._whole("output_item.done")]

    def _whole(self, kind: str) -> Change:
        item = dict(self.items[-1])
        if "content" in item:
            item["content"] = [_copy(part) for part in item["content"]]
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, "item": item}

    def _of_item(self, kind: str, **fields: Any) -> Change:
        where = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **where, **fields}

    def _of_part(self, kind: str, **fields: Any) -> Change:
        return self._of_item(kind, content_index=0, **fields)


def _copy(part: dict[str, Any]) -> dict[str, Any]:
    """As it is now: the part itself grows."""
    return {key: list(value) if isinstance(value, list) else value for key, value in part.items()}
