"""An engine on a drive that can be broken: over a scripted reader and over the native one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.engine import loading
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import ReadError
from flashmoe.store.fake_reader import FakeReader
from flashmoe.store.reader import NativeReader

PROMPT, NEW, SLOTS = 24, 6, 12  # 12 slots for 240 experts: nearly every expert of a token is read


class Machine:
    """A bundle with files of its own, an engine on it, and what may happen to its drive.

    Every disaster is a context manager that ends with the drive as it was.
    """

    def __init__(self, bundle: Path, readers: list[Any]) -> None:
        self.bundle, self._readers = bundle, readers
        self.prompt: list[int] = json.loads((bundle / "golden.json").read_text())["long"]["ids"][:PROMPT]
        self.expert_files = sorted((bundle / "experts").iterdir())

    @property
    def reader(self) -> Any:
        """The reader of the engine that was opened last."""
        return self._readers[-1]

    def open(self, **options: Any) -> Engine:
        """An engine with 12 expert slots, unless told otherwise."""
        defaults = {"context": 64, "threads": 2, "expert_slots": SLOTS}
        return Engine.open(self.bundle, EngineOptions(**defaults | options))

    def run(self, engine: Engine) -> bytes:
        """A whole request: logits of every token of the prompt and of NEW fixed ones after it, as bytes."""
        rows = [np.array(engine.logits(self.prompt))]
        rows += [np.array(engine.feed([token])) for token in self.prompt[:NEW]]
        return np.concatenate(rows).tobytes()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """The expert files end early."""
        contents = {file: file.read_bytes() for file in self.expert_files}
        for file in self.expert_files:
            os.truncate(file, 5000)
        yield
        self._restore(contents)

    @contextmanager
    def flipped(self) -> Iterator[None]:
        """One bit of every record is wrong."""
        contents = {file: file.read_bytes() for file in self.expert_files}
        for file, content in contents.items():
            damaged = bytearray(content)
            for start in range(0, len(content), len(content) // 8):
                damaged[start + 777] ^= 16
            file.write_bytes(damaged)  # in place: who has it open sees the damage
        yield
        self._restore(contents)

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Every read fails with EIO."""
        if isinstance(self.reader, FakeReader):
            self.reader.gone = errno.EIO
            yield
            self.reader.gone = 0
        else:
            with failing_descriptors([*self.expert_files, self.bundle / "resident.safetensors"]):
                yield

    def _restore(self, contents: dict[Path, bytes]) -> None:
        for file, content in contents.items():
            file.write_bytes(content)


@contextmanager
def failing_descriptors(files: Sequence[Path]) -> Iterator[None]:
    """Every descriptor of this process on one of `files` gives EIO when read.

    It becomes one of /proc/self/mem, where reads of addresses that are not mapped, such as the lowest, give EIO.
    """
    wanted = {str(file.resolve()) for file in files}
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs /proc/self/mem")
    links = {int(name): Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    found = [number for number, link in links.items() if link.is_symlink() and os.readlink(link) in wanted]
    held = {number: os.dup(number) for number in found}  # not earlier: a copy would be found itself
    assert held, "the engine has none of these files open"
    broken = os.open("/proc/self/mem", os.O_RDONLY)
    for descriptor in held:
        os.dup2(broken, descriptor, inheritable=False)
    os.close(broken)
    try:
        yield
    finally:
        for descriptor, copy in held.items():
            os.dup2(copy, descriptor, inheritable=False)
            os.close(copy)


@pytest.fixture(scope="module")
def own_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with expert files of its own; the rest are links."""
    folder = tmp_path_factory.mktemp("faults") / "demo"
    shutil.copytree(demo_bundle, folder, copy_function=os.symlink)
    for file in (folder / "experts").iterdir():
        file.unlink()
        shutil.copyfile(demo_bundle / "experts" / file.name, file)
    return folder


@pytest.fixture(params=["scripted", "direct", "buffered"])
def machine(
    request: pytest.FixtureRequest, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    """The same tests over a scripted and over the native reader, which reads directly or through the page cache."""
    kind, readers = request.param, []

    def make(paths: list[Path], direct: str, queue_depth: int) -> Any:
        if kind == "scripted":
            readers.append(FakeReader(paths))
            return readers[-1]
        try:
            readers.append(
                NativeReader(paths, {"direct": "on", "buffered": "off"}[kind], queue_depth=queue_depth)
            )
        except ReadError as error:
            pytest.skip(f"this file system has no direct reads: {error}")
        return readers[-1]

    monkeypatch.setattr(loading, "NativeReader", make)
    before = {file: file.stat() for file in (own_bundle / "experts").iterdir()}
    yield Machine(own_bundle, readers)
    assert {file: file.stat().st_size for file in before} == {f: s.st_size for f, s in before.items()}


@pytest.fixture(scope="module")
def undisturbed(own_bundle: Path) -> bytes:
    """What Machine.run gives with everything in memory, before any disaster."""
    with Engine.open(own_bundle, EngineOptions(context=64, threads=1)) as engine:
        return Machine(own_bundle, []).run(engine)


@pytest.fixture
def failing() -> Callable[[Sequence[Path]], AbstractContextManager[None]]:
    """failing_descriptors."""
    return failing_descriptors


@pytest.fixture
def greedy() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NEW)
