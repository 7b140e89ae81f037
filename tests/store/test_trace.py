"""Routing traces and policies in files: what is written is read again, and what is damaged is refused in one line."""

from __future__ import annotations

import io
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.errors import TraceError
from flashmoe.store.trace import DECODE, PREFILL, Trace, read_trace
from flashmoe.store.trace_writer import TraceWriter

SHARED = Path(__file__).parents[3] / "shared" / "traces"


def routing(tokens: int, k: int = 2, experts: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    return ids, rng.random((tokens, k), np.float32)


def write_trace(path: Path, fail_at: int | None = None) -> list[np.ndarray]:
    """Three steps of layers 1 and 3: a prompt of three tokens, two decoded ones; perhaps one that failed halfway."""
    writer = TraceWriter(path, [1, 3], 300, 2, "model-x")
    expected = []
    position = 0
    for step, tokens in enumerate([[5, 6, 7], [8], [9]]):
        if step == fail_at:
            writer.begin([(0, position, [99])])
            writer.layer(1, *routing(1))
        writer.begin([(0, position, tokens)])
        chosen, weights = routing(len(tokens))
        for layer in (1, 3):
            writer.layer(layer, (chosen + layer) % 300, weights)
        expected.append(np.stack([(chosen + layer) % 300 for layer in (1, 3)], 1))
        position += len(tokens)
    writer.close()
    writer.close()
    return expected


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    expected = write_trace(tmp_path / "t.npz")
    trace = read_trace(tmp_path / "t.npz")
    assert np.array_equal(trace.expert_ids, np.concatenate(expected))
    assert trace.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert trace.phases.tolist() == [PREFILL] * 3 + [DECODE] * 2
    assert trace.steps.tolist() == [0, 0, 0, 1, 2]
    assert (trace.layers, trace.experts, trace.model) == ((1, 3), 300, "model-x")
    assert trace.sequences.tolist() == [0] * 5
    assert trace.decoding().tokens == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.npz"], "nothing else is left behind"


def test_a_full_drive_is_told_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.npz", [1], 300, 2, "model-x")
    writer.begin([(0, 0, [5])])
    writer.layer(1, *routing(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # writes fail in the middle, as on a full drive
    try:
        with pytest.raises(TraceError, match=r"t\.npz: .*\(File too large\): free some space") as caught:
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_failed_is_not_recorded(tmp_path: Path) -> None:
    write_trace(tmp_path / "whole.npz")
    write_trace(tmp_path / "failed.npz", fail_at=2)
    whole, failed = read_trace(tmp_path / "whole.npz"), read_trace(tmp_path / "failed.npz")
    assert np.array_equal(whole.expert_ids, failed.expert_ids)
    assert failed.token_ids.tolist() == [5, 6, 7, 8, 9]


def test_sequences_are_told_by_where_they_go_on(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.npz", [0], 300, 2, "")
    for parts in ([(7, 0, [1, 2])], [(7, 2, [3]), (8, 0, [4])], [(8, 1, [5]), (7, 0, [6])]):
        writer.begin(parts)
        writer.layer(0, *routing(sum(len(ids) for _, _, ids in parts)))
    writer.close()
    trace = read_trace(tmp_path / "t.npz")
    assert trace.sequences.tolist() == [0, 0, 0, 1, 1, 2]
    assert trace.steps.tolist() == [0, 0, 1, 1, 2, 2]


def test_an_event_is_what_a_step_asks_of_a_layer(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "t.npz", expert_ids=np.array([[[2, 1]], [[1, 3]], [[0, 4]]]), step=np.array([0, 0, 1])
    )
    assert list(read_trace(tmp_path / "t.npz").events()) == [(0, [[1, 2, 3]]), (2, [[0, 4]])]


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be written \(No such file"):
        TraceWriter(tmp_path / "nowhere" / "t.npz", [0], 8, 2, "")
    with pytest.raises(TraceError, match="is a directory"):
        TraceWriter(tmp_path, [0], 8, 2, "")


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_trace_without_decoded_tokens_says_so(tmp_path: Path, tokens: int) -> None:
    writer = TraceWriter(tmp_path / "t.npz", [0], 300, 2, "")
    if tokens:
        writer.begin([(0, 0, [1, 2])])
        writer.layer(0, *routing(2))
    writer.close()
    with pytest.raises(TraceError, match="record"):
        read_trace(tmp_path / "t.npz").decoding()


IDS = np.array([[[0, 1], [2, 3]]] * 4, np.uint8)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"x": IDS}, "no expert_ids"),
    "flat": ({"expert_ids": IDS.ravel()}, "no expert_ids"),
    "floats": ({"expert_ids": IDS.astype(float)}, "no expert_ids"),
    "negative": ({"expert_ids": IDS.astype(int) - 1}, "are not within"),
    "huge": ({"expert_ids": IDS.astype(int) + (1 << 40)}, "are not within"),
    "twice": ({"expert_ids": np.zeros_like(IDS)}, "twice"),
    "weights": ({"expert_ids": IDS, "router_weights": np.zeros((4, 2))}, "do not belong"),
    "steps": ({"expert_ids": IDS, "step": np.arange(3)}, "step has not one"),
    "objects": ({"expert_ids": np.array([None])}, "no type of numbers"),
    "header": ({"expert_ids": IDS, "header": np.frombuffer(b"[1]", np.uint8)}, "no object"),
    "deep": ({"expert_ids": IDS, "header": np.frombuffer(b"[" * 90000, np.uint8)}, "nested"),
    "version": (
        {"expert_ids": IDS, "header": np.frombuffer(b'{"format": "flashmoe-trace", "version": 2}', np.uint8)},
        "not version 1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    arrays, words = BROKEN[name]
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(TraceError, match=words) as caught:
        read_trace(tmp_path / "t.npz").decoding()
    assert str(caught.value).startswith(str(tmp_path))


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 2, 2)}
    )
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("expert_ids.npy", header.getvalue())
    with pytest.raises(TraceError, match="does not fit"):
        read_trace(tmp_path / "t.npz")
    content = bytearray((tmp_path / "t.npz").read_bytes())
    central = content.rindex(b"PK\x01\x02")
    content[central + 24 : central + 28] = struct.pack("<I", 0xF0000000)  # the size that the directory claims
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(TraceError, match="are not in"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all" * 9])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(TraceError, match=r"t\.npz"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("name", "shape", "experts"),
    [
        ("olmoe-1b-7b-decode-200prompts", (25600, 16, 8), 64),
        ("qwen3-30b-a3b_q4km_top6forced_decode", (128, 48, 6), 128),
        ("gpt-oss-120b_q4km_top2forced_decode", (64, 36, 2), 128),
        ("gemma4-26b-a4b_q4km_top6forced_decode", (128, 30, 6), 128),
    ],
)
def test_published_traces_are_read(name: str, shape: tuple[int, ...], experts: int) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here: published traces are not part of the repository")
    trace: Trace = read_trace(path)
    assert trace.expert_ids.shape == shape
    assert trace.experts == experts
    assert len(trace.sequence_starts()) == (200 if shape[0] == 25600 else 1)
