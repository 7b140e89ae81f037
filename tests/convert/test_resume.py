"""Killed at any system call, a conversion goes on and ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle
from flashmoe.convert import convert, verify, writing
from flashmoe.errors import BundleError, CheckpointError, FlashmoeError

# Converts argv[1] to argv[2] and kills itself at the argv[3]-th call that changes the disk.
KILLED = """
import os, signal, sys
from flashmoe.convert import convert, writing
left = int(sys.argv[3])
def deadly(call):
    def counted(*arguments):
        global left
        left -= 1
        if left == 0:
            if call is os.write:
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return counted
os.write, os.fdatasync, os.rename = deadly(os.write), deadly(os.fdatasync), deadly(os.rename)
os.ftruncate, os.unlink = deadly(os.ftruncate), deadly(os.unlink)
writing._SYNC_NBYTES = 4096
convert(sys.argv[1], sys.argv[2], consume_source=len(sys.argv) > 4)
print(left)
"""
NEVER = 10**9


def run_killed(src: Path, dst: Path, call: int, *consume: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(src), str(dst), str(call), *consume]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The bundle of an undisturbed conversion."""
    return contents(convert(source, tmp_path / "whole").path)


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, whole: dict[str, bytes], seed: int
) -> None:
    rng, dst = random.Random(seed), tmp_path / "killed"
    kills = 0
    while (run := run_killed(source, dst, rng.randint(3, 60))).returncode == -signal.SIGKILL:
        kills += 1
        if not (dst / "manifest.json").exists():
            with pytest.raises(BundleError, match="not a flashmoe bundle"):
                Bundle.open(dst)
        assert kills < 60, "it makes no progress"
    assert run.returncode == 0, run.stderr
    assert kills > 1
    assert contents(dst) == whole


