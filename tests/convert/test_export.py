"""A bundle exported is the checkpoint it came from: names, shapes, values; killed, it goes on; half is nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle
from flashmoe.checkpoint.header import read_header
from flashmoe.checkpoint.pread import read_exact
from flashmoe.cli import main
from flashmoe.convert import convert, writing
from flashmoe.convert.export import export
from flashmoe.errors import BundleError, ConfigError, FlashmoeError

GOLDEN = Path(__file__).parents[1] / "golden"
TYPES = {"F32": "<f4", "F16": "<f2"}


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint as float32, read without our matrices."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(file).tensors.items():
            raw = read_exact(file, entry.offset, entry.nbytes)
            if entry.dtype == "BF16":
                values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view(TYPES[entry.dtype]).astype(np.float32)
            found[name] = values.reshape(entry.shape)
    return found


def test_an_mlx_checkpoint_comes_back_under_hugging_faces_names(tmp_path: Path, forms: Any) -> None:
    written, truth, table = forms.model(1).mlx("language_model.", lambda name: (4, 32))
    config = forms.config | {"quantization": table, "quantization_config": table}
    bundle = convert(forms.write(tmp_path / "source", written, config), tmp_path / "bundle").path
    report = export(bundle, tmp_path / "out", dtype="f32")
    found = tensors(report.path)
    assert (report.rounded, report.tensors, report.resumed) == (0, len(found), False)
    wanted = forms.model().hugging_face()
    assert {name: value.shape for name, value in found.items()} == {n: t.shape for n, t in wanted.items()}
    for name, value in truth.items():
        if ".experts." in name:
            continue
        root = name if name == "lm_head" else f"model.{name}"
        centred = name.endswith("norm") and not name.endswith("linear_attn.norm")
        at = root if root in found else f"{root}.weight"
        assert np.array_equal(found[at], value - np.float32(centred)), name
    for layer in range(2):
        mlp = f"layers.{layer}.mlp.experts"
        gate, up, down = (truth[f"{mlp}.{part}_proj"] for part in ("gate", "up", "down"))
        assert np.array_equal(found[f"model.{mlp}.gate_up_proj"], np.concatenate([gate, up], axis=1))
        assert np.array_equal(found[f"model.{mlp}.down_proj"], down)
    text = (report.path / "config.json").read_text()
    assert "quantization" not in text
    assert json.loads(text)["dtype"] == "float32"


@pytest.mark.parametrize("name", ["hf_text_f32", "hf_multimodal_bf16", "hf_next_bf16", "mlx_q4", "mlx_mixed"])
def test_exported_and_converted_again_it_is_the_same_model(tmp_path: Path, name: str) -> None:
    """By values: 8 bit fitted to values of a coarser grid may choose other codes, but f32 holds what it was given."""
    bundle = Bundle.open(convert(GOLDEN / name, tmp_path / "a").path)
    out = export(bundle.path, tmp_path / "out", dtype="f32").path
    again = export(convert_exactly(out, tmp_path / "b"), tmp_path / "again", dtype="f32").path
    first, second = tensors(out), tensors(again)
    assert first.keys() == second.keys()
    for key, value in first.items():
        spread = np.ptp(value)
        assert np.abs(second[key] - value).max() <= spread / 255 + np.abs(value).max() / 128, key


def convert_exactly(source: Path, dst: Path) -> Path:
    return convert(source, dst, bits=8).path


def test_sixteen_bits_say_what_they_round(tmp_path: Path, source: Path, capsys: Any) -> None:
    bundle = convert(source, tmp_path / "b", bits=4).path
    exact = tensors(export(bundle, tmp_path / "f32", dtype="f32").path)
    for dtype, step in (("bf16", 2.0**-8), ("f16", 2.0**-11)):
        report = export(bundle, tmp_path / dtype, dtype=dtype)
        assert 0 < report.rounded <= report.tensors
        assert 0 < report.largest_error <= step
        for name, value in tensors(report.path).items():
            assert np.abs(value - exact[name]).max() <= step * np.abs(exact[name]).max(), name
            if "norm" in name or "A_log" in name:
                assert np.array_equal(value, exact[name]), "vectors are never rounded"
    assert main(["export", str(bundle), str(tmp_path / "told")]) == 0
    assert "--dtype f32 holds them exactly" in capsys.readouterr().out


def test_shards_have_an_index(tmp_path: Path, source: Path) -> None:
    bundle = convert(source, tmp_path / "b").path
    whole = tensors(export(bundle, tmp_path / "one", dtype="f32").path)
    report = export(bundle, tmp_path / "many", dtype="f32", shard_nbytes=40_000)
    index = json.loads((report.path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    for name, file in index["weight_map"].items():
        assert name in read_header(report.path / file).tensors
    many = tensors(report.path)
    assert all(np.array_equal(many[name], value) for name, value in whole.items())


def test_interrupted_it_is_no_checkpoint_and_goes_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = convert(source, tmp_path / "b").path
    whole = export(bundle, tmp_path / "whole", dtype="f32", shard_nbytes=40_000).path
    left = [5]

    def failing(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device", "somewhere")
        return kept(self, *arguments)

    kept = writing.UnitWriter._write_piece
    monkeypatch.setattr(writing.UnitWriter, "_write_piece", failing)
    with pytest.raises(OSError, match="space"):
        export(bundle, tmp_path / "out", dtype="f32", shard_nbytes=40_000)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(FlashmoeError):
        convert(tmp_path / "out", tmp_path / "never")
    with pytest.raises(BundleError, match="another command"):
        export(bundle, tmp_path / "out", dtype="bf16", shard_nbytes=40_000)
    report = export(bundle, tmp_path / "out", dtype="f32", shard_nbytes=40_000)
    assert report.resumed
    for file in whole.iterdir():
        assert (report.path / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (report.path / "convert.journal").exists()


def test_what_is_in_the_way_is_left_alone(tmp_path: Path, source: Path) -> None:
    bundle = convert(source, tmp_path / "b").path
    with pytest.raises(BundleError, match="choose another"):
        export(bundle, source, dtype="f32")
    with pytest.raises(BundleError, match="is a bundle already"):
        export(bundle, bundle)
    with pytest.raises(ConfigError, match="choose bf16, f16, f32"):
        export(bundle, tmp_path / "out", dtype="int4")
    with pytest.raises(BundleError, match="not a flashmoe bundle"):
        export(source, tmp_path / "out")


FAMILIES = sorted(p.name for p in GOLDEN.iterdir() if p.name.startswith("family_"))
PUBLISHED = [*FAMILIES, "gpt_oss_bf16", "deepseek_f32", "deepseek_bf16", "hf_next_bf16"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_comes_back_under_the_names_and_with_the_values_it_had(
    tmp_path: Path, name: str
) -> None:
    """transformers wrote these, on grids that tiles hold; what converting is known to leave out is left out."""
    bundle = convert(GOLDEN / name, tmp_path / "bundle", fit="range").path
    report = export(bundle, tmp_path / "out", dtype="f32", shard_nbytes=100_000)
    source, found = tensors(GOLDEN / name), tensors(report.path)
    assert report.rounded == 0
    last = json.loads((GOLDEN / name / "config.json").read_text())["num_hidden_layers"]
    wanted = {key: value for key, value in source.items() if f".layers.{last}." not in key}
    if name == "hf_next_bf16":
        wanted = {key: value for key, value in wanted.items() if not key.startswith("mtp.")}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert np.array_equal(found[key], value), (key, np.abs(found[key] - value).max())


def test_mxfp4_experts_come_back_as_the_floats_that_transformers_makes_of_them(tmp_path: Path) -> None:
    """[experts, columns, rows], as FP4's table and the powers of two say."""
    file = GOLDEN / "gpt_oss_mxfp4" / "model.safetensors"
    bundle = convert(file.parent, tmp_path / "bundle").path
    found = tensors(export(bundle, tmp_path / "out", dtype="bf16").path)
    header = read_header(file).tensors

    def raw(name: str) -> Any:
        entry = header[name]
        return read_exact(file, entry.offset, entry.nbytes).reshape(entry.shape)

    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([fp4, -fp4])
    for key in (f"model.layers.{i}.mlp.experts.{part}_proj" for i in (0, 1) for part in ("gate_up", "down")):
        blocks, scales = raw(f"{key}_blocks"), raw(f"{key}_scales")
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
        values = table[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
        assert np.array_equal(found[key], values.reshape(*scales.shape[:2], -1).swapaxes(1, 2)), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_what_predicts_further_tokens_is_not_announced(tmp_path: Path) -> None:
    """The weights of DeepSeek's extra layer are not in a bundle: config.json must not ask for them."""
    source = GOLDEN / "deepseek_bf16"
    copy = tmp_path / "source"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (copy / "config.json").write_text(json.dumps(config))
    out = export(convert(copy, tmp_path / "bundle").path, tmp_path / "out").path
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
