"""config.json of gpt-oss and DeepSeek-V3: the real ones, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.errors import ConfigError
from flashmoe.models.registry import find_family
from flashmoe.nn.rotary import Rope, RotaryTable
from flashmoe.nn.yarn import Yarn, magnitude

REAL = Path(__file__).parents[3] / "shared" / "configs"
GOLDEN = Path(__file__).parents[1] / "golden"


def real(name: str) -> dict[str, Any]:
    path = REAL / f"{name}_config.json"
    if not path.is_file():
        pytest.skip(f"needs the published configs at {REAL}")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def tiny(form: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / form / "config.json").read_text())
    return config


def config_of(raw: dict[str, Any]) -> Any:
    return find_family(raw).config(raw)


def test_gpt_oss_20b() -> None:
    config = config_of(real("openai--gpt-oss-20b"))
    assert config.windows == (128, 0) * 12
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (32, 4, 2880)
    assert (config.glu.alpha, config.glu.limit) == (1.702, 7.0)
    scaling = Yarn(150000.0, 32.0, 4096, 32.0, 1.0, False, 0.1 * math.log(32) + 1)
    assert config.rope == Rope(64, 150000.0, scaling)
    layers = find_family(real("openai--gpt-oss-20b")).architecture(config).layers
    assert [layer.mixer.window for layer in layers[:2]] == [128, 0]  # type: ignore[attr-defined]


def test_deepseek_v3() -> None:
    raw = real("deepseek-ai--DeepSeek-V3")
    config = config_of(raw)
    assert config.dense_layers == {0, 1, 2}
    assert (config.kv_lora_rank, config.q_lora_rank, config.v_head_dim) == (512, 1536, 128)
    assert (config.routing.groups, config.routing.topk_groups, config.routing.scale) == (8, 4, 2.5)
    assert config.rope.rotated == 64
    assert config.rope.scaling.amplitude == 1.0  # mscale and mscale_all_dim are equal
    assert config.score_scale == pytest.approx(192**-0.5 * magnitude(40) ** 2)
    # 576 numbers a position and layer, instead of 40,960.
    assert find_family(raw).architecture(config).position_nbytes(np.float16) == 61 * 576 * 2
    spec = find_family(raw).spec(config)
    assert spec.unused == ("layers.61.",)
    assert len(spec.experts) == 58


def test_the_state_of_deepseek_v3_is_a_latent_a_position() -> None:
    config = config_of(raw := real("deepseek-ai--DeepSeek-V3"))
    nbytes = find_family(raw).architecture(config).state_nbytes(8192, np.float16)
    assert 8192 * 61 * 576 * 2 <= nbytes <= 1.01 * 8192 * 61 * 576 * 2


def test_yarn_keeps_the_fast_and_slows_the_slow() -> None:
    plain = RotaryTable(2, Rope(64, 150000.0))
    scaled = RotaryTable(2, Rope(64, 150000.0, Yarn(150000.0, 32.0, 4096, truncate=False, amplitude=1.5)))
    angles = [np.arctan2(table.sin[1], table.cos[1]) for table in (plain, scaled)]
    ratio = angles[1] / angles[0]
    np.testing.assert_allclose(ratio[:8], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[-8:], 1 / 32, rtol=1e-4)
    assert (np.diff(ratio) <= 1e-6).all()
    np.testing.assert_allclose(np.hypot(scaled.sin, scaled.cos), 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("gpt_oss_bf16", {"attention_bias": False}, "attention_bias"),
        ("gpt_oss_bf16", {"hidden_act": "gelu"}, "hidden_act"),
        ("gpt_oss_bf16", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("gpt_oss_bf16", {"layer_types": 7}, "layer_types"),
        ("gpt_oss_bf16", {"sliding_window": 0}, "sliding_window"),
        ("gpt_oss_bf16", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("gpt_oss_bf16", {"swiglu_limit": -1}, "swiglu_limit"),
        ("gpt_oss_bf16", {"rope_parameters": 3}, "rope_parameters"),
        ("gpt_oss_bf16", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type"),
        ("gpt_oss_bf16", {"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "factor"),
        ("gpt_oss_bf16", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "original_max_position"),
        ("deepseek_f32", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_f32", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_f32", {"attention_bias": True}, "attention_bias"),
        ("deepseek_f32", {"n_group": 3}, "n_group"),
        ("deepseek_f32", {"topk_group": 5}, "topk_group"),
        ("deepseek_f32", {"num_experts_per_tok": 8}, "num_experts_per_tok"),
        ("deepseek_f32", {"kv_lora_rank": 1024}, "kv_lora_rank"),
        ("deepseek_f32", {"kv_lora_rank": 40}, "kv_lora_rank"),
        ("deepseek_f32", {"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ("deepseek_f32", {"qk_nope_head_dim": 24}, "qk_nope_head_dim"),
        ("deepseek_f32", {"v_head_dim": 12}, "v_head_dim"),
        ("deepseek_f32", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ("deepseek_f32", {"rope_interleave": 1}, "rope_interleave"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(form: str, change: dict[str, Any], said: str) -> None:
    raw = tiny(form)
    config_of(raw)
    with pytest.raises(ConfigError, match=said) as caught:
        config_of(raw | change)
    assert "\n" not in str(caught.value)
