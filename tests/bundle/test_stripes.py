"""Experts over several directories: the same records, the same bits, and whatever is missing or mixed up is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.bundle import restripe
from flashmoe.bundle.manifest import load_manifest
from flashmoe.bundle.reader import Bundle
from flashmoe.bundle.restripe import stripe
from flashmoe.bundle.stripes import MARK_FILE, read_mark
from flashmoe.bundle.verify import verify
from flashmoe.cli import main
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.errors import BundleError

LAYERS, EXPERTS = 2, 4
IDS = [1, 5, 9, 200, 7]


def records(path: Path, *given: Path) -> list[bytes]:
    bundle = Bundle.open(path, given)
    return [
        bundle.read_expert(layer, expert).tobytes() for layer in range(LAYERS) for expert in range(EXPERTS)
    ]


def content(path: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def drives(tmp_path: Path) -> list[Path]:
    """Names for directories."""
    return [tmp_path / "drives" / name for name in "abc"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_there_and_back_is_the_same_bundle(small_bundle: Path, drives: list[Path], count: int) -> None:
    before, wanted = content(small_bundle), records(small_bundle)
    report = stripe(small_bundle, drives[:count])
    assert list(report.directories) == drives[:count]
    assert not (small_bundle / "experts").exists()
    assert records(small_bundle) == wanted
    assert verify(Bundle.open(small_bundle)).ok
    sizes = [(drive / "layer-001.bin").stat().st_size for drive in drives[:count]]
    assert sum(sizes) == len(wanted[0]) * EXPERTS
    assert max(sizes) - min(sizes) <= len(wanted[0])
    stripe(small_bundle, [])
    assert content(small_bundle) == before
    assert not any(drive.exists() for drive in drives)


def test_the_engine_gives_the_same_bits(small_bundle: Path, drives: list[Path]) -> None:
    def logits(*given: Path) -> bytes:
        options = EngineOptions(threads=1, expert_slots=2, verify_reads=True, experts_dirs=given)
        with Engine.open(small_bundle, options) as engine:
            prompt = engine.feed(IDS, "all").tobytes()
            return prompt + engine.feed([3], "last").tobytes()

    wanted = logits()
    stripe(small_bundle, drives)
    assert logits() == wanted
    moved = drives[1].rename(drives[1].with_name("elsewhere"))
    assert logits(moved) == wanted


def test_moved_directories_are_found_in_any_order_and_linked_anew(
    small_bundle: Path, drives: list[Path]
) -> None:
    wanted = records(small_bundle)
    stripe(small_bundle, drives[:2])
    moved = [drive.rename(drive.with_name(drive.name * 2)) for drive in drives[:2]]
    with pytest.raises(BundleError, match=r"a link to .*/a\) .*is missing: mount its drive.*--experts-dir"):
        Bundle.open(small_bundle)
    assert records(small_bundle, *reversed(moved)) == wanted
    report = stripe(small_bundle, list(reversed(moved)))
    assert (list(report.directories), report.nbytes) == (moved, 0)
    assert records(small_bundle) == wanted


def test_drives_that_changed_places_are_told(small_bundle: Path, drives: list[Path]) -> None:
    stripe(small_bundle, drives[:2])
    spare = drives[0].rename(drives[2])
    drives[1].rename(drives[0])
    spare.rename(drives[1])
    with pytest.raises(BundleError, match=r"does not hold experts 1 of 2 of .*: mount the right drive"):
        Bundle.open(small_bundle)


def test_one_drive_takes_the_place_of_another(small_bundle: Path, drives: list[Path]) -> None:
    wanted = records(small_bundle)
    stripe(small_bundle, drives[:2])
    kept = drives[1] / "layer-000.bin"
    inode = kept.stat().st_ino
    stripe(small_bundle, [drives[1], drives[2]])
    assert records(small_bundle) == wanted
    assert kept.stat().st_ino == inode
    assert not drives[0].exists()


def test_another_number_of_drives(small_bundle: Path, drives: list[Path]) -> None:
    wanted = records(small_bundle)
    stripe(small_bundle, drives[:1])
    stripe(small_bundle, drives[1:])
    assert records(small_bundle) == wanted
    assert not drives[0].exists()
    assert len(load_manifest(small_bundle).stripes) == 2


def interrupt_at(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """Raises KeyboardInterrupt when restripe calls `name` for the calls-th time."""
    original: Callable[..., object] = getattr(restripe, name)
    left = iter(range(calls))

    def replacement(*args: object, **options: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(restripe, name, replacement)


@pytest.mark.parametrize(
    ("name", "calls", "switched"),
    [
        ("write_mark", 1, False),
        ("_copy", 0, False),
        ("_copy", 3, False),
        ("read_exact", 5, False),
        ("link_directories", 0, False),
        ("write_manifest", 0, False),
        ("_delete_old", 0, True),
    ],
)
def test_interrupted_it_is_whole_and_goes_on(
    small_bundle: Path,
    drives: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    calls: int,
    switched: bool,
) -> None:
    wanted = records(small_bundle)
    with monkeypatch.context() as patch:
        interrupt_at(patch, name, calls)
        with pytest.raises(KeyboardInterrupt):
            stripe(small_bundle, drives[:2])
    assert bool(load_manifest(small_bundle).stripes) == switched
    assert records(small_bundle) == wanted
    stripe(small_bundle, drives[:2])
    assert records(small_bundle) == wanted
    assert verify(Bundle.open(small_bundle)).ok
    assert not (small_bundle / "experts").exists()
    assert sorted(path.name for path in drives[0].iterdir()) == ["layer-000.bin", "layer-001.bin", MARK_FILE]


def test_damage_is_not_copied(small_bundle: Path, drives: list[Path]) -> None:
    file = small_bundle / "experts" / "layer-001.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"layer-001\.bin: expert 0 of layer 1 does not match"):
        stripe(small_bundle, drives[:2])
    assert not load_manifest(small_bundle).stripes
    assert not (drives[0] / "layer-001.bin").exists()


def test_a_stripe_of_wrong_size_is_told(small_bundle: Path, drives: list[Path]) -> None:
    stripe(small_bundle, drives[:2])
    with (drives[1] / "layer-001.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"1/layer-001\.bin has \d+ bytes"):
        Bundle.open(small_bundle)


def test_a_damaged_record_is_found_where_it_lies(small_bundle: Path, drives: list[Path]) -> None:
    stripe(small_bundle, drives[:2])
    file = drives[1] / "layer-000.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last record of the second stripe: expert 3
    file.write_bytes(data)
    [damage] = verify(Bundle.open(small_bundle)).damaged
    assert damage.file.resolve() == file.resolve()
    assert damage.expert == 3


def test_what_cannot_be_used_is_refused(small_bundle: Path, drives: list[Path]) -> None:
    drives[0].mkdir(parents=True)
    (drives[0] / "mine").touch()
    for given, message in (
        ([drives[0]], "is not empty"),
        ([drives[1], drives[1]], "given twice"),
        ([drives[1] / str(i) for i in range(5)], "5 directories are too many for 4 experts"),
        ([drives[0] / "mine"], "cannot be used"),
    ):
        with pytest.raises(BundleError, match=message):
            stripe(small_bundle, given)
    assert verify(Bundle.open(small_bundle)).ok
    with pytest.raises(BundleError, match="keeps its experts in itself"):
        Bundle.open(small_bundle, [drives[0]])
    stripe(small_bundle, drives[1:])
    with pytest.raises(BundleError, match="holds no experts of"):
        Bundle.open(small_bundle, [drives[0]])


def test_a_full_drive_is_told_before_anything_is_copied(
    small_bundle: Path, drives: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restripe, "_SPARE_NBYTES", 1 << 62)
    with pytest.raises(
        BundleError, match=r"its drive has .* free: free some, or name a directory on another"
    ):
        stripe(small_bundle, drives[:2])
    assert not any(drives[0].iterdir())


@pytest.mark.parametrize(
    "stripes", [[], ["x"] * 2, ["../x"], ["/x"], [7], [f"s/{i}" for i in range(5)], "s", None]
)
def test_manifests_that_make_no_sense(small_bundle: Path, drives: list[Path], stripes: object) -> None:
    stripe(small_bundle, drives[:2])
    file = small_bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["format_version"] == 2
    manifest["experts"]["stripes"] = stripes
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"manifest\.json: .*stripes"):
        Bundle.open(small_bundle)


@pytest.mark.parametrize(
    "mark", ["", "{}", "[]", '{"experts": "0", "stripe": 0, "stripes": 2}', "[" * 10_000]
)
def test_marks_that_make_no_sense(small_bundle: Path, drives: list[Path], mark: str) -> None:
    stripe(small_bundle, drives[:2])
    (drives[0] / MARK_FILE).write_text(mark)
    with pytest.raises(BundleError, match="does not hold experts 1 of 2"):
        Bundle.open(small_bundle)


def test_only_one_at_a_time(small_bundle: Path, drives: list[Path]) -> None:
    with restripe._locked(small_bundle), pytest.raises(BundleError, match="being striped by another"):
        stripe(small_bundle, drives)


def test_the_commands(small_bundle: Path, drives: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stripe", str(small_bundle)]
    assert main(words) == 1
    assert "--together" in capsys.readouterr().err
    assert main([*words, *(f"--experts-dir={drive}" for drive in drives[:2]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["directories"] == [str(drive) for drive in drives[:2]]
    assert read_mark(drives[1]) is not None
    assert main(["inspect", str(small_bundle)]) == 0
    assert str(drives[1]) in capsys.readouterr().out
    moved = drives[1].rename(drives[2])
    assert main(["verify", str(small_bundle)]) == 1
    assert "is missing" in capsys.readouterr().err
    for command in (["verify"], ["run", "--max-tokens=1", "--temperature=0"]):
        prompt = ["a"] if command[0] == "run" else []
        assert main([*command, str(small_bundle), *prompt, f"--experts-dir={moved}"]) == 0
    shutil.move(moved, drives[1])
    assert main([*words, "--together"]) == 0
    assert main(["verify", str(small_bundle)]) == 0


def test_synth_writes_the_same_experts(small_bundle: Path, tmp_path: Path, drives: list[Path]) -> None:
    path = tmp_path / "striped"
    words = [f"--experts-dir={drive}" for drive in drives]
    assert main(["synth", str(tmp_path / "config.json"), str(path), *words]) == 0
    assert len(Bundle.open(path).experts_dirs) == 3
    assert records(path) == records(small_bundle)
    stripe(path, [])
    assert content(path) == content(small_bundle)
