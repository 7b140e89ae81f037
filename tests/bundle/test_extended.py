"""What version 3 of the format adds: tables of codes, biased records, clamped GLUs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle.codecs import (
    FP4_TABLE,
    ClampedGlu,
    FfnBiases,
    FfnLayout,
    Quantized,
    TileCodec,
    codec_from_json,
    codec_to_json,
    dequantize_ffn,
    is_extended,
    pack_ffn,
    unpack_biases,
)
from flashmoe.bundle.manifest import LayerRecord, Manifest, parse_manifest
from flashmoe.errors import BundleError

PLAIN, FP4 = TileCodec(4, 32), TileCodec(4, 32, "bf16", FP4_TABLE)
CLAMPED = ClampedGlu(1.702, 7.0)
LAYOUTS = [
    FfnLayout(32, 20, FP4, PLAIN),
    FfnLayout(32, 20, PLAIN, FP4),
    FfnLayout(32, 20, PLAIN, PLAIN, CLAMPED),
    FfnLayout(32, 20, PLAIN, PLAIN, None, True),
    FfnLayout(32, 20, FP4, FP4, CLAMPED, True),
]


def manifest(layout: FfnLayout, stripes: tuple[str, ...] = ()) -> Manifest:
    layer = LayerRecord(0, "layer-000.bin", layout.record_nbytes, layout, ("a" * 16, "b" * 16))
    return Manifest("gpt_oss", {"name": "x"}, "none", True, {}, 2, [layer], [], stripes=stripes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_extended_codecs_survive_json_and_raise_the_version(layout: FfnLayout) -> None:
    assert is_extended(layout)
    assert codec_from_json(json.loads(json.dumps(codec_to_json(layout)))) == layout
    for stripes in ((), ("stripes-a/0", "stripes-a/1")):
        value = json.loads(json.dumps(manifest(layout, stripes).to_json()))
        assert value["format_version"] == 3
        assert parse_manifest(value) == manifest(layout, stripes)


def test_plain_codecs_keep_the_old_versions() -> None:
    plain = FfnLayout(32, 20, PLAIN, PLAIN)
    assert not is_extended(plain)
    assert set(codec_to_json(plain)) == {"kind", "hidden", "intermediate", "gate_up", "down", "down_offset"}
    assert "table" not in codec_to_json(PLAIN)
    assert manifest(plain).to_json()["format_version"] == 1
    assert manifest(plain, ("stripes-a/0",)).to_json()["format_version"] == 2


def test_biases_stand_behind_the_tiles() -> None:
    layout, rng = FfnLayout(32, 20, PLAIN, PLAIN, None, True), np.random.default_rng(1)

    def zeros(rows: int, cols: int) -> Quantized:
        return Quantized(np.zeros((rows, cols), np.uint8), *np.zeros((2, rows, cols // 32), np.uint16))

    biases = FfnBiases(*(rng.normal(size=n).astype(np.float32) for n in (20, 20, 32)))
    record = pack_ffn(layout, zeros(20, 32), zeros(20, 32), zeros(32, 32), biases)
    assert layout.nbytes == dataclasses.replace(layout, biased=False).nbytes + 4 * (32 + 32 + 32)
    tail = record[layout.bias_offset :].view("<f4")
    assert (tail[:20] == biases.gate).all()
    assert (tail[32:52] == biases.up).all()
    assert (tail[64:] == biases.down).all()
    assert not tail[20:32].any()
    assert not tail[52:64].any()
    for found, wanted in zip(unpack_biases(layout, record), biases, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert all(not part.any() for part in dequantize_ffn(layout, record))


@pytest.mark.parametrize(
    "change",
    [
        {"table": [0] * 15},
        {"table": [0] * 15 + [128]},
        {"table": [0] * 15 + [-1]},
        {"table": [0] * 15 + [1.5]},
        {"table": "0123456789abcdef"},
        {"bits": 8},
    ],
    ids=str,
)
def test_impossible_tables_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="convert"):
        codec_from_json(codec_to_json(FP4) | change)


@pytest.mark.parametrize(
    "change",
    [
        {"biased": 1},
        {"glu": []},
        {"glu": {"alpha": 1.7}},
        {"glu": {"alpha": 1.7, "limit": -1.0}},
        {"glu": {"alpha": float("nan"), "limit": 7.0}},
        {"glu": {"alpha": 1.7, "limit": 1e30}},
        {"glu": {"alpha": True, "limit": 7.0}},
    ],
    ids=str,
)
def test_impossible_records_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="convert"):
        codec_from_json(codec_to_json(LAYOUTS[-1]) | change)
