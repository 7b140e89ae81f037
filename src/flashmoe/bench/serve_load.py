"""Many clients at once, for a while: errors, speed, waiting times, fairness, and whether the server's memory stays."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import linear_regression, median
from typing import Any

from flashmoe.bench.serve_client import Answer, Endpoint, Request, ServerError

_WORDS = [
    "the",
    "sea",
    "wind",
    "old",
    "ship",
    "light",
    "house",
    "river",
    "stone",
    "bird",
    "winter",
    "story",
    "bread",
]
_SAMPLE_SECONDS = 1.0
_WARM_SHARE = 0.25  # of the time, in which caches fill
_PAUSE_SECONDS = 0.5  # after an error, so that a dead server is not asked a million times


@dataclass(frozen=True)
class LoadOptions:
    """How many clients ask for how long (seconds), and for answers of how many tokens."""

    clients: int = 32
    seconds: float = 120.0
    tokens: int = 64


def chat(messages: list[dict[str, str]], tokens: int, **more: Any) -> dict[str, Any]:
    """A request of OpenAI's chat API for a stream that ends with its usage."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return {"messages": messages, "max_tokens": tokens, **streamed, **more}


def words(count: int, rng: random.Random) -> str:
    """A text of that many words."""
    return " ".join(rng.choices(_WORDS, k=count))


class Client(threading.Thread):
    """Asks for one streamed answer after another, every second one going on with the conversation."""

    def __init__(self, endpoint: Endpoint, number: int, tokens: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self.answers: list[Answer] = []
        self.errors: Counter[str] = Counter()
        self.cut_tokens = 0
        self._endpoint, self._tokens, self._rng = endpoint, tokens, random.Random(number)
        self._request: Request | None = None
        self._ended = threading.Event()

    @property
    def tokens(self) -> int:
        """All that it has been given."""
        return self.cut_tokens + sum(answer.completion_tokens for answer in self.answers)

    def end(self) -> None:
        """Leave in the middle of whatever is going on."""
        self._ended.set()
        if self._request is not None:
            self._request.cut()

    def run(self) -> None:
        """Until end()."""
        messages: list[dict[str, str]] = []
        while not self._ended.is_set():
            if len(messages) != 2:
                messages = []
            messages.append({"role": "user", "content": words(self._rng.randrange(5, 200), self._rng)})
            try:
                answer = self._ask(messages)
            except ServerError as error:
                if not self._ended.is_set():
                    self.errors[str(error)] += 1
                    self._ended.wait(_PAUSE_SECONDS)
                messages = []
                continue
            self.answers.append(answer)
            messages.append({"role": "assistant", "content": answer.text})

    def _ask(self, messages: list[dict[str, str]]) -> Answer:
        seed = self._rng.randrange(1 << 30)
        self._request = request = Request(
            self._endpoint,
            "POST",
            "/v1/chat/completions",
            chat(messages, self._tokens, temperature=0.8, seed=seed),
        )
        if self._ended.is_set():  # it came between
            request.cut()
        try:
            return request.answer()
        except ServerError:
            self.cut_tokens += request.pieces
            raise


@dataclass
class _Memory:
    """The server's resident memory over time."""

    samples: list[tuple[float, float]] = field(default_factory=list)  # seconds, bytes

    def report(self, seconds: float) -> dict[str, Any]:
        """Bytes at the quarters, and bytes a minute after the warm-up (least squares)."""
        quarters = [self._at(seconds * share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        later = [one for one in self.samples if one[0] >= _WARM_SHARE * seconds]
        slope = linear_regression(*zip(*later, strict=True)).slope if len(later) > 1 else 0.0
        return {"bytes": quarters, "slope_bytes_per_minute": round(slope * 60)}

    def _at(self, second: float) -> int:
        return int(min(self.samples, key=lambda one: abs(one[0] - second))[1])


def run_load(
    endpoint: Endpoint, options: LoadOptions, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report, JSON values; `note` hears how it goes.  Raises ServerError when no measuring is possible."""
    memory = _Memory([(0.0, endpoint.metric("flashmoe_memory_bytes"))])
    clients = [Client(endpoint, number, options.tokens) for number in range(options.clients)]
    began = time.monotonic()
    for client in clients:
        client.start()
    while (passed := time.monotonic() - began) < options.seconds:
        time.sleep(min(_SAMPLE_SECONDS, options.seconds - passed))
        memory.samples.append((time.monotonic() - began, endpoint.metric("flashmoe_memory_bytes")))
        note(f"{memory.samples[-1][0]:.0f} s, {sum(client.tokens for client in clients)} tokens")
    seconds = time.monotonic() - began
    for client in clients:
        client.end()
    for client in clients:
        client.join(10)
    return _report(clients, seconds, memory)


def _report(clients: list[Client], seconds: float, memory: _Memory) -> dict[str, Any]:
    answers = [answer for client in clients for answer in client.answers]
    errors = sum((client.errors for client in clients), Counter[str]())
    tokens = sorted(client.tokens for client in clients)
    first = sorted(answer.first_token_s for answer in answers)
    return {
        "seconds": seconds,
        "answers": len(answers),
        "errors": dict(errors),
        "tokens": sum(tokens),
        "tok_s": sum(tokens) / seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "first_token_s": {"p50": _rank(first, 0.5), "p95": _rank(first, 0.95), "max": _rank(first, 1.0)},
        "tokens_per_client": {"min": tokens[0], "median": median(tokens), "max": tokens[-1]},
        "fairness": _fairness(tokens),
        "memory": memory.report(seconds),
    }


def _fairness(tokens: list[int]) -> float | None:
    """Jain's index of the clients' tokens: 1 when all have the same, 1/n when one has all; None when there are none.

    (sum x)^2 / (n sum x^2): Jain, Chiu and Hawe, DEC-TR-301, 1984.
    """
    squares = sum(count * count for count in tokens)
    return sum(tokens) ** 2 / (len(tokens) * squares) if squares else None


def _rank(values: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of the sorted ones do not pass; None when there are none."""
    if not values:
        return None
    return values[max(0, -int(-share * len(values) // 1) - 1)]
