"""Synthetic bundles: whole, repeatable, skewed as asked, and with a tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from flashmoe.bundle import Bundle, TileCodec, dequantize_ffn
from flashmoe.convert import describe, synth, verify
from flashmoe.errors import BundleError, ConfigError


@pytest.fixture
def config(tmp_path: Path, forms: Any) -> Path:
    value = copy.deepcopy(forms.config) | {"vocab_size": 320, "num_experts": 32, "num_experts_per_tok": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    return path


def test_a_synthetic_bundle_is_whole_and_repeatable(config: Path, tmp_path: Path) -> None:
    first, second, other = (synth(config, tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert verify(Bundle.open(first.path)).ok
    for file in ("resident.safetensors", "experts/layer-001.bin", "manifest.json"):
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes()
        assert (first.path / file).read_bytes() != (other.path / file).read_bytes()


def test_weights_keep_activations_sane(config: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(synth(config, tmp_path / "b", bits=3).path)
    for name in ("layers.0.linear_attn.in_proj_qkv", "layers.1.self_attn.o_proj"):
        info = bundle.tensor(name)
        assert isinstance(info.codec, TileCodec)
        values = info.codec.dequantize(bundle.read(name), info.rows, info.cols)
        assert 0.6 < values.std() * info.cols**0.5 < 1.6
        assert abs(values.mean()) < 0.1 * values.std()
    layer = bundle.expert_layers[1]
    assert layer.ffn.gate_up.bits == 3
    for values in dequantize_ffn(layer.ffn, bundle.read_expert(1, 5)):
        assert 0.6 < values.std() * values.shape[1] ** 0.5 < 1.6
    assert (bundle.read("layers.0.linear_attn.dt_bias") < 0).all()


def test_experts_differ_from_each_other(config: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(synth(config, tmp_path / "b").path)
    records = {bundle.read_expert(layer, e).tobytes() for layer in range(2) for e in range(32)}
    assert len(records) == 64


def test_layers_cut_the_model(config: Path, tmp_path: Path) -> None:
    report = synth(config, tmp_path / "b", layers=1)
    assert report.layers == 1
    assert describe(report.path)["layers"] == 1
    with pytest.raises(ConfigError, match="choose 1 to 2"):
        synth(config, tmp_path / "c", layers=3)


def routing_entropy(bundle: Bundle, chosen: int) -> float:
    """Entropy of how often each expert of layer 0 is among the chosen, in bits."""
    info = bundle.tensor("layers.0.mlp.gate")
    assert isinstance(info.codec, TileCodec)
    gate = info.codec.dequantize(bundle.read(info.name), info.rows, info.cols)
    tokens = np.random.default_rng(0).normal(size=(4000, info.cols)).astype(np.float32)
    picks = np.argsort(tokens @ gate.T, axis=1)[:, -chosen:]
    shares = np.bincount(picks.ravel(), minlength=info.rows) / picks.size
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


def test_router_skew_concentrates_the_choice(config: Path, tmp_path: Path) -> None:
    bundles = [
        Bundle.open(synth(config, tmp_path / str(s), router_skew=s).path) for s in (0.0, 0.5, 1.0, 2.0)
    ]
    entropies = [routing_entropy(bundle, 4) for bundle in bundles]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] > 4.8, "32 experts evenly are 5 bits"
    assert entropies[3] < entropies[0] - 0.7


@pytest.mark.parametrize("options", [{"bits": 5}, {"router_skew": -1.0}, {"router_skew": 9.0}])
def test_options_out_of_range_are_refused(config: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="choose"):
        synth(config, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_the_tokenizer_knows_every_byte(config: Path, tmp_path: Path) -> None:
    path = synth(config, tmp_path / "b").path
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "naïve ☃\n\tend"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<|im_end|>") == 258
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [256, 258]


def test_an_interrupted_synth_goes_on(config: Path, tmp_path: Path) -> None:
    whole = synth(config, tmp_path / "whole").path

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(config, tmp_path / "b", progress=stop)
    with pytest.raises(BundleError, match="other options"):
        synth(config, tmp_path / "b", seed=3)
    again = synth(config, tmp_path / "b").path
    for file in whole.rglob("*.*"):
        assert (again / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_mxfp4_experts_have_its_table(tmp_path: Path) -> None:
    """The shape of a checkpoint in MXFP4, with values of the right size and no mean."""
    raw = json.loads((Path(__file__).parents[1] / "golden" / "gpt_oss_mxfp4" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vocab_size": 320}))
    bundle = Bundle.open(synth(tmp_path / "config.json", tmp_path / "b").path)
    assert verify(bundle).ok
    layer = bundle.expert_layers[0]
    assert layer.ffn.gate_up.table is not None
    gate, up, down = dequantize_ffn(layer.ffn, bundle.read_expert(0, 1))
    for values, fan_in in ((gate, 64), (up, 64), (down, 64)):
        assert 0.6 < values.std() * fan_in**0.5 < 1.6
        assert abs(values.mean()) < 0.1 * values.std()
