"""Several matrices of the model in one tensor of a GGUF file, as llama.cpp's converter joins them on request.

``--fuse-qkv`` puts the rows of queries, keys and values one below the other: each is a part of the tensor that can be
read alone, blocks and all.  ``--fuse-gate-up-exps`` does so within each expert, which is how Hugging Face checkpoints
have it: the name alone tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from flashmoe.checkpoint.tensors import TensorRef
from flashmoe.errors import CheckpointError

QKV = "self_attn.qkv_proj"
GATE_UP = "ffn_gate_up_exps"
_GATE_UP_TENSOR = re.compile(rf"blk\.(\d+)\.{GATE_UP}\.weight")


def layers_of_joined_experts(originals: Iterable[str]) -> frozenset[str]:
    """The numbers of the layers with gate and up of all experts in one tensor."""
    return frozenset(found[1] for name in originals if (found := _GATE_UP_TENSOR.fullmatch(name)))


def parts(config: Mapping[str, Any], name: str, ref: TensorRef) -> list[tuple[str, TensorRef]]:
    """The tensors of the model in one of the file, by canonical names: itself, or queries, keys and values.

    Raises CheckpointError when it has no room for them.
    """
    head, found, end = name.partition(f"{QKV}.")
    heads, size = config.get("num_key_value_heads"), config.get("head_dim")
    if not found or type(heads) is not int or type(size) is not int:
        return [(name, ref)]
    rows, each = (ref.entry.shape or (0,))[0], heads * size
    queries = rows - 2 * each
    if each <= 0 or queries <= 0 or ref.entry.nbytes % rows:
        raise CheckpointError(
            f"{ref.where} {ref.entry.dtype} {list(ref.entry.shape)} has no queries beside {each} rows of keys and of"
            " values: download it again"
        )
    counts = {"q": (0, queries), "k": (queries, each), "v": (queries + each, each)}
    return [
        (f"{head}self_attn.{part}_proj.{end}", _rows(ref, first, count))
        for part, (first, count) in counts.items()
    ]


def _rows(ref: TensorRef, first: int, count: int) -> TensorRef:
    """Rows, or values of a vector, as a tensor of their own."""
    entry = ref.entry
    nbytes = entry.nbytes // entry.shape[0]
    shape, offset = (count, *entry.shape[1:]), entry.offset + first * nbytes
    return replace(ref, entry=replace(entry, shape=shape, offset=offset, nbytes=count * nbytes))
