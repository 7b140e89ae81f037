"""Our files: the tile codec, the manifest, reading and verifying a bundle (docs/format.md)."""

from flashmoe.bundle.codecs import (
    DenseCodec,
    FfnLayout,
    Quantized,
    TileCodec,
    dequantize_ffn,
    pack_ffn,
    unpack_ffn,
)
from flashmoe.bundle.manifest import FORMAT_VERSION, Manifest
from flashmoe.bundle.reader import Bundle, ExpertLayer, TensorInfo

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "DenseCodec",
    "ExpertLayer",
    "FfnLayout",
    "Manifest",
    "Quantized",
    "TensorInfo",
    "TileCodec",
    "dequantize_ffn",
    "pack_ffn",
    "unpack_ffn",
]
