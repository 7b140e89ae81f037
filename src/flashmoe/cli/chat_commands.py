"""The /commands of `flashmoe chat`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from flashmoe.cli.chat_state import Chat
from flashmoe.cli.model_options import SAMPLING
from flashmoe.errors import PromptError

_SWITCH = {"on": True, "off": False}


class Next(Enum):
    """What a command leaves to be done."""

    NOTHING = "nothing"
    ANSWER = "answer"  # the transcript's last message
    LEAVE = "leave"


@dataclass(frozen=True)
class Outcome:
    """A note for the user, and what is to be done."""

    note: str = ""
    next: Next = Next.NOTHING


@dataclass(frozen=True)
class Command:
    """arguments: as /help shows them."""

    name: str
    arguments: str
    text: str
    run: Callable[[Chat, str], Outcome]


def is_command(line: str) -> bool:
    """Whether a line is one; a message that begins with a slash is written with two."""
    return line.startswith("/") and not line.startswith("//")


def message_of(line: str) -> str:
    """The message that a line is."""
    return line[1:] if line.startswith("//") else line


def run_command(chat: Chat, line: str) -> Outcome:
    """Carry out a line like "/save FILE".  Raises FlashmoeError with one line for the user."""
    word, _, rest = line[1:].strip().partition(" ")
    found = _BY_NAME.get(word.lower())
    if found is None:
        near = difflib.get_close_matches(word.lower(), _BY_NAME, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise PromptError(f"unknown command /{word}: {hint}")
    try:
        return found.run(chat, rest.strip())
    except OSError as error:
        raise PromptError(f"{error.filename or rest.strip()}: {error.strerror}") from error


def _help(chat: Chat, rest: str) -> Outcome:
    calls = [f"/{command.name} {command.arguments}".rstrip() for command in COMMANDS]
    width = max(map(len, calls))
    rows = [f"{call:<{width}}  {command.text}" for call, command in zip(calls, COMMANDS, strict=True)]
    keys = (
        'Enter sends; Alt-Enter or Ctrl-J begins a new line, also behind a \\ and within three quotes ("""); '
        "Ctrl-C stops the answer, Ctrl-D leaves; a message that begins with / is written with //"
    )
    return Outcome("\n".join([*rows, "", keys]))


def _system(chat: Chat, rest: str) -> Outcome:
    if not rest:
        return Outcome(
            chat.transcript.system or "no system message: /system TEXT sets one, /system - removes it"
        )
    chat.transcript.system = None if rest == "-" else rest
    return Outcome("system message removed" if rest == "-" else "system message set")


def _clear(chat: Chat, rest: str) -> Outcome:
    chat.transcript.clear()
    chat.last = None
    return Outcome("a new conversation" + (", the system message stays" if chat.transcript.system else ""))


def _save(chat: Chat, rest: str) -> Outcome:
    path = _path(rest, "/save FILE")
    chat.transcript.save(path, chat.name)
    return Outcome(f"{len(chat.transcript.messages)} messages saved in {path}")


def _load(chat: Chat, rest: str) -> Outcome:
    path = _path(rest, "/load FILE")
    chat.transcript.messages = chat.transcript.load(path).messages
    chat.last = None
    return Outcome(f"{len(chat.transcript.messages)} messages loaded from {path}")


def _show(chat: Chat, rest: str) -> Outcome:
    lines = []
    for message in chat.transcript.messages:
        calls = "".join(f" {call['function']['name']}()" for call in message.get("tool_calls", ()))
        lines.append(f"{message['role']}: {message.get('content') or ''}{calls}")
    return Outcome("\n\n".join(lines) or "nothing has been said yet")


