"""Checkpoint to bundle (resumable, in bounded memory), random stand-ins, and what a model would weigh."""

from flashmoe.bundle.progress import Progress
from flashmoe.bundle.verify import Damage, VerifyReport, verify
from flashmoe.convert.describe import describe
from flashmoe.convert.run import Calibration, ConvertReport, convert
from flashmoe.convert.synth import SynthReport, synth

__all__ = [
    "Calibration",
    "ConvertReport",
    "Damage",
    "Progress",
    "SynthReport",
    "VerifyReport",
    "convert",
    "describe",
    "synth",
    "verify",
]
