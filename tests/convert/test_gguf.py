"""GGUF files become bundles: values, names and orders, the files beside the weights, interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle, FfnLayout, TileCodec, dequantize_ffn
from flashmoe.checkpoint import Checkpoint
from flashmoe.convert import convert, describe, verify
from flashmoe.errors import BundleError, CheckpointError


@pytest.fixture
def model(forms: Any) -> Any:
    return forms.model()


def write(path: Path, forms: Any, model: Any, gguf_forms: Any, kind: str = "Q8_0") -> dict[str, Any]:
    truth: dict[str, Any] = gguf_forms.qwen35moe(path, forms.config, model.vectors, model.matrices, kind)
    return truth


def values(bundle: Bundle, name: str) -> Any:
    head, last = name.rsplit(".", 1) if "." in name else ("", name)
    part = {"gate_proj": 0, "up_proj": 1, "down_proj": 2}.get(last)
    if part is None:
        info = bundle.tensor(name)
        assert isinstance(info.codec, TileCodec)
        return info.codec.dequantize(bundle.read(name), info.rows, info.cols)
    if head.endswith("shared_expert"):
        layout = bundle.tensor(head).codec
        assert isinstance(layout, FfnLayout)
        return dequantize_ffn(layout, bundle.read(head))[part]
    layer = int(name.split(".")[1])
    entry = bundle.expert_layers[layer]
    return np.stack(
        [dequantize_ffn(entry.ffn, bundle.read_expert(layer, e))[part] for e in range(entry.count)]
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_are_taken_over_without_loss(
    tmp_path: Path, forms: Any, model: Any, gguf_forms: Any, kind: str
) -> None:
    truth = write(tmp_path / "m.gguf", forms, model, gguf_forms, kind)
    report = convert(tmp_path / "m.gguf", tmp_path / "bundle")
    assert report.unknown == []
    assert report.skipped == []
    bundle = Bundle.open(report.path)
    for name, expected in truth.items():
        if name.endswith((".gate", "shared_expert_gate", "in_proj_a", "in_proj_b")):
            assert np.abs(values(bundle, name) - expected).max() < 2e-3, name
        elif name.endswith("out_proj"):  # heads of 16 columns, two to a group of 32: they cannot move alone
            step = 2 * np.ptp(expected) / {"Q4": 15, "Q5": 63, "Q8": 255}[kind[:2]]
            assert np.abs(values(bundle, name) - expected).max() < step, name
        else:
            assert np.array_equal(values(bundle, name), expected), name
    for name, expected in model.vectors.items():
        centred = name.endswith("norm") and not name.endswith("linear_attn.norm")
        found = bundle.read(name).reshape(-1)
        assert np.allclose(found, expected.reshape(-1) + np.float32(centred), rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "BF16"])
def test_attention_and_experts_fused_into_one_tensor(
    tmp_path: Path, forms: Any, model: Any, gguf_forms: Any, kind: str
) -> None:
    """attn_qkv means another thing in layers of linear attention; both are in this model."""
    made = []
    for name in ("apart", "fused"):
        file = tmp_path / f"{name}.gguf"
        gguf_forms.qwen35moe(file, forms.config, model.vectors, model.matrices, kind, fused=name == "fused")
        report = convert(file, tmp_path / name)
        assert report.unknown == []
        made.append(report.path)
    files = [Path("resident.safetensors"), *(Path("experts") / f"layer-00{i}.bin" for i in range(2))]
    for file in files:
        assert (made[0] / file).read_bytes() == (made[1] / file).read_bytes(), file


@pytest.mark.parametrize("rows", [64, 63, 1])
def test_a_fused_tensor_without_room_is_refused(
    tmp_path: Path, forms: Any, model: Any, gguf_forms: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    joined = gguf_forms.joined

    def cut(tensors: Any) -> Any:
        out = joined(tensors)
        values, kind = out["blk.1.attn_qkv.weight"]
        return out | {"blk.1.attn_qkv.weight": (values[:rows], kind)}

    monkeypatch.setattr(gguf_forms, "joined", cut)
    gguf_forms.qwen35moe(tmp_path / "m.gguf", forms.config, model.vectors, model.matrices, "Q8_0", fused=True)
    with pytest.raises(CheckpointError, match=r"attn_qkv.*no queries beside"):
        convert(tmp_path / "m.gguf", tmp_path / "bundle")


def test_the_files_beside_the_weights(tmp_path: Path, forms: Any, model: Any, gguf_forms: Any) -> None:
    write(tmp_path / "m.gguf", forms, model, gguf_forms)
    path = convert(tmp_path / "m.gguf", tmp_path / "bundle").path
    assert verify(Bundle.open(path)).ok
    config = json.loads((path / "config.json").read_text())
    expected = forms.config | {"rms_norm_eps": 1e-6, "eos_token_id": 11}
    for key in (
        "hidden_size",
        "num_experts",
        "head_dim",
        "linear_num_value_heads",
        "rms_norm_eps",
        "eos_token_id",
    ):
        assert config[key] == expected[key], key
    assert config["rope_parameters"] == expected["rope_parameters"]
    assert (path / "chat_template.jinja").read_text().startswith("{% for m in messages %}")
    from flashmoe.engine.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.open(path)
    assert tokenizer.encode("ab abc<|end|>") == [9, 10, 2, 11]
    assert tokenizer.decode([9, 10, 2]) == "ab abc"
    assert tokenizer.stop_ids == {11}


def test_describe_and_a_directory_with_one_model(
    tmp_path: Path, forms: Any, model: Any, gguf_forms: Any
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "m.gguf", forms, model, gguf_forms)
    (folder / "mmproj-m.gguf").write_bytes(b"pictures")
    assert describe(folder)["note"] == describe(folder / "m.gguf")["note"]
    assert "codes of Q8_0 kept" in describe(folder)["note"]
    (folder / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 2 models"):
        describe(folder)


def test_inspect_takes_a_file(
    tmp_path: Path, forms: Any, model: Any, gguf_forms: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashmoe.cli import main

    write(tmp_path / "m.gguf", forms, model, gguf_forms)
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    assert "codes of Q8_0 kept" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "bundle")]) == 0
    assert "codes of Q8_0 kept" in capsys.readouterr().out


def test_a_killed_conversion_goes_on_even_without_its_source(
    tmp_path: Path, forms: Any, model: Any, gguf_forms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmoe.convert import run

    source = tmp_path / "m.gguf"
    write(source, forms, model, gguf_forms)
    whole = convert(source, tmp_path / "whole").path
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "bundle", consume_source=True)
    assert not source.exists()
    report = convert(source, tmp_path / "bundle", consume_source=True)
    assert report.resumed
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    assert names == [
        path.relative_to(report.path) for path in sorted(report.path.rglob("*")) if path.is_file()
    ]
    for name in names:
        assert (whole / name).read_bytes() == (report.path / name).read_bytes(), name


def test_another_file_does_not_go_on(
    tmp_path: Path, forms: Any, model: Any, gguf_forms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmoe.convert import run

    source = tmp_path / "m.gguf"
    write(source, forms, model, gguf_forms)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "bundle")
    write(source, forms, forms.model(7), gguf_forms)
    with pytest.raises(BundleError, match="has changed since"):
        convert(source, tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="begun from another source"):
        convert(source, tmp_path / "bundle")


def test_a_model_in_several_files(tmp_path: Path, forms: Any, model: Any, gguf_forms: Any) -> None:
    """llama-gguf-split: all metadata in the first file, tensors anywhere."""
    import gguf

    write(tmp_path / "m.gguf", forms, model, gguf_forms, "Q4_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00002.gguf", "qwen35moe")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(CheckpointError, match="00001-of-00002"):
        Checkpoint.open(tmp_path / "m-00002-of-00002.gguf")
    count = len(reader.tensors)
    first = whole[:8] + (0).to_bytes(8, "little") + whole[16 : tensor_table(whole, count, reader)]
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(first)
    one = convert(tmp_path / "m.gguf", tmp_path / "one").path
    two = convert(tmp_path / "m-00001-of-00002.gguf", tmp_path / "two").path
    assert (one / "resident.safetensors").read_bytes() == (two / "resident.safetensors").read_bytes()


def tensor_table(whole: bytes, count: int, reader: Any) -> int:
    """Where the table of tensors begins."""
    assert count
    return min(int(tensor.field.offset) for tensor in reader.tensors)
