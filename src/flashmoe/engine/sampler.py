"""One request's sampler over the native core."""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.engine.params import SamplingParams
from flashmoe.nn.weights import F32


class Sampler:
    """Draws tokens for one sequence (native/kernels/sampler).  Not thread-safe.

    The n-th draw depends on the seed, n and the logits alone.
    """

    def __init__(self, params: SamplingParams, prompt: list[int]) -> None:
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._native = _native.Sampler(
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
            self.seed,
        )
        self._native.observe_prompt(np.array(prompt, np.int32))

    def sample(self, logits: F32, allowed: NDArray[np.uint32] | None = None) -> int:
        """Next token id from logits [vocab] float32; `allowed`: one bit a token, little-endian words.

        Raises RuntimeError when a logit is not a number or no token is allowed.
        """
        return self._native.sample(logits, allowed)


def top_logprobs(logits: F32, count: int) -> tuple[list[tuple[int, float]], float]:
    """The `count` most likely tokens of logits [vocab] as (id, log-probability), falling, and log(sum(exp(logits))).

    A token's log-probability is its logit minus that sum.  Equal tokens come by rising id.  Thread-safe.  Raises
    RuntimeError when a logit is not a number or the largest is infinite.
    """
    log_sum, ids, values = _native.top_logprobs(logits, count)
    return [(token, value - log_sum) for token, value in zip(ids, values, strict=True)], log_sum
