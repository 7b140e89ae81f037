"""Other people's files in: safetensors checkpoints as Hugging Face and MLX write them."""

from flashmoe.checkpoint.checkpoint import Checkpoint, Skipped, read_config
from flashmoe.checkpoint.matrices import AffineMatrix, AffineRows, FloatMatrix, Matrix, Run

__all__ = [
    "AffineMatrix",
    "AffineRows",
    "Checkpoint",
    "FloatMatrix",
    "Matrix",
    "Run",
    "Skipped",
    "read_config",
]
