"""Conversations and their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.chat.continuation import Said
from flashmoe.chat.transcript import Transcript
from flashmoe.errors import PromptError

CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "reasoning_content": "A clock would know.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "name": "clock", "content": "noon"},
    {"role": "assistant", "content": "Noon — 正午 🕛."},
]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    Transcript(TALK).save(file, "demo")
    assert Transcript.load(file).messages == TALK
    assert json.loads(file.read_text())["model"] == "demo"
    assert list(tmp_path.iterdir()) == [file]


def test_a_bare_list_is_a_conversation_too(write_json: Callable[..., Path]) -> None:
    assert Transcript.load(write_json("talk.json", TALK)).messages == TALK


def test_a_conversation_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    Transcript(TALK).save(file, "demo")
    Transcript(TALK[:2]).save(file, "demo")
    assert len(Transcript.load(file).messages) == 2
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    with pytest.raises(PromptError, match=r"notes\.txt exists and is no conversation: choose another name"):
        Transcript(TALK).save(notes, "demo")
    assert notes.read_text() == "my notes"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.json"
    Transcript(TALK).save(file, "demo")
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Transcript(TALK[:1]).save(file, "demo")
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "expected"),
        ('"text"', "expected"),
        ("[1]", r"messages\[0\] has no role"),
        ('[{"role": "user"}, {"content": "x"}]', r"messages\[1\] has no role"),
        ('[{"role": "king", "content": "x"}]', "role 'king'"),
        ('[{"role": "user", "content": 7}]', "content that is no text"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "is no text"),
        ('[{"role": "assistant", "tool_calls": [7]}]', "is no object"),
        ('[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]', "no JSON"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(PromptError, match=said) as error:
        Transcript.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"none\.json cannot be read: No such file"):
        Transcript.load(tmp_path / "none.json")
    with pytest.raises(PromptError, match="Is a directory"):
        Transcript.load(tmp_path)
    with pytest.raises(PromptError, match="is no regular file"):
        Transcript.load(Path("/dev/zero"))
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(PromptError, match=r"larger than 64\.0 MiB"):
        Transcript.load(tmp_path / "large.json")


def test_questions_can_be_taken_back_and_answered_anew() -> None:
    transcript = Transcript(TALK)
    assert not transcript.unanswered
    assert transcript.reopen()
    assert transcript.messages == TALK[:2]
    assert transcript.unanswered
    assert transcript.take_back() == "What time is it?"
    assert transcript.messages == TALK[:1]
    assert transcript.take_back() is None
    assert not transcript.reopen()


def test_the_system_message_stays_first() -> None:
    transcript = Transcript(TALK)
    transcript.clear()
    assert transcript.messages == TALK[:1]
    transcript.ask("Hello")
    transcript.system = "Be long."
    assert [message["content"] for message in transcript.messages] == ["Be long.", "Hello"]
    transcript.system = None
    assert [message["content"] for message in transcript.messages] == ["Hello"]
    assert transcript.system is None


def test_silence_is_no_message() -> None:
    transcript = Transcript()
    transcript.hear(Said())
    assert transcript.messages == []
    transcript.hear(Said(text="Hello", reasoning="Be polite."))
    assert transcript.messages == [
        {"role": "assistant", "content": "Hello", "reasoning_content": "Be polite."}
    ]
