"""YaRN (Peng et al., arXiv 2309.00071): slow frequencies are interpolated, fast ones kept, a ramp between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flashmoe.nn.weights import F32


@dataclass(frozen=True)
class Yarn:
    """A scaling for nn.rotary.Rope.

    A pair that turns ``beta_fast`` times or more within ``trained`` positions keeps its frequency; one that turns
    ``beta_slow`` times or fewer turns ``factor`` times as slowly.  truncate: the ends of the ramp are whole pairs.
    """

    theta: float
    factor: float
    trained: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0

    def frequencies(self, inverse: F32) -> F32:
        """The scaled angles per position from the plain ones, float32 [rotated / 2] each."""
        low, high = self._ramp(2 * len(inverse))
        steps = (np.arange(len(inverse), dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        interpolated = np.clip(steps, 0, 1)
        slow = np.float32(1) / (np.float32(self.factor) * (np.float32(1) / inverse))
        scaled = slow * interpolated + inverse * (1 - interpolated)
        return np.asarray(scaled, np.float32)

    def _ramp(self, rotated: int) -> tuple[float, float]:
        """The pairs at which interpolation begins and is complete."""

        def pair(turns: float) -> float:
            return rotated * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        return low, high + 0.001 if low == high else high  # as the reference implementation avoids 0 / 0


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much larger attention scores are to be with `factor` times the positions (equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
