"""Longer contexts by slower rotation of all pairs or of the slow ones (YaRN has a file of its own)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flashmoe.nn.weights import F32


@dataclass(frozen=True)
class LinearScaling:
    """Every pair turns 1 / factor as fast (Chen et al., arXiv 2306.15595)."""

    factor: float

    amplitude: ClassVar[float] = 1.0

    def frequencies(self, inverse: F32) -> F32:
        """See RopeScaling."""
        return inverse / np.float32(self.factor)


@dataclass(frozen=True)
class Llama3Scaling:
    """Pairs that turn less than low times in `original` positions turn 1 / factor as fast, more than high unchanged.

    Between them the speed is interpolated by the number of turns (Llama 3.1, arXiv 2407.21783, as its code does it).
    """

    factor: float
    low: float
    high: float
    original: int

    amplitude: ClassVar[float] = 1.0

    def frequencies(self, inverse: F32) -> F32:
        """See RopeScaling."""
        wavelength = np.float32(2 * math.pi) / inverse
        turns = np.float32(self.original) / wavelength
        mix = (turns - np.float32(self.low)) / np.float32(self.high - self.low)
        slow = inverse / np.float32(self.factor)
        between = (np.float32(1) - mix) * slow + mix * inverse
        long, short = wavelength > self.original / self.low, wavelength < self.original / self.high
        return np.where(long, slow, np.where(short, inverse, between)).astype(np.float32)
