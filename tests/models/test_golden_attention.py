"""gpt-oss and DeepSeek-V3 beyond what test_golden_tiny.py asks of every family: caches, snapshots, plans, MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.bundle.codecs import FP4_TABLE, dequantize_ffn, unpack_biases
from flashmoe.bundle.reader import Bundle
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.snapshot import copied

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX: dict[str, Any] = json.loads((GOLDEN / "attention_families.json").read_text(encoding="utf-8"))
FORMS = sorted(INDEX["fixtures"])

Logits = NDArray[np.float32]


def golden(form: str) -> tuple[dict[str, Any], Logits]:
    """The reference of a form: its entry and logits [tokens, vocab]."""
    name = INDEX["fixtures"][form]["model"]
    with np.load(GOLDEN / "attention_families.npz") as logits:
        return INDEX["models"][name], logits[name]


def open_engine(bundle: Path, **options: Any) -> Engine:
    return Engine.open(bundle, EngineOptions(**{"activations": "f32", "threads": 2} | options))


def same_bits(a: Logits, b: Logits) -> bool:
    """Equal as bit patterns, not only as numbers."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_pieces_chunks_threads_and_slots_change_no_bit(
    bundles: dict[str, Path], form: str, activations: str
) -> None:
    ids = golden(form)[0]["ids"]
    with open_engine(bundles[form], activations=activations) as engine:
        whole = np.array(engine.logits(ids))
        for sizes in ([1] * 40, [7, 1, 20, 12], [39, 1]):
            engine.start()
            ends = np.cumsum(sizes)
            rows = [np.array(engine.feed(ids[e - n : e])) for n, e in zip(sizes, ends, strict=True)]
            assert same_bits(np.concatenate(rows), whole)
    for options in ({"prefill_chunk": 9}, {"threads": 1}, {"threads": 3, "expert_slots": 8}):
        with open_engine(bundles[form], activations=activations, **options) as engine:
            assert same_bits(np.array(engine.logits(ids)), whole)


@pytest.mark.parametrize("kv_cache", ["f32", "f16", "int8"])
@pytest.mark.parametrize("form", ["gpt_oss_bf16", "deepseek_f32"])
def test_a_snapshot_is_the_whole_sequence(bundles: dict[str, Path], form: str, kv_cache: str) -> None:
    """What the prefix cache keeps of 21 tokens: the rest gives the same bits from it."""
    ids = golden(form)[0]["ids"]
    with open_engine(bundles[form], kv_cache=kv_cache, sequences=2, context=64) as engine:
        first, second = engine.states
        engine.step([(first, ids[:21])], [])
        saved = copied(first.arrays())
        wanted = engine.step([(first, ids[21:])], [0])[0].copy()
        engine.step([(second, ids[5:25])], [])  # another sequence was there before
        second.restore(21, [[array] for array in saved])
        np.testing.assert_array_equal(engine.step([(second, ids[21:])], [0])[0], wanted)


@pytest.mark.parametrize("form", ["gpt_oss_bf16", "deepseek_f32"])
def test_narrow_caches_change_little(bundles: dict[str, Path], form: str) -> None:
    model, expected = golden(form)
    for kv_cache, bound in (("f16", 2e-3), ("int8", 5e-2)):
        with open_engine(bundles[form], kv_cache=kv_cache) as engine:
            errors = np.abs(np.array(engine.logits(model["ids"])) - expected).max(1)
        # Of half of the tokens: where a router changes its mind, any error is possible.
        assert np.median(errors) <= bound * np.abs(expected).max()


def test_forms_of_one_model_give_the_same_bits(bundles: dict[str, Path]) -> None:
    ids = golden("deepseek_f32")[0]["ids"]
    logits = []
    for form in ("deepseek_f32", "deepseek_bf16"):
        with open_engine(bundles[form]) as engine:
            logits.append(np.array(engine.logits(ids)))
    assert same_bits(*logits)


def test_the_state_is_planned_by_what_it_takes(bundles: dict[str, Path]) -> None:
    """A DeepSeek-V3 position is one latent and its rotated key; the plan counts exactly what is allocated."""
    for form, numbers in (("deepseek_f32", 2 * (32 + 16)), ("gpt_oss_bf16", 2 * 2 * 2 * 16)):
        with open_engine(bundles[form], kv_cache="f16", context=64) as engine:
            (state,) = engine.states
            state.position = 64
            held = sum(array.nbytes for array in state.arrays())
            assert held == 64 * 2 * numbers
            assert held <= engine.plan.state_nbytes <= held + 64 * 64 * 4 + 40_000


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def test_mxfp4_experts_are_taken_over_exactly(bundles: dict[str, Path]) -> None:
    """Every value of the file's blocks and scales, in four bits: as the OCP MX specification defines them."""
    from safetensors import safe_open

    file = safe_open(GOLDEN / "gpt_oss_mxfp4" / "model.safetensors", framework="np")
    bundle = Bundle.open(bundles["gpt_oss_mxfp4"])

    def values(name: str, expert: int) -> NDArray[np.float32]:
        blocks, scales = (file.get_tensor(f"{name}_{part}")[expert] for part in ("blocks", "scales"))
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
        return (FP4[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(len(blocks), -1)

    assert bundle.manifest.format_version == 3
    for layer in bundle.expert_layers:
        assert layer.ffn.gate_up.table == layer.ffn.down.table == FP4_TABLE
        assert (layer.ffn.gate_up.bits, layer.ffn.gate_up.group) == (4, 32)
        name = f"model.layers.{layer.layer}.mlp.experts."
        for expert in range(layer.count):
            record = bundle.read_expert(layer.layer, expert)
            gate, up, down = dequantize_ffn(layer.ffn, record)
            gate_up = values(f"{name}gate_up_proj", expert)
            np.testing.assert_array_equal(gate, gate_up[0::2])
            np.testing.assert_array_equal(up, gate_up[1::2])
            np.testing.assert_array_equal(down, values(f"{name}down_proj", expert))
            biases = unpack_biases(layer.ffn, record)
            assert len(biases.gate) == len(biases.up) == len(gate)
            assert np.any(biases.gate != biases.up)
