"""Damaged and hostile files: what reads them says so in one line, whatever the damage is."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmoe.bundle.reader import Bundle
from flashmoe.bundle.verify import verify
from flashmoe.checkpoint.gguf.header import read_gguf
from flashmoe.cli.inspect import _describe
from flashmoe.convert import convert, describe
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.store.usage import UsageCounts

Contained = Callable[[Path, Callable[[], object]], str]
Place = tuple[Any, ...]

# Text that stands for what json.dumps cannot write.
RAW = {
    "@deep list@": "[" * 970 + "]" * 970,
    "@deeper list@": "[" * 5000 + "]" * 5000,
    "@deep object@": '{"a":' * 960 + "1" + "}" * 960,
    "@long number@": "9" * 5000,
    "@infinite@": "1e999",
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 4095, 4096, 65536,
    1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e308, math.nan, math.inf,
    "", "0", "\0", "a\0b", "\ud800", "\n", "a\nb\rc", "é", "a" * 5000, "F32", "U8", "I64", "tile", "ffn", "dense",
    "..", ".", "/", "../outside.bin", "experts/../../outside.bin", "/etc/passwd", "experts", "experts/layer-001.bin",
    "resident.safetensors", "config.json", "f" * 16, [], {}, [0], [[]], [0, 0], [1, 1 << 70, 0], {"": {}},
    *RAW,
]  # fmt: skip
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\u0000",
    b"\\ud800",
    b"-",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
]
TOKENS += [b"9" * 40, b"0", b".", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"../"]


def budget(examples: int) -> Callable[[Any], Any]:
    """So many examples in `make test`, a hundred times as many in `make fuzz`."""
    factor = settings.default.max_examples / settings.get_profile("default").max_examples
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=int(examples * factor), deadline=None, suppress_health_check=checks)


def places(value: Any, path: Place = ()) -> list[Place]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*path, key), *places(item, (*path, key))]]


def changed_once(draw: st.DrawFn, tree: Any) -> None:
    """One change somewhere in a JSON value: another value, no value, another key, one more, one of its own."""
    found = places(tree)
    if not found:
        return
    place = draw(st.sampled_from(found))
    owner = tree
    for key in place[:-1]:
        owner = owner[key]
    key, old = place[-1], owner[place[-1]]
    kind = draw(st.sampled_from(["value", "value", "value", "number", "remove", "rename", "double", "swap"]))
    if kind == "number" and type(old) in (int, float):
        owner[key] = draw(st.sampled_from([old + 1, old - 1, 2 * old, 16 * old, -old, old // 2, 1000 * old]))
    elif kind == "remove":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        texts = [value for value in VALUES if isinstance(value, str)]
        owner[draw(st.sampled_from(texts))] = owner.pop(key)
    elif kind == "double" and isinstance(owner, list):
        owner.insert(key, old)
    elif kind == "swap":
        other = found[draw(st.integers(0, len(found) - 1))]
        value = tree
        for step in other:
            value = value[step]
        owner[key] = copy.deepcopy(value)
    else:
        owner[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))


@st.composite
def changed_tree(draw: st.DrawFn, text: bytes) -> bytes:
    """JSON with one to four changes to its values."""
    tree = json.loads(text)
    for _ in range(draw(st.integers(1, 4))):
        changed_once(draw, tree)
    out = json.dumps(tree)
    for word, raw in RAW.items():
        out = out.replace(json.dumps(word), raw)
    return out.encode()


@st.composite
def changed_bytes(draw: st.DrawFn, text: bytes) -> bytes:
    """Bytes with one to four changes: flipped, overwritten, cut out, repeated, inserted, cut off."""
    data = bytearray(text)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = at + draw(st.sampled_from([1, 2, 8, 64, 1000]))
        kind = draw(st.sampled_from(["flip", "token", "token", "overwrite", "cut", "repeat", "end", "zero"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "token":
            data[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == "overwrite":
            token = draw(st.sampled_from(TOKENS))
            data[at : at + len(token)] = token
        elif kind == "cut":
            del data[at:end]
        elif kind == "repeat":
            data[at:at] = data[at:end]
        elif kind == "zero":
            data[at:end] = bytes(len(data[at:end]))
        else:
            del data[at:]
    return bytes(data)


def changed(text: bytes) -> st.SearchStrategy[bytes]:
    return changed_tree(text) | changed_bytes(text)


def header_text(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


def with_header(original: bytes, text: bytes, draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """A safetensors file with another header, padded to the old length, or in a length that may be a lie."""
    old = struct.unpack("<Q", original[:8])[0]
    size = draw(st.sampled_from([None] * 6 + [0, 1, old - 1, old + 1, 1 << 32, 1 << 63, (1 << 64) - 1]))
    if size is None:
        text = text.ljust(old)
        size = len(text)
    return struct.pack("<Q", size) + text + original[8 + old :]


class Files:
    """A copy of a folder in which some files can be given other contents."""

    def __init__(self, folder: Path) -> None:
        self._temporary = tempfile.TemporaryDirectory(dir=folder.parent)
        self.path = Path(self._temporary.name) / "model"
        shutil.copytree(folder, self.path)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()


def open_inside(path: Path) -> Bundle:
    """Bundle.open; whatever it accepts lies in its folder."""
    bundle = Bundle.open(path)
    experts = [file for layer in bundle.expert_layers for file in layer.paths]
    for file in [*experts, *map(path.joinpath, bundle.manifest.files)]:
        assert file.resolve().is_relative_to(path.resolve())
    size = bundle.resident_path.stat().st_size
    for info in map(bundle.tensor, bundle.tensor_names()):
        assert 0 <= info.offset <= info.offset + info.nbytes <= size
    return bundle


def use_bundle(contained: Contained, path: Path) -> None:
    """All that a user may do with a bundle, each on its own: one may fail where another need not."""

    def generate() -> None:
        with Engine.open(path, EngineOptions(threads=1, verify_reads=True)) as engine:
            engine.logits([1, 2, 3])
            engine.feed([4])

    contained(path.parent, lambda: verify(open_inside(path)))
    contained(path.parent, lambda: _describe(path, describe(path)))
    contained(path.parent, generate)


def use_checkpoint(contained: Contained, path: Path) -> None:
    """Describe and convert; what comes out is a bundle that works, or none."""
    contained(path.parent, lambda: _describe(path, describe(path)))
    output = path.parent / "bundle"
    refusal = contained(path.parent, lambda: convert(path, output))
    assert (output / "manifest.json").exists() == (not refusal)
    if not refusal:
        use_bundle(contained, output)


def use_config(contained: Contained, path: Path) -> None:
    contained(path.parent, lambda: _describe(path, describe(path)))


@budget(150)
@given(data=st.data())
def test_manifest(bundle: Path, contained: Contained, data: st.DataObject) -> None:
    with Files(bundle) as files:
        file = files.path / "manifest.json"
        file.write_bytes(data.draw(changed(file.read_bytes())))
        use_bundle(contained, files.path)


@budget(60)
@given(data=st.data())
def test_manifest_and_mark_of_a_striped_bundle(
    striped: Path, contained: Contained, data: st.DataObject
) -> None:
    with Files(striped) as files:
        name = data.draw(st.sampled_from(["manifest.json", "stripes-a/0/stripe.json"]))
        file = files.path / name
        file.write_bytes(data.draw(changed(file.read_bytes())))
        use_bundle(contained, files.path)


@budget(150)
@given(data=st.data())
def test_header_of_a_bundle(bundle: Path, contained: Contained, data: st.DataObject) -> None:
    """The manifest mostly notices; where both are changed alike, only the header's own checks are left."""
    with Files(bundle) as files:
        file = files.path / "resident.safetensors"
        text = data.draw(changed(header_text(file)))
        file.write_bytes(with_header(file.read_bytes(), text, data.draw))
        use_bundle(contained, files.path)


