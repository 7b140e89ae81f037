"""What one token reads and multiplies, from names and sizes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashmoe.bundle.codecs import Codec, DenseCodec, FfnLayout
from flashmoe.bundle.manifest import stored_shape

Tensor = tuple[str, Codec, tuple[int, ...]]

_PARTS = ("dense", "shared", "head", "expert")
_SHARED = ".mlp.shared_expert"
_NARROW = 64  # columns; a float tensor with no more is a convolution, no matrix


def stored_nbytes(codec: Codec, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor as it is stored."""
    return math.prod(stored_shape(codec, shape)) * (codec.itemsize if isinstance(codec, DenseCodec) else 1)


def token_traffic(tensors: Sequence[Tensor], layouts: Sequence[FfnLayout]) -> dict[str, int]:
    """Bytes and multiply-adds of a token; layouts: one per layer with experts.

    Keys dense_*, shared_* (all layers' shared experts), head_* and expert_* (one routed expert, the largest), each
    with _nbytes and _products.  An embedding that is not the head counts nowhere: a token reads a row of it.
    """
    head = "lm_head" if any(name == "lm_head" for name, _, _ in tensors) else "embed_tokens"
    traffic = dict.fromkeys((f"{part}_{unit}" for part in _PARTS for unit in ("nbytes", "products")), 0)
    for name, codec, shape in tensors:
        if name == "embed_tokens" != head:
            continue
        part = "head" if name == head else "shared" if name.endswith(_SHARED) else "dense"
        traffic[f"{part}_nbytes"] += stored_nbytes(codec, shape)
        traffic[f"{part}_products"] += _products(codec, shape)
    traffic["expert_nbytes"] = max((layout.nbytes for layout in layouts), default=0)
    traffic["expert_products"] = max((_products(layout, ()) for layout in layouts), default=0)
    return traffic


def _products(codec: Codec, shape: tuple[int, ...]) -> int:
    if isinstance(codec, FfnLayout):
        return 3 * codec.hidden * codec.intermediate
    matrix = len(shape) == 2 and shape[0] > 1 and (shape[1] > _NARROW or not isinstance(codec, DenseCodec))
    return math.prod(shape) if matrix else 0
