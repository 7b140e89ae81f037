"""The /commands of a chat, over a session that has no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe.chat.session import AnswerEnd
from flashmoe.chat.toolbox import Toolboxes
from flashmoe.chat.transcript import Transcript
from flashmoe.cli.chat_commands import COMMANDS, Next, is_command, message_of, run_command
from flashmoe.cli.chat_state import Chat
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import ConfigError, FlashmoeError, PromptError

CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time\nof a zone",
        "parameters": {"type": "object", "properties": {"zone": {}}},
    },
}


class Clock:
    tools = [CLOCK]  # noqa: RUF012

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        return "noon"


@pytest.fixture
def chat() -> Chat:
    plan = SimpleNamespace(slots=4, experts=8, budget_nbytes=1 << 30, context=100)
    llm = SimpleNamespace(plan=plan, sampling_params=lambda **given: SamplingParams(**given))
    session: Any = SimpleNamespace(llm=llm)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return Chat(session, "toy", Transcript(talk), Toolboxes([Clock()], 100), 3)


@pytest.fixture
def say(chat: Chat) -> Callable[[str], str]:
    return lambda line: run_command(chat, line).note


def test_what_is_a_command() -> None:
    assert is_command("/help")
    assert not is_command("//etc is a directory")
    assert message_of("//etc is a directory") == "/etc is a directory"
    assert message_of("Hi") == "Hi"


def test_help_names_every_command(say: Callable[[str], str]) -> None:
    assert all(f"/{command.name}" in say("/help") for command in COMMANDS)
    assert say("/?") == say("/help")


def test_unknown_commands_have_a_hint(say: Callable[[str], str]) -> None:
    with pytest.raises(PromptError, match=r"unknown command /regenrate: did you mean /regenerate\?"):
        say("/regenrate")
    with pytest.raises(PromptError, match="/help lists"):
        say("/xyzzy")
    with pytest.raises(PromptError):
        say("/")


def test_system(chat: Chat, say: Callable[[str], str]) -> None:
    assert "no system message" in say("/system")
    say("/system Be brief.")
    assert say("/system") == "Be brief."
    assert "stays" in say("/clear")
    assert chat.transcript.messages == [{"role": "system", "content": "Be brief."}]
    say("/system -")
    assert chat.transcript.messages == []


def test_save_and_load(chat: Chat, say: Callable[[str], str], tmp_path: Path) -> None:
    file = tmp_path / "a b.json"
    assert say(f"/save {file}") == f"2 messages saved in {file}"
    assert json.loads(file.read_text())["model"] == "toy"
    say("/clear")
    say(f"/load {file}")
    assert len(chat.transcript.messages) == 2


def test_bad_files_leave_the_conversation_alone(
    chat: Chat, say: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("{")
    for line in (f"/load {tmp_path / 'bad.json'}", "/load /nowhere/x.json", "/load", "/save"):
        with pytest.raises(PromptError) as error:
            say(line)
        assert "\n" not in str(error.value)
    with pytest.raises(PromptError, match="No such file or directory"):
        say("/save /nowhere/x.json")
    assert len(chat.transcript.messages) == 2


def test_regenerate_and_undo(chat: Chat, say: Callable[[str], str]) -> None:
    assert run_command(chat, "/regenerate").next is Next.ANSWER
    assert chat.transcript.unanswered
    assert say("/undo") == "taken back: Hi"
    for line in ("/undo", "/retry"):
        with pytest.raises(PromptError, match="ask something first"):
            say(line)


def test_sampling_can_be_changed(chat: Chat, say: Callable[[str], str]) -> None:
    assert "temperature 1.0" in say("/set")
    assert say("/set temperature 0.5") == "temperature 0.5"
    assert say("/set top-k 7") == "top_k 7"
    assert chat.sampling == {"temperature": 0.5, "top_k": 7}
    for line in ("/set temperature hot", "/set seed -1", "/set max_tokens x"):
        with pytest.raises(PromptError, match="is no value of"):
            say(line)
    with pytest.raises(ConfigError, match="top_p must lie"):
        say("/set top_p 2")
    assert chat.sampling == {"temperature": 0.5, "top_k": 7}


def test_thinking_and_reasoning(chat: Chat, say: Callable[[str], str]) -> None:
    say("/thinking on")
    say("/reasoning hide")
    assert chat.variables == {"enable_thinking": True}
    assert not chat.show_reasoning
    for line in ("/thinking", "/thinking maybe", "/reasoning"):
        with pytest.raises(FlashmoeError):
            say(line)


def test_tools(chat: Chat, say: Callable[[str], str]) -> None:
    assert say("/tools") == "clock(zone)  The time of a zone"
    say("/use clock")
    assert chat.wanted_tool == "clock"
    with pytest.raises(PromptError, match="there is no tool 'hammer'"):
        say("/use hammer")


def test_stats_before_and_after_an_answer(chat: Chat, say: Callable[[str], str]) -> None:
    assert "4 of 8" in say("/stats")
    chat.last = AnswerEnd("stop", 50, 40, 11, 0.5, 2.0, 0.75, 2_000_000_000)
    text = say("/stats")
    for part in ("61 of 100 tokens", "40 of them known", "0.50 s", "5.00 tok/s", "75.0%, 2.000 GB"):
        assert part in text


def test_show_and_exit(chat: Chat, say: Callable[[str], str]) -> None:
    assert say("/show") == "user: Hi\n\nassistant: Hello"
    assert run_command(chat, "/bye").next is Next.LEAVE