@budget(100)
@given(data=st.data())
def test_config_of_a_bundle(bundle: Path, contained: Contained, data: st.DataObject) -> None:
    with Files(bundle) as files:
        text = data.draw(changed((bundle / "config.json").read_bytes()))
        (files.path / "config.json").write_bytes(text)
        manifest = json.loads((files.path / "manifest.json").read_text())
        manifest["files"]["config.json"] = {"nbytes": len(text), "xxh3": xxhash.xxh3_64_hexdigest(text)}
        (files.path / "manifest.json").write_text(json.dumps(manifest))
        use_bundle(contained, files.path)
        use_config(contained, files.path / "config.json")


@budget(100)
@given(data=st.data())
def test_header_of_a_checkpoint(source: Path, contained: Contained, data: st.DataObject) -> None:
    with Files(source) as files:
        file = files.path / "model.safetensors"
        text = data.draw(changed(header_text(file)))
        file.write_bytes(with_header(file.read_bytes(), text, data.draw))
        use_checkpoint(contained, files.path)


@pytest.mark.parametrize(
    "form",
    [
        "fp8 block", "fp8 tensor", "int8 channel", "gptq", "gptq act-order", "awq", "packed int4",
        "packed int6 asymmetric", "packed int4 act-order", "nvfp4", "mxfp4",
    ],
)  # fmt: skip
@budget(10)
@given(data=st.data())
def test_header_of_a_quantised_checkpoint(
    quantized: Callable[[str], Path], contained: Contained, form: str, data: st.DataObject
) -> None:
    with Files(quantized(form)) as files:
        file = files.path / "model.safetensors"
        text = data.draw(changed(header_text(file)))
        file.write_bytes(with_header(file.read_bytes(), text, data.draw))
        use_checkpoint(contained, files.path)


