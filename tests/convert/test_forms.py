"""The same weights in every form give the same bundle; MLX weights come through bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle, FfnLayout, TileCodec, dequantize_ffn
from flashmoe.convert import convert
from flashmoe.errors import CheckpointError

WEIGHT_FILES = ("resident.safetensors", "experts/layer-000.bin", "experts/layer-001.bin")


def weight_bytes(bundle: Path) -> list[bytes]:
    return [(bundle / name).read_bytes() for name in WEIGHT_FILES]


def values(bundle: Bundle, name: str) -> Any:
    """The float32 values of a bundle tensor, an FFN part or stacked experts, by canonical name."""
    if ".experts." in name:
        layer, part = (
            int(name.split(".")[1]),
            ("gate", "up", "down").index(name.split(".")[-1].removesuffix("_proj")),
        )
        entry = bundle.expert_layers[layer]
        return np.stack(
            [dequantize_ffn(entry.ffn, bundle.read_expert(layer, e))[part] for e in range(entry.count)]
        )
    if ".shared_expert." in name:
        record, part = name.rsplit(".", 1)
        layout = bundle.tensor(record).codec
        assert isinstance(layout, FfnLayout)
        return dequantize_ffn(layout, bundle.read(record))[("gate_proj", "up_proj", "down_proj").index(part)]
    info = bundle.tensor(name)
    data = bundle.read(name)
    return info.codec.dequantize(data, info.rows, info.cols) if isinstance(info.codec, TileCodec) else data


def test_all_hugging_face_forms_give_the_same_bytes(tmp_path: Path, forms: Any) -> None:
    model = forms.model()
    nested = {"model_type": "qwen3_5_moe", "text_config": forms.config, "vision_config": {"depth": 1}}
    extra = {
        name: forms.stored(np.ones((4, 4), np.float32))
        for name in ("model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight", "mtp.layers.0.mlp.gate.weight")
    }
    next_config = forms.config | {
        "model_type": "qwen3_next",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    }
    del next_config["rope_parameters"]
    sources = {
        "fused": forms.write(tmp_path / "fused", model.hugging_face()),
        "single": forms.write(tmp_path / "single", model.hugging_face(fused=False)),
        "sharded": forms.write(tmp_path / "sharded", model.hugging_face(fused=False), shards=5),
        "multimodal": forms.write(
            tmp_path / "multi", extra | model.hugging_face("model.language_model."), nested, shards=2
        ),
        "next": forms.write(tmp_path / "next", model.qwen3_next(), next_config),
        "f32": forms.write(tmp_path / "f32", model.hugging_face(dtype="F32")),
    }
    reports = {name: convert(path, tmp_path / f"{name}.bundle") for name, path in sources.items()}
    first = weight_bytes(tmp_path / "fused.bundle")
    for name, report in reports.items():
        assert weight_bytes(report.path) == first, name
        assert report.unknown == []
        assert not report.lossless
    skipped = [(s.prefix, s.tensors, s.nbytes) for s in reports["multimodal"].skipped]
    assert skipped == [("model.visual.", 1, 32), ("mtp.", 2, 64)]


def test_zero_centred_norms_are_stored_as_multipliers(tmp_path: Path, forms: Any, source: Path) -> None:
    model = forms.model()
    bundle = Bundle.open(convert(source, tmp_path / "b").path)
    for name, found in model.vectors.items():
        centred = name.endswith("norm") and not name.endswith("linear_attn.norm")
        expected = found + np.float32(1) if centred else found
        assert np.array_equal(values(bundle, name), expected.reshape(bundle.tensor(name).shape)), name


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_floats_are_quantised_within_half_a_step_or_better_on_average(
    tmp_path: Path, forms: Any, source: Path, bits: int
) -> None:
    model = forms.model()
    bundle = Bundle.open(convert(source, tmp_path / "b", bits=bits, fit="range").path)
    squares = Bundle.open(convert(source, tmp_path / "s", bits=bits).path)
    for name, weight in model.matrices.items():
        used = bits if ".experts." in name else 4 if bits <= 4 else 8
        if name.endswith((".gate", "shared_expert_gate", "in_proj_a", "in_proj_b")):
            used = 8
        group = 64 if weight.shape[-1] % 64 == 0 else 32
        grouped = weight.reshape(*weight.shape[:-1], -1, group)
        step = np.ptp(grouped, axis=-1, keepdims=True) / ((1 << used) - 1)
        error = np.abs(values(bundle, name).reshape(grouped.shape) - grouped)
        # Half a step, and what rounding scale (2**-9 of the range) and bias to bf16 can add.
        slack = np.ptp(grouped, axis=-1, keepdims=True) * 2.0**-9 + np.abs(grouped).max() * 2.0**-9
        assert (error <= step / 2 + slack).all(), name
        fitted = values(squares, name).reshape(grouped.shape) - grouped
        assert (np.square(fitted).sum(-1) <= np.square(error).sum(-1) * (1 + 1e-4)).all(), name


MIXES = {
    "4 bit group 64": lambda name: (4, 32 if name.endswith("experts.down_proj") else 64),
    "8 bit group 32": lambda name: (8, 32),
    "gates of 8": lambda name: (8, 64) if name.endswith("gate") else (4, 32),
    "3 5 6 2": lambda name: ((2, 3, 5, 6)[len(name) % 4], 32),
    "gate and up differ": lambda name: (
        2 if "gate_proj" in name else 3,
        32 if "up" in name or "down" in name else 64,
    ),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("prefix", ["language_model.", ""])
@pytest.mark.parametrize("scale_dtype", ["BF16", "F16", "F32"])
def test_mlx_weights_are_bit_equal(
    tmp_path: Path, forms: Any, mix: str, prefix: str, scale_dtype: str
) -> None:
    tensors, truth, table = forms.model(1).mlx(prefix, MIXES[mix])
    if scale_dtype != "BF16":
        tensors = with_scales(tensors, truth, table, forms, scale_dtype)
    source = forms.write(tmp_path / "source", tensors, forms.config | {"quantization": table})
    report = convert(source, tmp_path / "bundle")
    assert report.lossless
    assert report.unknown == []
    bundle = Bundle.open(report.path)
    for name, expected in truth.items():
        found = values(bundle, name)
        assert np.array_equal(found, expected.reshape(found.shape)), name


def with_scales(tensors: Any, truth: Any, table: Any, forms: Any, dtype: str) -> Any:
    """Replaces all scales by powers of two and biases by their multiples: exact in every 16-bit type."""
    changed = dict(tensors)
    for module, form in list(table.items())[3:]:
        name = module.removeprefix("language_model.").removeprefix("model.").replace("switch_mlp", "experts")
        shape = forms.shapes()[name]
        groups = (*shape[:-1], shape[-1] // form["group_size"])
        changed[f"{module}.scales"] = forms.stored(np.full(groups, 2.0**-6, np.float32), dtype)
        changed[f"{module}.biases"] = forms.stored(np.full(groups, -3 * 2.0**-6, np.float32), dtype)
        codes = unpacked(changed[f"{module}.weight"], form["bits"], shape)
        truth[name] = ((codes - np.float32(3)) * np.float32(2.0**-6)).astype(np.float32)
    return changed


def unpacked(weight: Any, bits: int, shape: tuple[int, ...]) -> Any:
    stream = np.unpackbits(np.frombuffer(weight.data, np.uint8), bitorder="little").reshape(-1, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=1).astype(np.float32).reshape(shape)


def test_groups_of_128_become_two_of_64(tmp_path: Path, forms: Any) -> None:
    wide = forms.config | {"shared_expert_intermediate_size": 128}
    tensors, truth, table = forms.model(2).mlx("", MIXES["4 bit group 64"])
    rng = np.random.default_rng(0)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.shared_expert"
        for part, shape in {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}.items():
            group = 128 if part == "down" else 64
            codes = rng.integers(0, 16, shape, dtype=np.uint8)
            scales, biases = (
                rng.integers(1, 9, (shape[0], shape[1] // group)).astype(np.float32) for _ in range(2)
            )
            words = (
                codes.reshape(shape[0], -1, 8).astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))
            ).sum(2)
            module = f"{prefix}.{part}_proj"
            tensors[f"{module}.weight"] = forms.stored(words, "U32")
            tensors[f"{module}.scales"], tensors[f"{module}.biases"] = (
                forms.stored(scales),
                forms.stored(biases),
            )
            table[module] = {"group_size": group, "bits": 4}
            truth[module.removeprefix("model.")] = codes * np.repeat(scales, group, 1) + np.repeat(
                biases, group, 1
            )
    source = forms.write(tmp_path / "source", tensors, wide | {"quantization": table})
    bundle = Bundle.open(convert(source, tmp_path / "bundle").path)
    for name, expected in truth.items():
        if "shared_expert." in name:
            assert np.array_equal(values(bundle, name), expected), name


def test_float32_scales_that_fit_no_half_are_rounded_and_owned_up_to(tmp_path: Path, forms: Any) -> None:
    tensors, _, table = forms.model(1).mlx("", MIXES["4 bit group 64"])
    name = "model.layers.0.mlp.switch_mlp.up_proj.scales"
    tensors[name] = forms.stored(np.full((4, 32, 1), 0.1, np.float32), "F32")
    source = forms.write(tmp_path / "source", tensors, forms.config | {"quantization": table})
    report = convert(source, tmp_path / "bundle")
    assert not report.lossless
    assert "rounded" in report.note
    assert json.loads((report.path / "manifest.json").read_text())["lossless"] is False


def test_bits_above_the_source_widen_codes_and_stay_lossless(tmp_path: Path, forms: Any) -> None:
    tensors, truth, table = forms.model(1).mlx("", MIXES["4 bit group 64"])
    source = forms.write(tmp_path / "source", tensors, forms.config | {"quantization": table})
    report = convert(source, tmp_path / "bundle", bits=8)
    assert report.lossless
    bundle = Bundle.open(report.path)
    assert bundle.expert_layers[0].ffn.gate_up.bits == 8
    name = "layers.0.mlp.experts.gate_proj"
    assert np.array_equal(values(bundle, name), truth[name])


def test_bits_below_the_source_requantise_and_say_so(tmp_path: Path, forms: Any) -> None:
    tensors, truth, table = forms.model(1).mlx("", MIXES["4 bit group 64"])
    source = forms.write(tmp_path / "source", tensors, forms.config | {"quantization": table})
    report = convert(source, tmp_path / "bundle", bits=2)
    assert not report.lossless
    assert report.note.startswith("lossy")
    bundle = Bundle.open(report.path)
    assert bundle.expert_layers[1].ffn.down.bits == 2
    assert np.array_equal(values(bundle, "lm_head"), truth["lm_head"]), (
        "4-bit resident matrices stay as they are"
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fit", ["squares", "range"])
def test_values_beyond_any_scale_are_refused(tmp_path: Path, forms: Any, fit: str) -> None:
    """Finite, and their range is not: a scale of it would make every value of the group infinite."""
    tensors = forms.model().hugging_face()
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    values = np.zeros(tensors[name].shape, np.float32)
    values[3, :2] = 3e38, -3e38
    tensors[name] = forms.stored(values)
    source = forms.write(tmp_path / "source", tensors, forms.config)
    with pytest.raises(CheckpointError, match=r"shared_expert\.up_proj.*no scale is finite"):
        convert(source, tmp_path / "bundle", fit=fit)
    assert not (tmp_path / "bundle" / "manifest.json").exists()
