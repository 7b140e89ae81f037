"""Tiny random gpt-oss and DeepSeek-V3 models: weights on affine grids, transformers' logits, and their file forms.

    python tests/golden/attention_families.py [FOLDER]      (needs torch, transformers; `make fixtures` runs it)

Writes attention_families.json, attention_families.npz and a folder for each form.  Grids are drawn in the order in
which a bundle groups them: along the columns of the matrices it computes with, which a checkpoint may store turned.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from reference_logits import float64_arithmetic, greedy_continuation, run_logits
from safetensors.torch import save_file
from tiny_weights import TinySpec, draw_affine, round_to
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

F32 = NDArray[np.float32]
State = dict[str, torch.Tensor]
TOKENS, GREEDY = 40, 12
LEAST_ROUTER_GAP, LEAST_GREEDY_GAP = 2e-4, 1e-3
RELATIVE_TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Grids:
    """Draws matrices that a min/max quantiser finds again, and vectors that bf16 holds."""

    rng: np.random.Generator

    def matrix(self, *shape: int, bits: int = 4, gain: float = 1.0) -> F32:
        """[..., rows, cols] in groups of 64 columns, or 32 where 64 does not divide them."""
        group = 64 if shape[-1] % 64 == 0 else 32
        spec = TinySpec("grid", 0, bits=bits, group=group)
        return draw_affine(self.rng, spec, "x", shape, gain * shape[-1] ** -0.5).values()

    def vector(self, *shape: int, mean: float = 0.0, std: float = 0.2) -> F32:
        """Normal numbers in bf16."""
        return round_to((mean + std * self.rng.normal(size=shape)).astype(np.float32), "bf16")


def tensors(values: dict[str, F32]) -> State:
    """As torch tensors of their own memory."""
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}


def gpt_oss_config(**changes: Any) -> Any:
    """Two layers, one with a window of 7; YaRN over 16 trained positions."""
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0}
    rope |= {"truncate": False, "original_max_position_embeddings": 16}
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "num_local_experts": 6}
    sizes |= {"num_experts_per_tok": 2, "sliding_window": 7, "max_position_embeddings": 128}
    sizes |= {"rope_parameters": rope, "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.GptOssConfig(**(sizes | changes))


def gpt_oss_weights(config: Any, seed: int) -> State:
    """A state dict of transformers' GptOssForCausalLM."""
    grids = Grids(np.random.default_rng(seed))
    hidden, vocab, dim = config.hidden_size, config.vocab_size, config.head_dim
    heads, kv_heads, experts = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.num_local_experts,
    )
    size = config.intermediate_size
    state = {"model.embed_tokens.weight": grids.matrix(vocab, hidden, gain=4.0)}
    state["lm_head.weight"] = grids.matrix(vocab, hidden, gain=2.0)
    state["model.norm.weight"] = grids.vector(hidden, mean=1.0)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{name}.weight"] = grids.vector(hidden, mean=1.0)
        rows = {"q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden)}
        for name, shape in (rows | {"o": (hidden, heads * dim)}).items():
            state[f"{prefix}self_attn.{name}_proj.weight"] = grids.matrix(*shape, gain=1.5)
            state[f"{prefix}self_attn.{name}_proj.bias"] = grids.vector(shape[0])
        state[f"{prefix}self_attn.sinks"] = grids.vector(heads, std=1.0)
        state[f"{prefix}mlp.router.weight"] = grids.matrix(experts, hidden, bits=8, gain=3.0)
        state[f"{prefix}mlp.router.bias"] = grids.vector(experts)
        # Rows in turns, then turned: [E, H, 2I].
        gate_up = grids.matrix(experts, 2 * size, hidden, gain=4.0)  # large enough to be clamped now and then
        state[f"{prefix}mlp.experts.gate_up_proj"] = gate_up.swapaxes(1, 2)
        state[f"{prefix}mlp.experts.gate_up_proj_bias"] = grids.vector(experts, 2 * size)
        state[f"{prefix}mlp.experts.down_proj"] = grids.matrix(experts, hidden, size).swapaxes(1, 2)
        state[f"{prefix}mlp.experts.down_proj_bias"] = grids.vector(experts, hidden)
    return tensors(state)


def deepseek_config(**changes: Any) -> Any:
    """A dense layer and one with experts in four groups; YaRN with both scales."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
    rope |= {"mscale": 0.7, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32}
    sizes |= {"qk_rope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 64}
    sizes |= {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
    }
    sizes |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "max_position_embeddings": 64}
    sizes |= {"rope_parameters": rope, "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1}
    return transformers.DeepseekV3Config(**(sizes | changes))


def deepseek_weights(config: Any, seed: int) -> State:
    """A state dict of transformers' DeepseekV3ForCausalLM."""
    grids = Grids(np.random.default_rng(seed))
    hidden, vocab, size = config.hidden_size, config.vocab_size, config.moe_intermediate_size
    state = {"model.embed_tokens.weight": grids.matrix(vocab, hidden, gain=4.0)}
    state["lm_head.weight"] = grids.matrix(vocab, hidden, gain=2.0)
    state["model.norm.weight"] = grids.vector(hidden, mean=1.0)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{name}.weight"] = grids.vector(hidden, mean=1.0)
        state |= {f"{prefix}self_attn.{name}": value for name, value in _latent(grids, config).items()}
        if layer < config.first_k_dense_replace:
            state |= _mlp(grids, f"{prefix}mlp.", hidden, config.intermediate_size)
            continue
        experts = config.n_routed_experts
        state[f"{prefix}mlp.gate.weight"] = grids.matrix(experts, hidden, bits=8, gain=3.0)
        state[f"{prefix}mlp.gate.e_score_correction_bias"] = grids.vector(experts)
        state[f"{prefix}mlp.experts.gate_up_proj"] = grids.matrix(experts, 2 * size, hidden, gain=2.0)
        state[f"{prefix}mlp.experts.down_proj"] = grids.matrix(experts, hidden, size)
        state |= _mlp(grids, f"{prefix}mlp.shared_experts.", hidden, size * config.n_shared_experts)
    return tensors(state)


def _latent(grids: Grids, config: Any) -> dict[str, F32]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rotated, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    out = {"kv_a_proj_with_mqa.weight": grids.matrix(rank + rotated, hidden)}
    out["kv_a_layernorm.weight"] = grids.vector(rank, mean=1.0)
    if config.q_lora_rank:
        out["q_a_proj.weight"] = grids.matrix(config.q_lora_rank, hidden)
        out["q_a_layernorm.weight"] = grids.vector(config.q_lora_rank, mean=1.0)
        out["q_b_proj.weight"] = grids.matrix(heads * (nope + rotated), config.q_lora_rank, gain=2.0)
    else:
        out["q_proj.weight"] = grids.matrix(heads * (nope + rotated), hidden, gain=2.0)
    keys = grids.matrix(heads, rank, nope, gain=2.0).swapaxes(
        1, 2
    )  # grouped along nope: turned for the bundle
    values = grids.matrix(heads, value, rank)
    out["kv_b_proj.weight"] = np.concatenate([keys, values], 1).reshape(-1, rank)
    out["o_proj.weight"] = grids.matrix(hidden, heads * value, gain=2.0)
    return out


def _mlp(grids: Grids, prefix: str, hidden: int, size: int) -> dict[str, F32]:
    wide = {f"{prefix}{name}_proj.weight": grids.matrix(size, hidden, gain=2.0) for name in ("gate", "up")}
    return wide | {f"{prefix}down_proj.weight": grids.matrix(hidden, size)}


def pack_mxfp4(config: Any, state: State, seed: int) -> tuple[State, State]:
    """(file tensors with random MXFP4 experts, the state dict that transformers' own dequantisation makes of them)."""
    rng = np.random.default_rng(seed)
    experts, hidden, size = config.num_local_experts, config.hidden_size, config.intermediate_size
    stored, exact = dict(state), dict(state)
    for layer in range(config.num_hidden_layers):
        for name, rows, cols in (("gate_up_proj", 2 * size, hidden), ("down_proj", hidden, size)):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = torch.from_numpy(rng.integers(0, 256, (experts, rows, cols // 32, 16), np.uint8))
            scales = torch.from_numpy(rng.integers(122, 126, (experts, rows, cols // 32)).astype(np.uint8))
            del stored[key]
            stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            exact[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return stored, exact


def build(config: Any, state: State) -> Any:
    """The transformers model with these weights, eager attention, float32."""
    config._attn_implementation = config._experts_implementation = "eager"
    kinds = {
        "gpt_oss": transformers.GptOssForCausalLM,
        "deepseek_v3": transformers.DeepseekV3ForCausalLM,
    }
    model = kinds[config.model_type](config).eval().float()
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


def router_gap(model: Any, ids: list[int]) -> float:
    """Smallest distance to another choice of any router: of logits, or of what its groups and experts are ranked by."""
    gaps: list[float] = []

    def border(sorted_values: Any, k: int) -> None:
        if k < sorted_values.shape[1]:  # else all are chosen
            gaps.append(float((sorted_values[:, k - 1] - sorted_values[:, k]).min()))

    def look(module: Any, _inputs: Any, output: Any) -> None:
        logits = output[0].double()
        if not hasattr(module, "e_score_correction_bias"):
            best = logits.sort(-1, descending=True).values
            border(best, module.top_k)
            return
        ranked = logits.sigmoid() + module.e_score_correction_bias
        groups = (
            ranked.view(len(ranked), module.num_group, -1).topk(2).values.sum(-1).sort(-1, descending=True)
        )
        k = module.topk_group
        border(groups.values, k)
        kept = torch.zeros_like(groups.values).scatter_(1, groups.indices[:, :k], 1).bool()
        inside = ranked.masked_fill(~kept.repeat_interleave(ranked.shape[1] // kept.shape[1], 1), -torch.inf)
        border(inside.sort(-1, descending=True).values, module.top_k)

    hooks = [m.register_forward_hook(look) for m in model.modules() if type(m).__name__.endswith("Router")]
    assert hooks
    run_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return min(gaps, default=float("inf"))


@dataclass(frozen=True)
class Reference:
    """What an engine must reproduce."""

    ids: list[int]
    logits: F32
    greedy: list[int]
    float64_gap: float
    router_gap: float
    greedy_gap: float


def reference(config: Any, state: State, seed: int, tokens: int = TOKENS, greedy: int = GREEDY) -> Reference:
    """Reference of `tokens` random ids and `greedy` further ones."""
    model = build(config, state)
    ids = [int(i) for i in np.random.default_rng(seed + 7).integers(0, config.vocab_size, tokens)]
    logits = run_logits(model, ids).astype(np.float32)
    further, greedy_gap = greedy_continuation(model, ids, greedy)
    gap = router_gap(model, ids + further)
    wide = build(config, state).double()
    with float64_arithmetic():
        truth = run_logits(wide, ids)
    assert truth.dtype == np.float64
    return Reference(ids, logits, further, float(np.abs(truth - logits).max()), gap, greedy_gap)


def save_form(folder: Path, config: Any, state: State, dtype: torch.dtype, shard_nbytes: int) -> None:
    """transformers' own save_pretrained."""
    model = build(config, state).to(dtype)
    for name, value in model.named_buffers():
        if name in state:
            value.data = state[name]  # float32, as real files have it
    model.save_pretrained(folder, max_shard_size=shard_nbytes)


def save_mxfp4(folder: Path, config: Any, stored: State) -> None:
    """One file in the form of openai's checkpoints: MXFP4 experts, all else bf16."""
    folder.mkdir(parents=True)
    raw = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "model_type": "gpt_oss"}
    raw["rope_scaling"] = {k: v for k, v in raw.pop("rope_parameters").items() if k != "rope_theta"}
    raw |= {"rope_theta": 150000.0, "dtype": "bfloat16"}
    raw["layer_types"] = list(raw["layer_types"])
    (folder / "config.json").write_text(json.dumps(raw, indent=1, default=str))
    file = {name: value if value.dtype == torch.uint8 else value.bfloat16() for name, value in stored.items()}
    save_file({name: value.contiguous() for name, value in file.items()}, folder / "model.safetensors")


def save_deepseek_style(folder: Path, config: Any, state: State) -> None:
    """As the released files: rope_scaling beside rope_theta, a layer of multi-token prediction behind the last one."""
    save_form(folder, config, state, torch.bfloat16, 100_000)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
    raw |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    path.write_text(json.dumps(raw, indent=1))
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    extra = {
        "model.layers.2.enorm.weight": torch.ones(64),
        "model.layers.2.eh_proj.weight": torch.ones(64, 128),
    }
    save_file({k: v.bfloat16() for k, v in extra.items()}, folder / "model-mtp.safetensors", {"format": "pt"})
    table["weight_map"] |= dict.fromkeys(extra, "model-mtp.safetensors")
    index.write_text(json.dumps(table, indent=1))


Draw = Callable[[int], tuple[Any, State]]


def settle(draw: Draw, seed: int, attempts: int = 200) -> tuple[Any, State, Reference]:
    """The first seed from `seed` on whose reference is far from every tie."""
    for tried in range(seed, seed + attempts):
        config, state = draw(tried)
        found = reference(config, state, tried)
        if found.router_gap >= LEAST_ROUTER_GAP and found.greedy_gap >= LEAST_GREEDY_GAP:
            return config, state, found
    raise SystemExit(f"no seed from {seed} on without a near-tie")


def main() -> None:
    """Makes all fixtures of these families afresh in the folder given (default: this one)."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    models: dict[str, Any] = {}
    fixtures: dict[str, Any] = {}
    logits: dict[str, Any] = {}

    def note(name: str, found: Reference, forms: dict[str, str]) -> None:
        entry = {k: v for k, v in found.__dict__.items() if k != "logits"}
        entry["tolerance"] = RELATIVE_TOLERANCE * float(np.abs(found.logits).max())
        models[name], logits[name] = entry, found.logits
        fixtures.update({path: {"model": name, "form": form} for path, form in forms.items()})
        for path in forms:
            shutil.rmtree(root / path, ignore_errors=True)

    config, state, found = settle(lambda s: (gpt_oss_config(), gpt_oss_weights(gpt_oss_config(), s)), 100)
    note("gpt_oss", found, {"gpt_oss_bf16": "save_pretrained, bfloat16, sharded"})
    save_form(root / "gpt_oss_bf16", config, state, torch.bfloat16, 100_000)

    def packed(seed: int) -> tuple[Any, State]:
        config = gpt_oss_config()
        return config, pack_mxfp4(config, gpt_oss_weights(config, seed), seed)[1]

    config, state, found = settle(packed, 300)
    note("gpt_oss_mxfp4", found, {"gpt_oss_mxfp4": "MXFP4 blocks and scales, one file, rope_scaling"})
    seed = next(
        s for s in range(300, 500) if torch.equal(packed(s)[1]["lm_head.weight"], state["lm_head.weight"])
    )
    save_mxfp4(root / "gpt_oss_mxfp4", config, pack_mxfp4(config, gpt_oss_weights(config, seed), seed)[0])

    config, state, found = settle(lambda s: (deepseek_config(), deepseek_weights(deepseek_config(), s)), 500)
    forms = {"deepseek_f32": "save_pretrained, float32, one file"}
    note("deepseek", found, forms | {"deepseek_bf16": "released style: rope_scaling, sharded, MTP layer"})
    save_form(root / "deepseek_f32", config, state, torch.float32, 10**9)
    save_deepseek_style(root / "deepseek_bf16", config, state)

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    index = {"made_with": versions, "models": models, "fixtures": fixtures}
    (root / "attention_families.json").write_text(json.dumps(index, indent=1) + "\n")
    np.savez_compressed(root / "attention_families.npz", allow_pickle=False, **logits)


if __name__ == "__main__":
    main()