def _stats(chat: Chat, rest: str) -> Outcome:
    rows = chat.statistics()
    width = max(len(name) for name, _ in rows)
    return Outcome("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _regenerate(chat: Chat, rest: str) -> Outcome:
    if not chat.transcript.reopen():
        raise PromptError("there is no answer to give again: ask something first")
    return Outcome(next=Next.ANSWER)


def _undo(chat: Chat, rest: str) -> Outcome:
    text = chat.transcript.take_back()
    if text is None:
        raise PromptError("there is nothing to take back: ask something first")
    return Outcome(f"taken back: {text}")


def _tools(chat: Chat, rest: str) -> Outcome:
    rows = []
    for tool in chat.toolbox.tools:
        function = tool["function"]
        given = ", ".join(function["parameters"].get("properties", {}))
        text = " ".join(str(function.get("description", "")).split())
        rows.append(f"{function['name']}({given})  {text}".rstrip())
    return Outcome("\n".join(rows) or "no tools: start with --mcp FILE, --mcp-server COMMAND or --shell")


def _use(chat: Chat, rest: str) -> Outcome:
    if rest not in {tool["function"]["name"] for tool in chat.toolbox.tools}:
        raise PromptError(f"there is no tool {rest!r}: /tools lists them")
    chat.wanted_tool = rest
    return Outcome(f"the next answer begins with a call of {rest}")


def _thinking(chat: Chat, rest: str) -> Outcome:
    if rest not in _SWITCH:
        raise PromptError("write /thinking on or /thinking off")
    chat.variables["enable_thinking"] = _SWITCH[rest]
    return Outcome(f"thinking {rest}, where the model's chat template knows it")


def _reasoning(chat: Chat, rest: str) -> Outcome:
    if rest not in ("show", "hide"):
        raise PromptError("write /reasoning show or /reasoning hide")
    chat.show_reasoning = rest == "show"
    return Outcome("reasoning is shown" if chat.show_reasoning else "reasoning is hidden")


def _set(chat: Chat, rest: str) -> Outcome:
    kinds: dict[str, Callable[[str], object]] = {
        flag.removeprefix("--").replace("-", "_"): kind for flag, kind, _ in SAMPLING
    }
    kinds["max_tokens"] = int
    name, _, text = rest.partition(" ")
    name = name.replace("-", "_")
    if name not in kinds:
        params = chat.session.llm.sampling_params(**chat.sampling)
        return Outcome(", ".join(f"{known} {getattr(params, known)}" for known in kinds))
    try:
        value = kinds[name](text.strip())
    except Exception as error:
        raise PromptError(f"{text.strip()!r} is no value of {name}: write /set {name} NUMBER") from error
    chat.session.llm.sampling_params(**chat.sampling | {name: value})  # raises ConfigError
    chat.sampling[name] = value
    return Outcome(f"{name} {value}")


def _exit(chat: Chat, rest: str) -> Outcome:
    return Outcome(next=Next.LEAVE)


def _path(text: str, usage: str) -> Path:
    if not text:
        raise PromptError(f"which file? {usage}")
    return Path(text).expanduser()


COMMANDS = (
    Command("help", "", "this list", _help),
    Command("system", "[TEXT|-]", "show, set or remove the system message", _system),
    Command("regenerate", "", "answer the last question anew", _regenerate),
    Command("undo", "", "take the last question and its answer back", _undo),
    Command("clear", "", "begin a new conversation", _clear),
    Command("save", "FILE", "write the conversation as JSON", _save),
    Command("load", "FILE", "go on with a saved conversation", _load),
    Command("show", "", "print the conversation", _show),
    Command("stats", "", "speed, memory and context", _stats),
    Command("set", "[NAME VALUE]", "show or change how answers are sampled", _set),
    Command("thinking", "on|off", "reason before the answer", _thinking),
    Command("reasoning", "show|hide", "print the reasoning", _reasoning),
    Command("tools", "", "what the model may call", _tools),
    Command("use", "TOOL", "have the next answer call it", _use),
    Command("exit", "", "leave", _exit),
)
_BY_NAME = {command.name: command for command in COMMANDS} | {
    alias: command
    for command in COMMANDS
    for alias in {"exit": ("quit", "bye"), "regenerate": ("retry",), "help": ("?",)}.get(command.name, ())
}
