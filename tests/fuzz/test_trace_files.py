"""Damaged and hostile traces and policy files."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmoe.bench.replay import Material, Setting, replay
from flashmoe.learning.train import train
from flashmoe.store.policies.learned_file import load_learned, save_learned
from flashmoe.store.policies.registry import Geometry, learned_maker
from flashmoe.store.trace import header_bytes, read_trace

Contained = Callable[[Path, Callable[[], object]], str]
Arrays = dict[str, np.ndarray]
NUMBERS = [0, 1, -1, 7, 255, 1 << 15, 1 << 31, (1 << 63) - 1, -(1 << 63)]
TEXTS = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b'{"format": "flashmoe-trace", "version": 1}',
    b"[" * 5000,
    b"\xff\xfe",
    b"9" * 6000,
]


def budget(examples: int) -> Callable[[Any], Any]:
    """So many examples in `make test`, a hundred times as many in `make fuzz`."""
    factor = settings.default.max_examples / settings.get_profile("default").max_examples
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=int(examples * factor), deadline=None, suppress_health_check=checks)


@pytest.fixture(scope="session")
def trace_arrays() -> Arrays:
    rng = np.random.default_rng(0)
    ids = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(300)]).astype(np.uint8)
    header = {"format": "flashmoe-trace", "version": 1, "model": "m", "layers": [0, 1], "experts": 8}
    return {
        "header": header_bytes(header),
        "expert_ids": ids,
        "router_weights": rng.random(ids.shape).astype(np.float16),
        "token_id": np.arange(300, dtype=np.int32),
        "sequence_id": np.arange(300, dtype=np.int32) // 100,
        "step": np.arange(300, dtype=np.int32) // 2,
        "phase": np.ones(300, np.uint8),
    }


@pytest.fixture(scope="session")
def policy_arrays(trace_arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    folder = tmp_path_factory.mktemp("policy")
    np.savez(folder / "t.npz", **trace_arrays)
    save_learned(folder / "p.npz", train(read_trace(folder / "t.npz")))
    with np.load(folder / "p.npz") as arrays:
        return dict(arrays)


@st.composite
def changed_arrays(draw: st.DrawFn, arrays: Arrays) -> bytes:
    """An .npz with one to three changes to its arrays, and perhaps some to its bytes."""
    arrays = dict(arrays)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(arrays)))
        array = arrays[name]
        kind = draw(st.sampled_from(["value", "shape", "dtype", "remove", "cut", "text", "nan"]))
        if kind == "remove":
            del arrays[name]
            arrays["x"] = array
        elif kind == "value" and array.size and array.dtype.kind in "iu":
            array = array.astype(np.int64).copy()
            array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(NUMBERS))
            arrays[name] = array
        elif kind == "shape":
            arrays[name] = array.reshape(draw(st.sampled_from([(-1,), (1, -1), (*array.shape, 1)])))
        elif kind == "dtype" and array.dtype.kind != "S":  # numbers come back from no text
            arrays[name] = array.astype(draw(st.sampled_from(["f8", "i8", "?", "c8", "S3", "f2"])))
        elif kind == "cut":
            arrays[name] = array[: draw(st.integers(0, 3))]
        elif kind == "text":
            arrays[name] = np.frombuffer(draw(st.sampled_from(TEXTS)), np.uint8)
        elif array.dtype.kind == "f":
            arrays[name] = np.full_like(array, np.nan)
    file = io.BytesIO()
    (np.savez_compressed if draw(st.booleans()) else np.savez)(file, **arrays)
    return draw(damaged(file.getvalue())) if draw(st.integers(0, 3)) == 0 else file.getvalue()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Flipped, cut out, doubled or cut off, mostly in what names and sizes are told by."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = st.integers(max(0, len(data) - 400), len(data))
        at = draw(st.one_of(st.integers(0, len(data)), end, st.integers(0, 200)))
        kind = draw(st.sampled_from(["flip", "flip", "ones", "cut", "double", "end"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "ones":
            data[at : at + 4] = b"\xff" * len(data[at : at + 4])
        elif kind == "cut":
            del data[at : at + draw(st.sampled_from([1, 4, 50]))]
        elif kind == "double":
            data[at:at] = data[at : at + 50]
        elif kind == "end":
            del data[at:]
    return bytes(data)


def use_trace(path: Path) -> None:
    """What a user may do with it."""
    trace = read_trace(path).decoding()
    geometry = Geometry(trace.layers, trace.experts)
    replay(Material.of(trace), "lfu-decay", Setting(8), geometry)
    if trace.experts <= 16:
        train(trace)


def use_policy(path: Path) -> None:
    learned = load_learned(path)
    policy = learned_maker(learned, Geometry((0, 1), 8))().together()
    if learned.experts == 8 and learned.layers == (0, 1):
        for step in range(12):
            for layer in (0, 1):
                policy.touch(layer, [step % 8, (step + 3) % 8])
                policy.refresh()
                if step < 8:
                    policy.insert(layer, step)
        assert policy.victim(0, frozenset()) is not None


@budget(40)
@given(data=st.data())
def test_trace(tmp_path: Path, trace_arrays: Arrays, contained: Contained, data: st.DataObject) -> None:
    file = tmp_path / "t.npz"
    file.write_bytes(data.draw(changed_arrays(trace_arrays)))
    contained(tmp_path, lambda: use_trace(file))


@budget(40)
@given(data=st.data())
def test_policy(tmp_path: Path, policy_arrays: Arrays, contained: Contained, data: st.DataObject) -> None:
    file = tmp_path / "p.npz"
    file.write_bytes(data.draw(changed_arrays(policy_arrays)))
    contained(tmp_path, lambda: use_policy(file))


def test_what_was_not_changed_works(
    tmp_path: Path, trace_arrays: Arrays, policy_arrays: Arrays, contained: Contained
) -> None:
    np.savez(tmp_path / "t.npz", **trace_arrays)
    np.savez(tmp_path / "p.npz", **policy_arrays)
    assert contained(tmp_path, lambda: use_trace(tmp_path / "t.npz")) == ""
    assert contained(tmp_path, lambda: use_policy(tmp_path / "p.npz")) == ""


def test_a_bomb_takes_no_memory(tmp_path: Path, contained: Contained) -> None:
    file = tmp_path / "t.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 33, 1, 1)}
        )
        with archive.open("expert_ids.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(64):
                member.write(bytes(1 << 20))
    assert "does not fit" in contained(tmp_path, lambda: use_trace(file))
