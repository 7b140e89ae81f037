"""Bits by part: what is asked for is what is stored, in all parts and in no other; nonsense is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle, FfnLayout, TileCodec
from flashmoe.convert import convert, describe
from flashmoe.convert.bits import PARTS, Bits, parse_bits
from flashmoe.errors import ConfigError


def widths(path: Path) -> dict[str, set[int]]:
    """Part -> the bits of its matrices."""
    bundle = Bundle.open(path)
    found: dict[str, set[int]] = {}
    for name in bundle.tensor_names():
        codec = bundle.tensor(name).codec
        if isinstance(codec, FfnLayout):
            found.setdefault("shared", set()).update((codec.gate_up.bits, codec.down.bits))
        elif isinstance(codec, TileCodec):
            found.setdefault(part(name), set()).add(codec.bits)
    found["experts"] = {c.bits for layer in bundle.expert_layers for c in (layer.ffn.gate_up, layer.ffn.down)}
    return found


def part(name: str) -> str:
    if name in ("lm_head", "embed_tokens"):
        return "head" if name == "lm_head" else "embedding"
    if name.endswith(("in_proj_a", "in_proj_b")):
        return "few rows"
    return next(
        p for word, p in (("self_attn", "attention"), ("linear", "linear"), ("mlp", "router")) if word in name
    )


PLAIN = {
    "experts": {4},
    "shared": {4},
    "attention": {4},
    "linear": {4},
    "head": {4},
    "embedding": {4},
    "router": {8},
    "few rows": {8},
}


@pytest.mark.parametrize(
    ("bits", "changed"),
    [
        (None, {}),
        ("4", {}),
        (3, {"experts": {3}}),
        (
            "6",
            {"experts": {6}} | {part: {8} for part in ("shared", "attention", "linear", "head", "embedding")},
        ),
        ("experts=2", {"experts": {2}}),
        ("experts=3,attention=8,head=6", {"experts": {3}, "attention": {8}, "head": {6}}),
        ("2,shared=3,linear=6", {"experts": {2}, "shared": {3}, "linear": {6}}),
        ("embedding=3,router=4", {"router": {4}, "embedding": {3}}),
    ],
)
def test_each_part_has_its_bits(
    tmp_path: Path, forms: Any, source: Path, bits: str | int | None, changed: dict[str, set[int]]
) -> None:
    report = convert(source, tmp_path / "b", bits=bits)
    assert widths(report.path) == PLAIN | changed
    manifest = json.loads((report.path / "manifest.json").read_text())
    assert manifest["quantization"].get("bits") == (None if bits is None else str(bits))
    assert describe(source, bits=bits)["codecs"] == describe(report.path)["codecs"]
    assert describe(source / "config.json", bits=bits)["codecs"] == describe(report.path)["codecs"]


def test_one_layer_may_differ(tmp_path: Path, source: Path) -> None:
    bits = Bits(uniform=4, units={"layers.1.experts": 2, "layers.0.linear": 3, "head": 8})
    bundle = Bundle.open(convert(source, tmp_path / "b", bits=bits).path)
    assert [layer.ffn.down.bits for layer in bundle.expert_layers] == [4, 2]
    assert widths(bundle.path) == PLAIN | {"experts": {2, 4}, "linear": {3}, "head": {8}}


def test_another_wish_does_not_go_on_with_a_begun_conversion(tmp_path: Path, source: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").mkdir()  # cannot be copied, so the conversion ends before its manifest
    with pytest.raises(Exception, match="tokenizer"):
        convert(source, tmp_path / "b", bits="experts=2")
    with pytest.raises(Exception, match="begun with --bits experts=2, not experts=3"):
        convert(source, tmp_path / "b", bits="experts=3")
    with pytest.raises(Exception, match="begun with --fit squares, not range"):
        convert(source, tmp_path / "b", bits="experts=2", fit="range")


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("5", "'5' bits are not offered: choose 2, 3, 4, 6 or 8"),
        ("experts=7", "'7' bits"),
        ("expert=4", "did you mean experts"),
        ("xyz=4", "the parts are experts, shared"),
        ("4,3", "two numbers"),
        ("head=4,head=6", "head twice"),
        ("", "'' bits"),
        ("experts=", "'' bits"),
        ("-4", "'-4' bits"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(
    tmp_path: Path, source: Path, bits: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "b", bits=bits)
    assert not (tmp_path / "b").exists()


def test_head_and_embedding_of_a_tied_model_are_one(tmp_path: Path, forms: Any) -> None:
    tensors = {name: t for name, t in forms.model().hugging_face().items() if name != "lm_head.weight"}
    source = forms.write(tmp_path / "s", tensors, forms.config | {"tie_word_embeddings": True})
    for name in ("head", "embedding"):
        assert widths(convert(source, tmp_path / name, bits=f"{name}=6").path)["embedding"] == {6}
    with pytest.raises(ConfigError, match="one matrix"):
        convert(source, tmp_path / "both", bits="head=6,embedding=4")


def test_text_and_value_say_the_same() -> None:
    for text in ("4", "experts=4,attention=8,head=6", "2,head=8", ",".join(f"{p}=3" for p in PARTS)):
        assert str(parse_bits(text)) == text
        assert parse_bits(str(parse_bits(text))) == parse_bits(text)
    assert str(parse_bits(None)) == ""
    assert np.all([parse_bits(b) == Bits(b) for b in (2, 3, 4, 6, 8)])