@budget(60)
@given(data=st.data())
def test_quantisation_of_a_checkpoint(
    quantized: Callable[[str], Path], contained: Contained, data: st.DataObject
) -> None:
    with Files(quantized(data.draw(st.sampled_from(["fp8 block", "gptq", "awq", "packed int4"])))) as files:
        file = files.path / "config.json"
        config = json.loads(file.read_text())
        text = data.draw(changed(json.dumps(config.pop("quantization_config")).encode()))
        file.write_bytes(json.dumps(config).encode()[:-1] + b', "quantization_config": ' + text + b"}")
        use_checkpoint(contained, files.path)


@st.composite
def changed_numbers(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four numbers of four or eight bytes set to others: counts, lengths, types, sizes, offsets."""
    out = bytearray(data)
    numbers = [value for value in VALUES if type(value) is int and 0 <= value < 1 << 64]
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from([4, 8]))
        at = draw(st.sampled_from([4, 8, 16]) | st.integers(0, len(out) - 8))
        value = draw(st.sampled_from(numbers))
        out[at : at + size] = (value % (1 << (8 * size))).to_bytes(size, "little")
    return bytes(out)


def gguf_parts(file: Path) -> tuple[bytes, bytes]:
    """The header and what comes from the first tensor on."""
    whole = file.read_bytes()
    start = min(entry.offset for entry in read_gguf(file).tensors.tensors.values())
    return whole[:start], whole[start:]


def change_gguf_header(file: Path, data: st.DataObject) -> None:
    head, blocks = gguf_parts(file)
    file.write_bytes(data.draw(changed_numbers(head) | changed_bytes(head)) + blocks)


@budget(150)
@given(data=st.data())
def test_header_of_a_gguf_file(gguf_model: Path, contained: Contained, data: st.DataObject) -> None:
    with Files(gguf_model) as files:
        change_gguf_header(files.path / "m.gguf", data)
        use_checkpoint(contained, files.path)


@budget(30)
@given(data=st.data())
def test_blocks_of_a_gguf_file(gguf_model: Path, contained: Contained, data: st.DataObject) -> None:
    with Files(gguf_model) as files:
        file = files.path / "m.gguf"
        head, blocks = gguf_parts(file)
        file.write_bytes(head + data.draw(changed_bytes(blocks)))
        use_checkpoint(contained, files.path)


@pytest.mark.parametrize("form", ["gpt_oss_mxfp4", "deepseek_f32", "family_olmoe"])
@budget(30)
@given(data=st.data())
def test_header_of_a_gguf_file_of_other_families(
    gguf_family: Callable[[str], Path], contained: Contained, form: str, data: st.DataObject
) -> None:
    """Blocks of MXFP4 and biases of experts; keys and values apart; tensors fused into one."""
    with Files(gguf_family(form)) as files:
        change_gguf_header(files.path / "m.gguf", data)
        use_checkpoint(contained, files.path)


FAMILIES = [
    "deepseek_bf16", "family_glm4_moe", "family_llama", "family_mixtral", "family_olmoe", "family_qwen2",
    "family_qwen3_5", "family_qwen3_moe", "gpt_oss_mxfp4",
]  # fmt: skip


@pytest.mark.parametrize("form", FAMILIES)
@budget(10)
@given(data=st.data())
def test_checkpoint_of_any_family(
    golden: Callable[[str], Path], contained: Contained, form: str, data: st.DataObject
) -> None:
    """config.json or the header of a file."""
    with Files(golden(form)) as files:
        name = data.draw(st.sampled_from(sorted(p.name for p in files.path.iterdir())))
        file = files.path / name
        if file.suffix == ".safetensors":
            file.write_bytes(with_header(file.read_bytes(), data.draw(changed(header_text(file))), data.draw))
        else:
            file.write_bytes(data.draw(changed(file.read_bytes())))
        use_checkpoint(contained, files.path)


@budget(100)
@given(data=st.data())
def test_index_of_a_checkpoint(sharded: Path, contained: Contained, data: st.DataObject) -> None:
    with Files(sharded) as files:
        file = files.path / "model.safetensors.index.json"
        file.write_bytes(data.draw(changed(file.read_bytes())))
        use_checkpoint(contained, files.path)


@pytest.mark.parametrize("form", ["source", "sharded"])
@budget(50)
@given(data=st.data())
def test_config_of_a_checkpoint(
    request: pytest.FixtureRequest, contained: Contained, form: str, data: st.DataObject
) -> None:
    with Files(request.getfixturevalue(form)) as files:
        file = files.path / "config.json"
        file.write_bytes(data.draw(changed(file.read_bytes())))
        use_checkpoint(contained, files.path)


@pytest.fixture(scope="module")
def usage_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("usage") / "usage"
    counts = UsageCounts({0: 5, 2: 3})
    counts.add(0, np.array([[1, 2], [2, 4]], np.int32))
    counts.save(file, "me")
    return file.read_bytes()


@budget(150)
@given(data=st.data(), mend=st.booleans())
def test_usage_file(tmp_path: Path, usage_file: bytes, data: st.DataObject, mend: bool) -> None:
    """mend: the checksum is made right again, so that what stands behind it is reached."""
    head = 16 + 8
    if mend:
        length = int.from_bytes(usage_file[head : head + 4], "little")
        header = data.draw(changed(usage_file[head + 4 : head + 4 + length]))
        counts = data.draw(changed_bytes(usage_file[head + 4 + length :]))
        body = len(header).to_bytes(4, "little") + header + counts
        hostile = usage_file[:16] + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body
    else:
        hostile = data.draw(changed_bytes(usage_file))
    file = tmp_path / "usage"
    file.write_bytes(hostile)
    counts_read = UsageCounts({0: 5, 2: 3})
    with contextlib.suppress(ValueError):
        counts_read.load(file, "me")
    for layer in (0, 2):
        assert np.isfinite(counts_read.counts(layer)).all()
    assert set(counts_read.favourites(8)) == {0, 2}
