"""What every fuzzer holds a reader of files to: known errors in one line, little memory, no file outside its folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import sysconfig
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import load_file

from flashmoe import cgroups, env
from flashmoe.convert import convert
from flashmoe.errors import FlashmoeError

# `make fuzz`: a hundred times the examples of `make test`.
settings.register_profile("fuzz", max_examples=100 * settings.get_profile("default").max_examples)
GOLDEN = Path(__file__).parents[1] / "golden"
MOST_NBYTES = 32 << 20  # in Python and numpy at once; the files have 0.2 MB
MOST_MAPPED = 3 << 30  # of addresses: eight I/O threads reserve 1.1 GiB without touching them
LONGEST_LINE = 600
# Where the interpreter and our own code are; /proc and /sys tell what the machine has.
HOME = Path(__file__).parents[2]
ELSEWHERE = tuple(
    str(path) for path in (sys.prefix, sys.base_prefix, HOME / "src", sysconfig.get_paths()["stdlib"])
)


class Witness:
    """Remembers the paths that Python opens while it watches.  An audit hook cannot be removed, so there is one."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.watching = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened.append(os.path.abspath(os.fsdecode(arguments[0])))


@pytest.fixture(scope="session")
def witness() -> Witness:
    return Witness()


@contextmanager
def few_addresses() -> Iterator[None]:
    """No more than MOST_MAPPED beside what the process has mapped; more is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_MAPPED, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="session")
def contained(witness: Witness) -> Callable[[Path, Callable[[], object]], str]:
    """Runs an action on files of a folder: "" or the line of its FlashmoeError; everything else fails the test."""

    def run(folder: Path, action: Callable[[], object]) -> str:
        witness.opened, line = [], ""
        tracemalloc.start()
        try:
            witness.watching = True
            with few_addresses():
                action()
        except FlashmoeError as error:
            line = str(error)
            assert line, "an error without a word"
        finally:
            witness.watching = False
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert "\n" not in line
        assert "\r" not in line
        assert len(line) <= LONGEST_LINE
        assert peak <= MOST_NBYTES
        allowed = (str(folder), *ELSEWHERE, "/proc/", "/sys/")
        assert [path for path in witness.opened if not path.startswith(allowed)] == []
        return line

    return run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLX checkpoint in one file."""
    return Path(shutil.copytree(GOLDEN / "mlx_q4", tmp_path_factory.mktemp("fuzz") / "source"))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, quantized_forms: ModuleType) -> Callable[[str], Path]:
    """A small model with its projections in one of the forms of tests/golden/quantized_forms.py."""
    folder, plain = tmp_path_factory.mktemp("quantized"), GOLDEN / "hf_text_f32"

    @cache
    def make(form: str) -> Path:
        tensors, config = {}, json.loads((plain / "config.json").read_text())
        for name, values in load_file(plain / "model.safetensors").items():
            if name.endswith("proj.weight"):
                packed = quantized_forms.make(form, *values.shape)
                module = name.removesuffix(".weight")
                tensors |= {f"{module}{end}": tensor for end, tensor in packed.tensors.items()}
                config["quantization_config"] = packed.config
            else:
                tensors[name] = quantized_forms.stored(values, "F32")
        path: Path = quantized_forms.write_checkpoint(folder / form / "source", tensors, config)
        return path

    return make


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory, gguf_forms: ModuleType) -> Path:
    """A directory with a small Qwen3.5 in GGUF."""
    config = json.loads((GOLDEN / "hf_text_f32" / "config.json").read_text())
    vectors, matrices = {}, {}
    experts: dict[str, list[Any]] = {}
    for name, values in sorted(load_file(GOLDEN / "hf_text_f32" / "model.safetensors").items()):
        module = name.removeprefix("model.").removesuffix(".weight")
        head, found, tail = module.partition(".experts.")
        if found:
            experts.setdefault(f"{head}.experts.{tail.partition('.')[2]}", []).append(values)
        else:
            (vectors if values.ndim == 1 or values.ndim == 3 else matrices)[module] = values
    matrices |= {name: np.stack(parts) for name, parts in experts.items()}
    folder = tmp_path_factory.mktemp("gguf") / "source"
    folder.mkdir()
    gguf_forms.qwen35moe(folder / "m.gguf", config, vectors, matrices, "Q4_0")
    return folder


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A copy of one of the checkpoints of tests/golden."""
    folder = tmp_path_factory.mktemp("golden")
    return cache(lambda form: Path(shutil.copytree(GOLDEN / form, folder / form / "source")))


@pytest.fixture(scope="session")
def gguf_family(
    tmp_path_factory: pytest.TempPathFactory, gguf_families: ModuleType, gguf_forms: ModuleType
) -> Callable[[str], Path]:
    """The same as a GGUF file, in a directory of its own."""
    folder = tmp_path_factory.mktemp("gguf_family")

    @cache
    def make(form: str, architecture: str) -> Path:
        source, path = GOLDEN / form, folder / form / "source"
        path.mkdir(parents=True)
        config = json.loads((source / "config.json").read_text())
        tensors, fused = gguf_families.read(source), architecture == "olmoe"
        gguf_families.write(path / "m.gguf", architecture, config, tensors, gguf_forms, fused=fused)
        return path

    architectures = {"gpt_oss_mxfp4": "gpt-oss", "deepseek_f32": "deepseek2", "family_olmoe": "olmoe"}
    return lambda form: make(form, architectures[form])


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint in three files and an index."""
    return Path(shutil.copytree(GOLDEN / "hf_next_bf16", tmp_path_factory.mktemp("fuzz") / "sharded"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own, among files that it must not touch."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = convert(GOLDEN / "mlx_q4", folder / "bundle").path
    shutil.copyfile(path / "experts" / "layer-000.bin", folder / "outside.bin")
    return path


@pytest.fixture(scope="session")
def striped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its experts in two directories."""
    folder = tmp_path_factory.mktemp("striped")
    return convert(GOLDEN / "mlx_q4", folder / "bundle", experts_dirs=[folder / "a", folder / "b"]).path


@pytest.fixture(autouse=True)
def little_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with much memory must not be needed to find what takes too much."""
    monkeypatch.setattr(cgroups, "limits", lambda root: [])
    monkeypatch.setattr(env, "memory_available", lambda: 1 << 40)
