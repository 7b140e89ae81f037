"""`flashmoe convert`, killed at random: what is left is no bundle, and the same command ends with the same bytes."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.cli import main
from flashmoe.models.registry import find_family
from flashmoe.models.spec import FfnSource, FfnSpec, MatrixSource, VectorSpec

LARGER = {"hidden_size": 256, "num_experts": 24, "moe_intermediate_size": 64, "vocab_size": 4000}
KILLS = 4  # of one conversion; the next run is left alone


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all that a Hugging Face checkpoint of the model holds, an expert at a time."""
    family = find_family(config)
    spec = family.spec(family.config(config))

    def matrices(*sources: MatrixSource) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{source.module}.weight", (source.rows, source.cols)) for source in sources)

    def ffn(source: FfnSource) -> Iterator[tuple[str, tuple[int, ...]]]:
        return matrices(source.gate, source.up, source.down)

    for item in spec.resident:
        if isinstance(item, VectorSpec):
            yield item.source, item.shape
        else:
            yield from ffn(item.source) if isinstance(item, FfnSpec) else matrices(item.source)
    for layer in spec.experts:
        for expert in range(layer.count):
            yield from ffn(layer.forms[1](expert))


@pytest.fixture(scope="module")
def random_values() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def checkpoint(tmp_path: Path, forms: Any, random_values: np.random.Generator) -> Path:
    """Some 20 MB: its conversion takes long enough to be killed in the middle."""
    config = forms.config | LARGER
    stored = {
        name if name == "lm_head.weight" else f"model.{name}": forms.stored(
            random_values.normal(0, 0.05, shape).astype(np.float32)
        )
        for name, shape in tensors(config)
    }
    folder: Path = forms.write(tmp_path / "source", stored, config, shards=2)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def written(folder: Path) -> int:
    """Bytes in a folder; files come and go meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def converting(source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flashmoe.cli", "convert", str(source), str(output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed(process: subprocess.Popen[bytes], progress: Callable[[], float], limit: float) -> bool:
    """Kill it once progress() reaches the limit; false when it has ended before."""
    while process.poll() is None and progress() < limit:
        time.sleep(0.0005)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


class Clock:
    """Seconds since a folder has appeared; before that a program only loads its libraries."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._began = folder, math.inf

    def __call__(self) -> float:
        if self._began == math.inf and self._folder.exists():
            self._began = time.monotonic()
        return max(0.0, time.monotonic() - self._began)


def no_bundle(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says in one line that it is none, and what to do."""
    for command in ("run", "inspect", "verify"):
        code = main([command, str(output), *(["Hi"] if command == "run" else [])])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (1, "", 1)
        if (output / "convert.journal").exists():
            assert err == (
                f"flashmoe: error: {output} is not a flashmoe bundle yet, its conversion was interrupted or is still "
                "running: run the same `flashmoe convert` command again to finish it\n"
            )


@pytest.mark.parametrize("by", ["bytes", "time"])
def test_killed_at_random_it_ends_with_the_same_bytes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    output = tmp_path / "whole"
    clock = Clock(output)
    assert not killed(converting(checkpoint, output), clock, math.inf)
    whole, duration = contents(output), clock()
    size = sum(map(len, whole.values()))
    rng, output, kills = random.Random(by), tmp_path / "killed", 0
    while kills < KILLS:
        process = converting(checkpoint, output)
        if by == "bytes":
            kills += killed(process, lambda: written(output), rng.uniform(0, size))
        else:
            kills += killed(process, Clock(output), rng.uniform(0, duration))
        if (output / "manifest.json").exists():  # it was finished, if perhaps not yet its process
            assert main(["verify", str(output)]) == 0
            assert {**contents(output), "convert.journal": b""} == {**whole, "convert.journal": b""}
            capsys.readouterr()
            shutil.rmtree(output)
        elif output.exists():
            no_bundle(output, capsys)
    if output.exists():
        assert not killed(converting(checkpoint, output), clock, math.inf)
        assert contents(output) == whole