def test_every_call_of_a_run_may_be_the_last(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    run = run_killed(source, tmp_path / "count", NEVER)
    calls = NEVER - int(run.stdout)
    for call in range(1, calls, calls // 6):
        dst = tmp_path / f"killed-{call}"
        assert run_killed(source, dst, call).returncode == -signal.SIGKILL
        if (dst / "manifest.json").exists() and not (dst / "convert.journal").exists():
            continue
        report = convert(source, dst)
        assert report.path == dst
        assert contents(dst) == whole


def test_bytes_lost_or_changed_behind_the_journal_are_written_again(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for damage in ("flip", "cut"):
        dst = tmp_path / damage
        run_killed(source, dst, 120)
        (partial,) = dst.rglob("*.partial")
        data = bytearray(partial.read_bytes())
        data[len(data) // 2] ^= 1
        partial.write_bytes(data if damage == "flip" else data[: len(data) // 2])
        assert convert(source, dst).resumed
        assert contents(dst) == whole


def test_a_torn_journal_line_is_dropped(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    dst = tmp_path / "torn"
    run_killed(source, dst, 120)
    journal = dst / "convert.journal"
    journal.write_bytes(journal.read_bytes()[:-3])
    convert(source, dst)
    assert contents(dst) == whole


def test_consuming_the_source_while_being_killed(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    rng, dst, kills = random.Random(7), tmp_path / "consumed", 0
    while (run := run_killed(source, dst, rng.randint(20, 90), "consume")).returncode == -signal.SIGKILL:
        kills += 1
    assert run.returncode == 0, run.stderr
    assert kills > 0
    assert contents(dst) == whole
    assert not list(source.glob("*.safetensors"))


def test_consumed_shards_are_reported_and_unknown_tensors_keep_theirs(tmp_path: Path, forms: Any) -> None:
    tensors = forms.model().hugging_face()
    tensors = {"model.layers.0.mystery.weight": forms.stored(np.ones((2, 2), np.float32)), **tensors}
    source = forms.write(tmp_path / "source", tensors, shards=3)
    report = convert(source, tmp_path / "bundle", consume_source=True)
    assert report.unknown == ["model.layers.0.mystery.weight"]
    assert [p.name for p in report.deleted_shards] == [f"model-0000{i}-of-00003.safetensors" for i in (2, 3)]
    assert [p.name for p in source.glob("*.safetensors")] == ["model-00001-of-00003.safetensors"]
    assert verify(Bundle.open(report.path)).ok


def test_a_shard_is_deleted_before_the_last_layer_is_written(tmp_path: Path, forms: Any) -> None:
    source = forms.write(tmp_path / "source", forms.model().hugging_face(fused=False), shards=4)
    present: list[int] = []
    convert(
        source,
        tmp_path / "bundle",
        consume_source=True,
        progress=lambda done, total: present.append(len(list(source.glob("*.safetensors")))),
    )
    assert present[0] == 4
    assert 0 < min(present) < 4


def begun(source: Path, dst: Path) -> Path:
    assert run_killed(source, dst, 100).returncode == -signal.SIGKILL
    return dst


def test_resuming_with_other_bits_is_refused(source: Path, tmp_path: Path) -> None:
    dst = begun(source, tmp_path / "b")
    with pytest.raises(BundleError, match=r"begun with --bits None, not 8.*delete"):
        convert(source, dst, bits=8)


def test_resuming_from_another_source_is_refused(source: Path, tmp_path: Path, forms: Any) -> None:
    dst = begun(source, tmp_path / "b")
    other = forms.write(tmp_path / "other", forms.model(5).hugging_face(), shards=3)
    with pytest.raises(BundleError, match="has changed since"):
        convert(other, dst)
    third = forms.write(tmp_path / "third", forms.model().hugging_face(), forms.config | {"eos_token_id": 5})
    with pytest.raises(BundleError, match="another source"):
        convert(third, dst)


def test_a_lost_shard_that_is_still_needed_is_named(source: Path, tmp_path: Path) -> None:
    dst = begun(source, tmp_path / "b")
    lost = sorted(source.glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name} is missing and not wholly converted"):
        convert(source, dst)


def test_two_conversions_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "b"

    def again(done: int, total: int) -> None:
        with pytest.raises(BundleError, match="another conversion"):
            convert(source, dst)

    convert(source, dst, progress=again)


def test_output_directories_with_other_things_are_left_alone(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "b")
    with pytest.raises(BundleError, match="is a bundle already"):
        convert(source, tmp_path / "b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BundleError, match="no unfinished bundle"):
        convert(source, tmp_path / "mine")
    with pytest.raises(BundleError, match="no unfinished bundle"):
        convert(source, tmp_path / "mine" / "letter.txt")


def test_a_full_drive_names_the_file_and_the_way_on(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, dst, room = os.write, tmp_path / "b", [30_000]

    def full(fd: int, data: Any) -> int:
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(BundleError, match=r"resident\.safetensors\.partial failed \(No space left") as caught:
        convert(source, dst)
    assert "\n" not in str(caught.value)
    assert not (dst / "manifest.json").exists()
    monkeypatch.undo()
    assert convert(source, dst).resumed
    assert contents(dst) == whole


def test_a_file_size_limit_is_an_error_too(source: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))
    try:
        with pytest.raises(BundleError, match=r"\.partial failed \(File too large\)"):
            convert(source, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_too_little_space_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BundleError, match=r"the drive has 1000 B free.*--consume-source"):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b" / "resident.safetensors.partial").exists()


@pytest.mark.parametrize(
    "shape", ["directory missing", "no config", "no weights", "missing shard", "cut shard"]
)
def test_broken_sources_leave_nothing_behind(source: Path, tmp_path: Path, shape: str) -> None:
    shards = sorted(source.glob("*.safetensors"))
    if shape == "no config":
        (source / "config.json").unlink()
    elif shape == "no weights":
        for file in [*shards, source / "model.safetensors.index.json"]:
            file.unlink()
    elif shape == "missing shard":
        shards[1].unlink()
    elif shape == "cut shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-100])
    path = tmp_path / "nowhere" if shape == "directory missing" else source
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "b").glob("*"))


def test_a_missing_tensor_is_named(tmp_path: Path, forms: Any) -> None:
    tensors = forms.model().hugging_face()
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_norm\.weight"):
        convert(forms.write(tmp_path / "s", tensors), tmp_path / "b")


def test_a_tensor_of_another_size_is_named(tmp_path: Path, forms: Any) -> None:
    config = forms.config | {"vocab_size": 50}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*\[50, 64\] wanted"):
        convert(forms.write(tmp_path / "s", forms.model().hugging_face(), config), tmp_path / "b")


@pytest.mark.parametrize("bits", [0, 5, 16])
def test_other_bits_are_refused(source: Path, tmp_path: Path, bits: int) -> None:
    with pytest.raises(FlashmoeError, match="choose 2, 3, 4, 6 or 8"):
        convert(source, tmp_path / "b", bits=bits)


def test_progress_counts_every_byte_once(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(source, tmp_path / "b", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert sum(p.stat().st_size for p in (tmp_path / "b").rglob("*.bin")) < report.nbytes
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["source"]["kind"] == "hf"
