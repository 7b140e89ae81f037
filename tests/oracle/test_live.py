"""Freshly made tiny checkpoints: transformers and the engine, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_state import bundle_state
from checkpoint_forms import hf_state, write_fused, write_mlx, write_multimodal
from make_fixtures import write_pretrained
from reference_logits import Reference, make_reference
from tiny_weights import FULL, LINEAR, TinySpec, Weights, draw_weights

from flashmoe.bundle.reader import Bundle
from flashmoe.convert import convert
from flashmoe.engine.engine import Engine, EngineOptions

# Both sides round in float32: allow this, or this many times what transformers itself is away from float64.
# Models of more layers have tokens whose gated norm divides by a tiny norm, and err more.
TOLERANCE, TOLERANCE_FACTOR = 2e-4, 10
MOST_ROUNDING = 5e-4  # of transformers; above it the reference is too vague to test with
LEAST_ROUTER_GAP = 2e-4  # a nearer tie may be routed either way
GREEDY_TOKENS = 4

Writer = Callable[[Path, TinySpec, Weights], None]


@dataclass(frozen=True)
class Case:
    """One model, its length and the file form it goes through."""

    spec: TinySpec
    tokens: int
    write: Writer


def fused(dtype: str) -> Writer:
    return lambda folder, spec, weights: write_fused(folder, spec, weights, dtype)


def multimodal(folder: Path, spec: TinySpec, weights: Weights) -> None:
    write_multimodal(folder, spec, weights, "bf16", shards=2)


def mlx(nested: bool) -> Writer:
    return lambda folder, spec, weights: write_mlx(folder, spec, weights, nested)


DEEP = (LINEAR, LINEAR, FULL, LINEAR, FULL)
CASES = [
    Case(TinySpec("r1", 1000, k_heads=4, v_heads=4, conv=3, tied=True, experts=6, top_k=3), 90, fused("f32")),
    Case(TinySpec("r2", 1100, layer_types=(LINEAR,) * 3 + (FULL,), experts=8), 150, multimodal),
    Case(
        TinySpec("r4", 1200, v_heads=8, v_dim=24, k_dim=24, head_dim=64, kv_heads=1),
        33,
        write_pretrained("bf16", 10**6),
    ),
    Case(
        TinySpec("one", 1300, k_heads=1, v_heads=2, v_dim=32, heads=2, layer_types=(FULL, LINEAR), top_k=1),
        64,
        fused("bf16"),
    ),
    Case(
        TinySpec("next", 1400, model_type="qwen3_next", v_heads=8, dense_layers=(0,), layer_types=DEEP),
        130,
        write_pretrained("f32", 200_000),
    ),
    Case(
        TinySpec("next3", 1450, model_type="qwen3_next", v_heads=2, v_dim=32, conv=3, tied=True),
        65,
        write_pretrained("f16", 10**6),
    ),
    Case(
        TinySpec("mlx4", 1500, layer_types=DEEP, hidden=128, shared=192, lossless=False, experts=7, top_k=3),
        128,
        mlx(True),
    ),
    Case(
        TinySpec("mlx8", 1600, bits=8, vocab=131, lossless=False, scale_dtype="f16", v_heads=8),
        149,
        mlx(False),
    ),
    Case(TinySpec("mlx3", 1700, bits=3, group=32, moe=96, lossless=False, tied=True, conv=3), 71, mlx(False)),
    Case(
        TinySpec("mlx2", 1800, bits=2, hidden=128, moe=128, shared=128, lossless=False, v_dim=32),
        100,
        mlx(True),
    ),
]


def settle(case: Case) -> tuple[TinySpec, Weights, Reference]:
    """The first seed whose routing has no near-tie."""
    for seed in range(case.spec.seed, case.spec.seed + 90):
        spec = dataclasses.replace(case.spec, seed=seed)
        weights = draw_weights(spec)
        reference = make_reference(spec, weights, case.tokens, GREEDY_TOKENS)
        if reference.router_gap >= LEAST_ROUTER_GAP and reference.float64_gap <= MOST_ROUNDING:
            return spec, weights, reference
    raise AssertionError(f"{case.spec.name}: no seed without a near-tie")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec.name)
def test_engine_matches_transformers(case: Case, tmp_path: Path) -> None:
    spec, weights, reference = settle(case)
    case.write(tmp_path / "source", spec, weights)
    convert(tmp_path / "source", tmp_path / "bundle")
    with Engine.open(tmp_path / "bundle", EngineOptions(activations="f32")) as engine:
        got = np.array(engine.logits(reference.ids))
        engine.start()
        cut = case.tokens // 3
        pieces = [np.array(engine.feed(part)) for part in (reference.ids[:cut], reference.ids[cut:])]
    tolerance = max(TOLERANCE, TOLERANCE_FACTOR * reference.float64_gap)
    assert np.abs(got - reference.logits).max() <= tolerance
    assert np.array_equal(np.concatenate(pieces).view(np.uint32), got.view(np.uint32))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.spec.model_type == "qwen3_5_moe"], ids=lambda case: case.spec.name
)
def test_bundle_holds_the_same_numbers(case: Case, tmp_path: Path) -> None:
    weights = draw_weights(case.spec)
    case.write(tmp_path / "source", case.spec, weights)
    convert(tmp_path / "source", tmp_path / "bundle")
    expected, got = hf_state(weights), bundle_state(Bundle.open(tmp_path / "bundle"))
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
