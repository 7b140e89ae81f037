"""Other people's files in: checkpoints as Hugging Face, MLX and quantisers write them."""

from flashmoe.checkpoint.checkpoint import Checkpoint, Skipped, read_config
from flashmoe.checkpoint.matrices import AffineMatrix, AffineRows, CodedMatrix, FloatMatrix, Matrix
from flashmoe.checkpoint.tensors import Run

__all__ = [
    "AffineMatrix",
    "AffineRows",
    "Checkpoint",
    "CodedMatrix",
    "FloatMatrix",
    "Matrix",
    "Run",
    "Skipped",
    "read_config",
]
