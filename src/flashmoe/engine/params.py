"""How to choose tokens and when to stop."""

from __future__ import annotations

from dataclasses import dataclass

from flashmoe.errors import ConfigError

# (field, least, most, is the least itself allowed)
_RANGES = (
    ("temperature", 0.0, 100.0, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("presence_penalty", -100.0, 100.0, True),
    ("frequency_penalty", -100.0, 100.0, True),
    ("repetition_penalty", 0.0, 100.0, False),
)


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request; the defaults sample from the model's own distribution.

    temperature 0 is greedy; top_k 0 keeps all tokens; the penalties are those of the OpenAI API (presence,
    frequency: generated tokens) and of Hugging Face (repetition: prompt and generated tokens).  seed None draws a
    new one.  max_tokens None: until a stop token or the context is full.  Raises ConfigError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least, most, inclusive in _RANGES:
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and least <= value <= most
            if not fits or (value == least and not inclusive):
                bracket = "[" if inclusive else "("
                raise ConfigError(f"{name} must lie in {bracket}{least:g}, {most:g}], got {value!r}")
        if type(self.top_k) is not int or not 0 <= self.top_k < 1 << 31:
            raise ConfigError(f"top_k must be a whole number from 0 (all) to 2^31 - 1, got {self.top_k!r}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed must be between 0 and 2^64 - 1, got {self.seed}")
