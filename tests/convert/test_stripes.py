"""convert and synth with --experts-dir: the experts of a plain bundle, resumable, refused where they cannot be."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe.bundle import Bundle
from flashmoe.bundle.restripe import stripe
from flashmoe.cli import main
from flashmoe.convert import convert, verify, writing
from flashmoe.errors import BundleError

# Converts argv[1] to argv[2] over argv[4:] and kills itself at the argv[3]-th call that changes the disk.
KILLED = """
import os, signal, sys
from flashmoe.convert import convert, writing
left = int(sys.argv[3])
def deadly(call):
    def counted(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted
for name in ("write", "fdatasync", "rename", "ftruncate", "unlink", "symlink", "mkdir"):
    setattr(os, name, deadly(getattr(os, name)))
writing._SYNC_NBYTES = 4096
convert(sys.argv[1], sys.argv[2], experts_dirs=sys.argv[4:])
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def drives(tmp_path: Path) -> list[Path]:
    return [tmp_path / "drives" / name for name in "ab"]


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The bundle of a conversion without stripes."""
    return contents(convert(source, tmp_path / "whole").path)


def test_together_they_are_the_plain_bundle(
    source: Path, tmp_path: Path, drives: list[Path], whole: dict[str, bytes]
) -> None:
    path = convert(source, tmp_path / "striped", experts_dirs=drives).path
    assert [one.resolve() for one in Bundle.open(path).experts_dirs] == drives
    assert not (path / "experts").exists()
    assert verify(Bundle.open(path)).ok
    stripe(path, [])
    assert contents(path) == whole


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, drives: list[Path], whole: dict[str, bytes], seed: int
) -> None:
    rng, dst, kills = random.Random(seed), tmp_path / "killed", 0

    def run() -> int:
        words = [str(source), str(dst), str(rng.randint(10, 60)), *map(str, drives)]
        return subprocess.run([sys.executable, "-c", KILLED, *words], check=False).returncode

    while (code := run()) == -signal.SIGKILL:
        kills += 1
        if not (dst / "manifest.json").exists():
            with pytest.raises(BundleError, match="not a flashmoe bundle"):
                Bundle.open(dst)
    assert (code, kills > 0) == (0, True)
    assert verify(Bundle.open(dst)).ok
    stripe(dst, [])
    assert contents(dst) == whole


def test_what_cannot_be_is_refused_and_leaves_no_trace(
    source: Path, tmp_path: Path, drives: list[Path]
) -> None:
    drives[0].mkdir(parents=True)
    (drives[0] / "mine").touch()
    with pytest.raises(BundleError, match="a is not empty"):
        convert(source, tmp_path / "dst", experts_dirs=drives)
    with pytest.raises(BundleError, match="directories are too many"):
        convert(source, tmp_path / "many", experts_dirs=[drives[1] / str(i) for i in range(65)])
    convert(source, tmp_path / "dst")


def test_another_directory_is_no_continuation(
    source: Path, tmp_path: Path, drives: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.UnitWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "dst", experts_dirs=drives)
    for others in ([], drives[:1], drives[::-1]):
        with pytest.raises(BundleError, match="begun with other --experts-dir"):
            convert(source, tmp_path / "dst", experts_dirs=others)
    assert convert(source, tmp_path / "dst", experts_dirs=drives).resumed


def test_each_drive_is_asked_for_its_share(
    source: Path, tmp_path: Path, drives: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All on one drive here: together they need what a plain bundle needs."""
    asked = []

    def usage(folder: Path) -> object:
        asked.append(folder)
        return type("Usage", (), {"free": 0})

    monkeypatch.setattr("flashmoe.convert.writing.shutil.disk_usage", usage)
    with pytest.raises(BundleError) as plain:
        convert(source, tmp_path / "plain")
    with pytest.raises(BundleError) as striped:
        convert(source, tmp_path / "striped", experts_dirs=drives)
    assert len(asked) == 2
    sizes = [str(error.value).split(" needs ")[1] for error in (plain, striped)]
    assert sizes[0] == sizes[1]


def test_the_command(source: Path, tmp_path: Path, drives: list[Path]) -> None:
    words = [f"--experts-dir={drive}" for drive in drives]
    assert main(["convert", str(source), str(tmp_path / "bundle"), *words]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert [one.resolve() for one in bundle.experts_dirs] == drives
    assert main(["verify", str(bundle.path)]) == 0
