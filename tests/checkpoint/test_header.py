"""safetensors headers, honest and hostile."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flashmoe.checkpoint.header import parse_header, read_header
from flashmoe.errors import CheckpointError

NAME = Path("model.safetensors")


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_official_library(tmp_path: Path) -> None:
    file = tmp_path / NAME
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.ones(5, np.uint8)}, file, {"format": "mlx"})
    found = read_header(file)
    assert found.metadata == {"format": "mlx"}
    assert found.tensors["a"].shape == (2, 3)
    b = found.tensors["b"]
    assert file.read_bytes()[b.offset : b.offset + b.nbytes] == b"\1" * 5


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": entry(end=16)},  # beyond the file
        {"a": entry(shape=[3])},  # another size than its range
        {"a": entry(shape=[2**62, 4], end=8)},  # product overflows 64 bits
        {"a": entry(begin=8, end=0)},
        {"a": entry(begin=-8, end=0)},
        {"a": entry(shape=[-2])},
        {"a": entry(shape=[True, 2])},
        {"a": entry(dtype="F4")},
        {"a": entry(dtype=None)},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        {"a": entry(), "b": entry()},  # both on the same bytes
        {"__metadata__": 3},
    ],
    ids=repr,
)
def test_impossible_entries_are_refused(tensors: dict[str, Any]) -> None:
    text = header(**tensors)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors"):
        parse_header(NAME, text, 8 + len(text) + 8)


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"a":', b"\xff\xfe{}", b'{"a":1,"a":2}', b"[" * 50000])
def test_headers_that_are_no_object_are_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_header(NAME, text, 1 << 20)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", struct.pack("<Q", 0), struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 3) + b"{}"],
)
def test_truncated_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / NAME
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="download it again"):
        read_header(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(NAME)):
        read_header(tmp_path / NAME)


VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=4) | st.floats()
LISTS = st.lists(VALUES, max_size=4) | VALUES
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "x"]) | VALUES,
        "shape": LISTS,
        "data_offsets": LISTS,
    },
)


@given(st.dictionaries(st.text(max_size=3), ENTRIES | VALUES, max_size=3), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_any_header_is_sound_or_refused(tensors: dict[str, Any], room: int) -> None:
    text = json.dumps(tensors).encode()
    size = 8 + len(text) + room
    with suppress(CheckpointError):
        found = parse_header(NAME, text, size)
        assert all(8 + len(text) <= t.offset <= t.offset + t.nbytes <= size for t in found.tensors.values())


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_or_parsed(data: bytes) -> None:
    with suppress(CheckpointError):
        parse_header(NAME, data, len(data) + 8)
