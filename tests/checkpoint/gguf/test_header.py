"""GGUF headers: what the gguf package writes is read, and whatever is wrong is one line."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from flashmoe.checkpoint.gguf.header import read_gguf
from flashmoe.errors import CheckpointError


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def file(
    path: Path,
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    head += b"".join(keys) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def test_what_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("yes", True)
    writer.add_array("words", ["a", "é", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("x", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("y", np.zeros((2, 3, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(path)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.block_count"] == 3
    assert header.metadata["llama.rope.freq_base"] == 1e4
    assert header.metadata["yes"] is True
    assert header.metadata["words"] == ["a", "é", ""]
    assert header.metadata["numbers"].tolist() == [1, -2, 3]
    x, y = header.tensors.tensors["x"], header.tensors.tensors["y"]
    assert (x.dtype, x.shape, x.nbytes) == ("F32", (3, 4), 48)
    assert (y.dtype, y.shape, y.nbytes) == ("Q8_0", (2, 3, 32), 204)
    data = path.read_bytes()
    assert np.array_equal(np.frombuffer(data[x.offset : x.offset + 48], "<f4"), np.arange(12))


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions_are_refused(tmp_path: Path, version: int) -> None:
    with pytest.raises(CheckpointError, match=r"version|big-endian"):
        read_gguf(file(tmp_path / "m.gguf", [], [], version=version))


@pytest.mark.parametrize("data", [b"", b"GG", b"GGML" + bytes(40), b"PK\3\4" + bytes(40)])
def test_what_is_no_gguf_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"no GGUF|damaged"):
        read_gguf(tmp_path / "m.gguf")


HUGE = (1 << 64) - 1
BAD: dict[str, tuple[list[bytes], list[bytes]]] = {
    "unknown value type": ([key("a", 13, b"")], []),
    "key twice": ([key("a", 4, bytes(4)), key("a", 4, bytes(4))], []),
    "text longer than the file": ([key("a", 8, struct.pack("<Q", 1 << 40))], []),
    "text of no length": ([key("a", 8, struct.pack("<Q", HUGE))], []),
    "list longer than the file": ([key("a", 9, struct.pack("<IQ", 4, 1 << 20))], []),
    "list of no length": ([key("a", 9, struct.pack("<IQ", 12, HUGE))], []),
    "texts without number": ([key("a", 9, struct.pack("<IQ", 8, HUGE))], []),
    "texts that end": ([key("a", 9, struct.pack("<IQ", 8, 30) + text("x"))], []),
    "list of lists": ([key("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0))], []),
    "alignment 0": ([key("general.alignment", 4, struct.pack("<I", 0))], []),
    "alignment 24": ([key("general.alignment", 4, struct.pack("<I", 24))], []),
    "alignment of text": ([key("general.alignment", 8, text("32"))], []),
    "tensor outside": ([], [tensor("x", [4], 0, 1 << 40)]),
    "tensor larger than the file": ([], [tensor("x", [1 << 40, 1 << 20])]),
    "tensor of endless size": ([], [tensor("x", [HUGE, HUGE, HUGE, HUGE])]),
    "unknown tensor type": ([], [tensor("x", [4], 99)]),
    "nine dimensions": ([], [tensor("x", [1] * 9)]),
    "part of a block": ([], [tensor("x", [33], 8)]),
    "tensor twice": ([], [tensor("x", [4]), tensor("x", [4], 0, 32)]),
    "overlap": ([], [tensor("x", [8]), tensor("y", [4], 0, 16)]),
    "name of no length": ([], [struct.pack("<Q", HUGE)]),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_headers_are_refused(tmp_path: Path, name: str) -> None:
    keys, tensors = BAD[name]
    path = file(tmp_path / "m.gguf", keys, tensors, bytes(64))
    with pytest.raises(CheckpointError, match=r"m\.gguf") as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [(1, 0), (0, 1), (HUGE, 0), (0, HUGE), (1 << 20, 0), (0, 1 << 16)])
def test_counts_that_lie_are_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        read_gguf(file(tmp_path / "m.gguf", [], [], counts=counts))


def test_cut_off_anywhere(tmp_path: Path) -> None:
    keys = [key("a", 8, text("b")), key("c", 9, struct.pack("<IQ", 8, 2) + text("d") + text("e"))]
    whole = file(tmp_path / "m.gguf", keys, [tensor("x", [4])], bytes(16)).read_bytes()
    assert list(read_gguf(tmp_path / "m.gguf").tensors.tensors) == ["x"]
    for size in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_gguf(tmp_path / "cut.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.gguf"):
        read_gguf(tmp_path / "none.gguf")
