"""Reference logits of tiny models by Hugging Face transformers in float32 on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from checkpoint_forms import hf_state, text_config
from numpy.typing import NDArray
from tiny_weights import TinySpec, Weights


@dataclass(frozen=True)
class Reference:
    """What a correct engine must reproduce, and how much room rounding takes."""

    ids: list[int]  # the prompt
    logits: NDArray[np.float32]  # [tokens, vocab], float32 arithmetic
    greedy: list[int]  # continuation by argmax
    float64_gap: float  # max abs difference to the same model run in float64
    router_gap: float  # smallest distance of the router logits of the last chosen and first unchosen expert
    greedy_gap: float  # smallest distance between the two best logits over the continuation


def build_model(spec: TinySpec, weights: Weights) -> Any:
    """The transformers model with these weights, eager attention, float32."""
    kinds = {
        "qwen3_5_moe": (transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM),
        "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    }
    make_config, make_model = kinds[spec.model_type]
    fields = {key: value for key, value in text_config(spec).items() if key != "model_type"}
    config = make_config(**fields)
    config._attn_implementation = config._experts_implementation = "eager"
    model = make_model(config).eval().float()
    missing = model.load_state_dict(hf_state(weights), strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    assert set(missing.missing_keys) <= ({"lm_head.weight"} if spec.tied else set()), missing.missing_keys
    return model


def run_logits(model: Any, ids: list[int]) -> NDArray[Any]:
    """Logits at all positions of a fresh sequence, [tokens, vocab]."""
    with torch.no_grad():
        out = model(torch.tensor(ids)[None], use_cache=False)
    logits: NDArray[Any] = out.logits[0].numpy()
    return logits


@contextlib.contextmanager
def float64_arithmetic() -> Iterator[None]:
    """Turns transformers' explicit casts to float32 into casts to float64, to see float32's rounding."""
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept  # type: ignore[assignment]


def smallest_router_gap(model: Any, ids: list[int], top_k: int) -> float:
    """Smallest gap of router logits at the top-k border, over layers and tokens; inf if all are chosen."""
    with torch.no_grad():
        out = model(torch.tensor(ids)[None], use_cache=False, output_router_logits=True)
    gaps = [np.inf]
    for logits in getattr(out, "router_logits", None) or ():
        if logits.shape[-1] > top_k:
            best = logits.double().sort(-1, descending=True).values
            gaps.append(float((best[:, top_k - 1] - best[:, top_k]).min()))
    return min(gaps)


def greedy_continuation(model: Any, ids: list[int], count: int) -> tuple[list[int], float]:
    """`count` ids by argmax, each from a fresh forward, and the smallest gap between the two best logits."""
    tokens, gap = list(ids), np.inf
    for _ in range(count):
        last = run_logits(model, tokens)[-1]
        second, best = np.sort(last)[-2:]
        gap = min(gap, float(best - second))
        tokens.append(int(last.argmax()))
    return tokens[len(ids) :], gap


def make_reference(spec: TinySpec, weights: Weights, prompt: int, new: int) -> Reference:
    """Reference for `prompt` random ids and `new` greedy ones."""
    model, exact = build_model(spec, weights), build_model(spec, weights).double()
    return reference_of(model, exact, spec.seed, (prompt, new))


def reference_of(model: Any, exact: Any, seed: int, lengths: tuple[int, int]) -> Reference:
    """Reference of a float32 model beside the same one in float64, for (random, greedy) so many ids."""
    prompt, new = lengths
    config = model.config
    ids = [int(i) for i in np.random.default_rng(seed + 7).integers(0, config.vocab_size, prompt)]
    logits = run_logits(model, ids).astype(np.float32)
    greedy, greedy_gap = greedy_continuation(model, ids, new)
    with float64_arithmetic():
        truth = run_logits(exact, ids)
    assert truth.dtype == np.float64
    gap = smallest_router_gap(model, ids + greedy, getattr(config, "num_experts_per_tok", 0))
    return Reference(ids, logits, greedy, float(np.abs(truth - logits).max()), gap, greedy_gap)
