"""Tiny models of any family: the class that transformers has for it, with weights drawn on exact affine grids.

The grids are those of tiny_weights.py (lossless): a min/max quantiser of the right bits and group finds every value
again exactly, so converting loses nothing and logits can be compared to float32's own rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference_logits import Reference, float64_arithmetic, reference_of
from tiny_weights import TinySpec, draw_affine

TORCH_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
HIDDEN = 32

_COMMON: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class FamilySpec:
    """A tiny model: its model_type and what its configuration has beyond, or other than, _COMMON.

    zero_centred: its norms multiply by 1 + w.  transposed: parameters [..., in, out], whose rows are columns.
    """

    name: str
    seed: int
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    zero_centred: bool = False
    transposed: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The fields of the configuration."""
        return _COMMON | dict(self.fields)

    def model(self) -> Any:
        """The transformers model in float32 with this seed's weights."""
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        config._attn_implementation = config._experts_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
        model.load_state_dict(self._draw(model.state_dict()))
        return model

    def reference(self, prompt: int, new: int) -> Reference:
        """What a correct engine must reproduce for `prompt` random ids and `new` greedy ones."""
        model = self.model()
        with float64_arithmetic():
            truth = copy.deepcopy(model).double()
        return reference_of(model, truth, self.seed, (prompt, new))

    def write(self, folder: Path, dtype: str, shard_nbytes: int) -> None:
        """transformers' own save_pretrained, after a cast that must change nothing."""
        model = self.model()
        exact = {name: value.clone() for name, value in model.state_dict().items()}
        model.to(TORCH_DTYPE[dtype])
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.data = exact[name]
        inexact = [n for n, v in model.state_dict().items() if not torch.equal(v.float(), exact[n])]
        assert not inexact, f"not exact in {dtype}: {inexact[:3]}"
        model.save_pretrained(folder, max_shard_size=shard_nbytes)

    def _draw(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(self.seed)
        drawn = {name: self._values(rng, name, tuple(old.shape)) for name, old in sorted(state.items())}
        if self.config["tie_word_embeddings"]:
            drawn["lm_head.weight"] = drawn["model.embed_tokens.weight"]
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in drawn.items()}

    def _values(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if "conv1d" in name:
            return np.rint(rng.normal(0.0, 0.6, shape) * 64).astype(np.float32) / 64
        if len(shape) > 1:
            return self._matrix(rng, name, shape)
        if kind == "A_log":
            return np.log(rng.uniform(0.05, 2.0, shape)).astype(np.float32)
        steps = rng.integers(-24, 24, shape).astype(np.float32) / 64
        plain = not self.zero_centred or "linear_attn" in name
        return steps + np.float32("norm" in kind and plain)

    def _matrix(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        turned = name.endswith(self.transposed) if self.transposed else False
        shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        cols = shape[-1]
        spec = TinySpec(self.name, self.seed, group=64 if cols % 64 == 0 else 32)
        values = draw_affine(rng, spec, _module(name), shape, _std(name, cols)).values()
        return values.swapaxes(-1, -2) if turned else values


def _module(name: str) -> str:
    """The name that tells draw_affine which matrices get eight bits."""
    router = name.endswith(("mlp.gate.weight", "mlp.router.weight"))
    return "mlp.gate" if router else name.removesuffix(".weight")


def _std(name: str, cols: int) -> float:
    """Gains that keep every block's share of the logits visible, and |logit| at a few units."""
    special = {
        "embed_tokens": 0.5,
        "lm_head": 0.3,
        "mlp.gate": 0.3,
        "mlp.router": 0.3,
        "o_proj": 1.5 * cols**-0.5,
    }
    return next((std for part, std in special.items() if part in name), cols**-0.5)
