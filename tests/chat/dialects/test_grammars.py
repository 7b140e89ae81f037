"""Grammars of forced calls: they compile, force what the parser reads, and permit nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from flashmoe.chat.dialects import Dialect

llguidance = pytest.importorskip("llguidance")
Read = Callable[..., Any]

WEATHER = ("weather", {"city": "Zürich\n</b>", "days": 3, "tags": ["a"], "note": "x"})
_END = 256


class ByteTokens:
    """The bytes, an end token, and markers that no bytes can spell."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = _END

    def __init__(self, markers: list[str]) -> None:
        self.token_ids = {marker: _END + 1 + number for number, marker in enumerate(markers)}
        self.tokens = [*(bytes([value]) for value in range(256)), b"<end>", *(m.encode() for m in markers)]
        self.special_token_ids = [_END, *self.token_ids.values()]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text in which markers are tokens of their own."""
        for marker, token_id in self.token_ids.items():
            if marker in text:
                before, _, behind = text.partition(marker)
                return [*self.ids(before), token_id, *self.ids(behind)]
        return list(text.encode())

    def text(self, ids: list[int]) -> str:
        return b"".join(self.tokens[token_id] for token_id in ids).decode()


def matcher(dialect: Dialect, tools: list[Any], tokens: ByteTokens, parallel: bool = True) -> Any:
    grammar = dialect.call_grammar(tools, parallel=parallel, token_ids=tokens.token_ids)
    assert grammar is not None
    trie = llguidance.LLTokenizer(tokens, n_vocab=len(tokens.tokens), eos_token=[_END])
    found = llguidance.LLMatcher(trie, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert found.get_error() == ""
    return found


def accepted(matcher: Any, ids: list[int]) -> bool:
    """Whether the ids are a whole text of the grammar."""
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def markers_of(form: Any, special: bool) -> list[str]:
    known = (
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|channel|>",
        "<|message|>",
        "<｜tool▁sep｜>",
    )
    written = form.write([WEATHER])
    return [marker for marker in known if special and marker in written]


@pytest.mark.parametrize("special", [False, True])
def test_a_written_call_is_permitted(form: Any, tools: list[Any], special: bool) -> None:
    tokens = ByteTokens(markers_of(form, special))
    for calls in ([WEATHER], [("now", {})]):
        assert accepted(matcher(form.dialect, tools, tokens), tokens.ids(form.write(calls)))
    two = tokens.ids(form.write([WEATHER, ("now", {})]))
    assert accepted(matcher(form.dialect, tools, tokens), two) == (form.dialect.name != "harmony")
    assert not accepted(matcher(form.dialect, tools, tokens, parallel=False), two)


def test_what_the_schema_forbids_is_not_permitted(form: Any, tools: list[Any]) -> None:
    tokens = ByteTokens([])
    for call in (("missing", {}), ("weather", {"days": 3}), ("weather", {"city": "x", "days": "many"})):
        assert not accepted(matcher(form.dialect, tools, tokens), tokens.ids(form.write([call])))
    assert not accepted(matcher(form.dialect, tools, tokens), tokens.ids("Hello"))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_grammar_permits_the_parser_reads(
    form: Any, tools: list[Any], read: Read, seed: int
) -> None:
    tokens, choose = ByteTokens(markers_of(form, special=bool(seed % 2))), random.Random(seed)
    constraint = matcher(form.dialect, tools, tokens, parallel=False)
    ids: list[int] = []
    while not (constraint.is_accepting() and constraint.is_stopped()):
        mask = constraint.compute_bitmask()
        permitted = [i for i in range(len(tokens.tokens)) if mask[i // 8] >> (i % 8) & 1]
        # Mostly what ends strings, lists and values, so that the walk does not go on for ever.
        ending = [i for i in permitted if i == _END or (i < 256 and chr(i) in '"]}<\n/')]
        token_id = choose.choice(ending if ending and choose.random() < 0.6 else permitted)
        if token_id == _END:
            break
        # Plain text would hardly ever end by chance.
        closing = tokens.ids("\n</parameter>\n")
        closes = choose.random() < 0.2 and constraint.validate_tokens(closing) == len(closing)
        taken = closing if closes else [token_id]
        assert constraint.consume_tokens(taken)
        ids += taken
        assert len(ids) < 20_000
    text = tokens.text(ids)
    answer = read(form.dialect, text)
    assert (answer.text, len(answer.calls)) == ("", 1), text
    name, arguments = answer.calls[0]
    assert name in ("weather", "now")
    assert name == "now" or isinstance(arguments["city"], str)
    assert isinstance(arguments.get("days", 0), int | None)
    json.dumps(arguments)


def test_choices_and_references_of_a_schema(form: Any) -> None:
    schema = {
        "$defs": {"Unit": {"enum": ["C", "F"]}, "Point": {"type": "array", "items": {"type": "number"}}},
        "type": "object",
        "properties": {
            "unit": {"$ref": "#/$defs/Unit"},
            "kind": {"enum": ["a", "ab"]},
            "at": {"$ref": "#/$defs/Point"},
        },
        "required": ["kind"],
    }
    tools, tokens = [{"name": "f", "parameters": schema}], ByteTokens([])
    for arguments, good in (
        ({"unit": "C", "kind": "ab", "at": [1, 2.5]}, True),
        ({"kind": "a"}, True),
        ({"kind": "b"}, False),
        ({"kind": "a", "at": ["x"]}, False),
    ):
        assert (
            accepted(matcher(form.dialect, tools, tokens), tokens.ids(form.write([("f", arguments)]))) == good
        )


def test_no_tools_give_no_grammar(form: Any) -> None:
    assert form.dialect.call_grammar([]) is None
