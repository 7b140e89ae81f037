"""How much sooner a conversation's next turn begins to be answered than its first one: what the prefix cache is for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from flashmoe.bench.serve_client import Answer, Endpoint, Request
from flashmoe.bench.serve_load import chat, words

_CLOSE = 0.01  # a prompt may be that much shorter than asked for, or more if that is not met in so many tries
_TRIES = 6


@dataclass(frozen=True)
class ConversationOptions:
    """prompt: tokens of a conversation's first request; answer: most tokens of each answer.

    count: conversations side by side; turns: of each, the first one included.
    """

    prompt: int = 4000
    answer: int = 32
    count: int = 4
    turns: int = 3


def run_conversations(
    endpoint: Endpoint, options: ConversationOptions, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Each conversation's first turn, then each one's second, and so on; one request at a time.

    JSON values: of every turn the tokens of its prompts, those found in the cache, and seconds until the first token
    (medians over the conversations, and the largest).  Raises ServerError.
    """
    talks = [_opening(endpoint, options.prompt, seed) for seed in range(options.count)]
    turns = []
    for turn in range(options.turns):
        answers = []
        for number, messages in enumerate(talks):
            note(f"turn {turn + 1} of {options.turns}, conversation {number + 1} of {len(talks)}")
            body = chat(messages, options.answer, temperature=0.0)
            answer = Request(endpoint, "POST", "/v1/chat/completions", body).answer()
            answers.append(answer)
            messages.append({"role": "assistant", "content": answer.text})
            messages.append({"role": "user", "content": "And what happened then?"})
        turns.append(_summary(answers))
    cold, second = turns[0]["first_token_s"]["median"], turns[1]["first_token_s"]["median"]
    return {"turns": turns, "second_of_first": second / cold}


def _summary(answers: list[Answer]) -> dict[str, Any]:
    first = [answer.first_token_s for answer in answers]
    return {
        "prompt_tokens": median(answer.prompt_tokens for answer in answers),
        "cached_tokens": median(answer.cached_tokens for answer in answers),
        "completion_tokens": median(answer.completion_tokens for answer in answers),
        "first_token_s": {"median": median(first), "max": max(first)},
    }


def _opening(endpoint: Endpoint, tokens: int, seed: int) -> list[dict[str, str]]:
    """A first message that makes a prompt of `tokens` tokens, or a little less; each seed has another text."""
    text = words(tokens, random.Random(seed)).split()
    best, count = 1, len(text)
    for _ in range(_TRIES):
        messages = [{"role": "user", "content": " ".join(text[:count])}]
        given: int = endpoint.post("/v1/messages/count_tokens", {"messages": messages})["input_tokens"]
        if given <= tokens:
            best = max(best, count)
        if (1 - _CLOSE) * tokens <= given <= tokens:
            break
        count = min(len(text), max(1, count * tokens // given))
    return [{"role": "user", "content": " ".join(text[:best])}]
