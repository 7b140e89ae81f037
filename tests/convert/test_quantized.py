"""Checkpoints in quantised forms become bundles: codes are taken over where that loses nothing, and the note tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle, FfnLayout, TileCodec, dequantize_ffn
from flashmoe.convert import convert, describe

FORMS = [
    "fp8 block", "fp8 channel", "int8 channel", "gptq", "gptq of 64, v2", "gptq 2 bit", "gptq asymmetric",
    "gptq act-order", "awq symmetric", "awq", "packed int4", "packed int4 asymmetric", "packed int4 channel",
    "packed int8", "packed int3", "packed int6 asymmetric", "packed int4 act-order", "nvfp4", "mxfp4",
]  # fmt: skip
LEFT = ("embed_tokens", "lm_head", ".gate", "shared_expert_gate", "in_proj_a", "in_proj_b")


def checkpoint(folder: Path, forms: Any, packers: Any, form: str) -> tuple[Path, dict[str, Any]]:
    """The tiny model: what quantisers leave alone in bf16, one matrix for each expert."""
    tensors = forms.model().hugging_face(fused=False)
    truth, config = {}, {}
    for i, (name, shape) in enumerate(forms.shapes().items()):
        if name.endswith(LEFT):
            continue
        *lead, rows, cols = shape
        parts = [packers.make(form, rows, cols, seed=100 * i + e) for e in range(lead[0] if lead else 1)]
        for e, part in enumerate(parts):
            module = f"model.{name}".replace(".experts.", f".experts.{e}.")
            del tensors[f"{module}.weight"]
            tensors |= {f"{module}{end}": tensor for end, tensor in part.tensors.items()}
            config = part.config
        truth[name] = np.concatenate([part.values for part in parts]).reshape(shape)
    return forms.write(folder, tensors, forms.config | {"quantization_config": config}, shards=3), truth


def matrix(bundle: Bundle, name: str) -> Any:
    """The float32 values of a matrix of the bundle, experts stacked, by canonical name."""
    head, last = name.rsplit(".", 1)
    part = {"gate_proj": 0, "up_proj": 1, "down_proj": 2}.get(last)
    if ".experts." in name and part is not None:
        layer = int(name.split(".")[1])
        entry = bundle.expert_layers[layer]
        records = [bundle.read_expert(layer, e) for e in range(entry.count)]
        return np.stack([dequantize_ffn(entry.ffn, record)[part] for record in records])
    info = bundle.tensor(head if part is not None else name)
    data = bundle.read(head if part is not None else name)
    if part is not None:
        assert isinstance(info.codec, FfnLayout)
        return dequantize_ffn(info.codec, data)[part]
    assert isinstance(info.codec, TileCodec)
    return info.codec.dequantize(data, info.rows, info.cols)


def used_bits(bundle: Bundle, name: str) -> int:
    if ".experts." in name:
        ffn = bundle.expert_layers[int(name.split(".")[1])].ffn
        return ffn.down.bits if name.endswith("down_proj") else ffn.gate_up.bits
    codec = bundle.tensor(name.rsplit(".", 1)[0] if ".shared_expert." in name else name).codec
    if isinstance(codec, FfnLayout):
        codec = codec.down if name.endswith("down_proj") else codec.gate_up
    assert isinstance(codec, TileCodec)
    return codec.bits


@pytest.mark.parametrize("form", FORMS)
def test_values_of_the_bundle(tmp_path: Path, forms: Any, quantized_forms: Any, form: str) -> None:
    source, truth = checkpoint(tmp_path / "source", forms, quantized_forms, form)
    told = describe(source)
    report = convert(source, tmp_path / "bundle", fit="range")
    assert told["note"] == report.note
    assert report.unknown == []
    assert not report.lossless, "the bf16 matrices were quantised"
    bundle = Bundle.open(report.path)
    kept = not any(word in report.note for word in ("rounded", "anew"))
    assert kept == quantized_forms.FORMS[form][2], report.note
    for name, values in truth.items():
        found = matrix(bundle, name)
        if kept:
            assert np.array_equal(found, values), name
            continue
        groups = values.reshape(*values.shape[:-1], -1, 32)
        span = np.ptp(values.reshape(-1, values.shape[-1]), axis=1).max()
        assert np.abs(found - values).max() <= span * (0.5 / (2 ** used_bits(bundle, name) - 1) + 2.0**-7), (
            name
        )
        if "rounded" in report.note:  # codes are the source's: 2**-12 of what is multiplied and added
            limit = 2.0**-11 * 2 * np.abs(groups).max() * 16
            assert np.abs(found - values).max() <= limit, name


@pytest.mark.parametrize(
    ("form", "note"),
    [
        ("fp8 block", "FP8 quantised anew to 8 bit"),
        ("gptq act-order", "GPTQ with act-order quantised anew to 4 bit"),
        ("gptq asymmetric", "nearly lossless: codes of GPTQ kept, scales rounded to 16 bits"),
        ("awq symmetric", "codes of AWQ kept"),
        ("nvfp4", "NVFP4 quantised anew to 8 bit"),
    ],
)
def test_the_note_tells_what_happened(
    tmp_path: Path, forms: Any, quantized_forms: Any, form: str, note: str
) -> None:
    source, _ = checkpoint(tmp_path / "source", forms, quantized_forms, form)
    assert note in describe(source)["note"]


def test_bits_that_are_asked_for_win(tmp_path: Path, forms: Any, quantized_forms: Any) -> None:
    for form, bits in (("fp8 block", 4), ("gptq act-order", 8), ("gptq", 2)):
        source, _ = checkpoint(tmp_path / form, forms, quantized_forms, form)
        report = convert(source, tmp_path / f"{form}.bundle", bits=bits)
        assert Bundle.open(report.path).expert_layers[0].ffn.down.bits == bits


def test_a_conversion_goes_on_without_the_finished_source(
    tmp_path: Path, forms: Any, quantized_forms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that needs a look at the data was decided before the first shard was deleted."""
    from flashmoe.convert.writing import UnitWriter

    class KilledError(Exception):
        pass

    for form in ("gptq asymmetric", "gptq act-order"):
        source, _ = checkpoint(tmp_path / form / "source", forms, quantized_forms, form)
        whole = convert(source, tmp_path / form / "whole").path
        written: list[str] = []
        original = UnitWriter.write

        def killed(
            self: UnitWriter, unit: Any, written: list[str] = written, original: Any = original
        ) -> None:
            if written:
                raise KilledError
            original(self, unit)
            written.append(unit.key)

        with monkeypatch.context() as patch:
            patch.setattr(UnitWriter, "write", killed)
            with pytest.raises(KilledError):
                convert(source, tmp_path / form / "bundle", consume_source=True)
        report = convert(source, tmp_path / form / "bundle", consume_source=True)
        assert report.resumed
        for file in ("resident.safetensors", "experts/layer-000.bin", "experts/layer-001.bin"):
            assert (report.path / file).read_bytes() == (whole / file).read_bytes(), file
