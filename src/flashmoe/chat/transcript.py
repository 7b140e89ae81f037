"""A conversation as it grows, and its file: JSON that is a request body of OpenAI's chat API.

    {"model": "demo", "messages": [{"role": "user", "content": "Hello"}, ...]}

Read is a bare list of messages too.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.chat.continuation import Said
from flashmoe.chat.json_file import read_json_file
from flashmoe.chat.messages import normalize_messages
from flashmoe.errors import PromptError

_ROLES = ("system", "developer", "user", "assistant", "tool")
_LARGEST_FILE = 64 << 20


class Transcript:
    """The messages of one conversation, in OpenAI's form, its system message first.  Not thread-safe."""

    def __init__(self, messages: Sequence[dict[str, Any]] = ()) -> None:
        self.messages: list[dict[str, Any]] = list(messages)

    @property
    def system(self) -> str | None:
        """The system message; None is none."""
        first = self.messages[0] if self.messages else {}
        return str(first.get("content") or "") if first.get("role") in ("system", "developer") else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages if self.system is None else self.messages[1:]
        self.messages = rest if not text else [{"role": "system", "content": text}, *rest]

    @property
    def unanswered(self) -> bool:
        """Whether the last message is the user's."""
        return bool(self.messages) and self.messages[-1].get("role") == "user"

    def ask(self, text: str) -> None:
        """The user's next message."""
        self.messages.append({"role": "user", "content": text})

    def hear(self, said: Said) -> None:
        """What the model has said, if it has said anything."""
        if said.text or said.reasoning or said.calls:
            self.messages.append(said.message())

    def result(self, call_id: str, name: str, text: str) -> None:
        """What a tool call gave."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": text})

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = [] if self.system is None else self.messages[:1]

    def reopen(self) -> bool:
        """Forget everything after the user's last message; False when there is none."""
        asked = self._last_question()
        if asked is not None:
            del self.messages[asked + 1 :]
        return asked is not None

    def take_back(self) -> str | None:
        """Forget the user's last message and everything after it; its text, None when there is none."""
        asked = self._last_question()
        if asked is None:
            return None
        text = str(self.messages[asked].get("content") or "")
        del self.messages[asked:]
        return text

    def _last_question(self) -> int | None:
        numbers = (i for i in reversed(range(len(self.messages))) if self.messages[i].get("role") == "user")
        return next(numbers, None)

    def save(self, path: Path, model: str) -> None:
        """Write the file, whole or not at all; another conversation's file is replaced, anything else is not.

        Raises PromptError or OSError.
        """
        if path.exists():
            try:
                self.load(path)
            except PromptError as error:
                raise PromptError(f"{path} exists and is no conversation: choose another name") from error
        text = json.dumps({"model": model, "messages": self.messages}, ensure_ascii=False, indent=2) + "\n"
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("x", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read a file.  Raises PromptError, with one line that names it, when it is no conversation."""
        value = read_json_file(path, _LARGEST_FILE, PromptError)
        try:
            return cls(_checked(value))
        except PromptError as error:
            raise PromptError(f"{path} is no conversation: {error}") from error


def _checked(value: object) -> list[dict[str, Any]]:
    """Messages that can be processed.  Raises PromptError."""
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise PromptError('expected {"messages": [...]} or a list of messages')
    normalize_messages(messages)
    for number, message in enumerate(messages):
        if message["role"] not in _ROLES:
            raise PromptError(
                f"messages[{number}] has the role {message['role']!r}: use one of {', '.join(_ROLES)}"
            )
        if not isinstance(message.get("content"), str | list | None):
            raise PromptError(f"messages[{number}] has a content that is no text")
    return messages
