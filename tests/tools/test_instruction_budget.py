"""The instruction budget: what passes, what fails, and what it says; callgrind and compilers are played by scripts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "instruction_budget.py"
HERE, OTHER = "GCC (Debian 12.2.0-14+deb12u1) 12.2.0", "Debian clang version 14.0.6"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool with a budget of one kernel of 1,000 instructions, recorded with HERE."""
    spec = importlib.util.spec_from_file_location("instruction_budget", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    budget = tmp_path / "budget.json"
    budget.write_text(json.dumps({"compiler": HERE, "instructions": {"norm": 1000}}))
    monkeypatch.setattr(module, "BUDGET", budget)
    return module


def script(folder: Path, name: str, body: str) -> Path:
    """An executable shell script."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("now", "version", "over", "remark"),
    [
        (1029, HERE, 0, ""),
        (1031, HERE, 1, "TOO MANY"),
        (971, HERE, 0, ""),
        (969, HERE, 0, "better: record it"),
        (1249, OTHER, 0, ""),
        (1251, OTHER, 1, "TOO MANY"),
        (751, OTHER, 0, ""),  # another compiler, not better code
        (749, OTHER, 0, "better: record it"),
    ],
)
def test_the_allowance_on_both_sides(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], now: int, version: str, over: int, remark: str
) -> None:
    assert tool.check({"norm": now}, version) == over
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].endswith(remark or "%")
    assert (f"recorded with {HERE}" in shown) == (version != HERE)


def test_a_kernel_without_a_budget_fails_and_so_does_a_budget_without_a_kernel(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.check({"route": 5}, HERE) == 2
    shown = capsys.readouterr().out
    assert "norm" in shown
    assert "is gone" in shown
    assert "is new" in shown


def test_a_call_is_counted_without_its_start(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    program = script(folder, "program", "echo norm")
    # valgrind --tool=... --callgrind-out-file=... --toggle-collect=... PROGRAM KERNEL TIMES
    script(folder, "valgrind", 'echo "==1== Collected : $((5000 + 7 * $6))" >&2')
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    assert tool.measure(str(program)) == {"norm": 7}


@pytest.mark.parametrize(
    "body",
    [
        "echo no AVX2 here >&2; exit 2",
        "echo no AVX2 here >&2",
        "echo no AVX2 here: Collected : 0 >&2",  # the function to collect in was not found
    ],
)
def test_a_count_that_fails_is_an_error_with_its_reason(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    script(tmp_path / "bin", "valgrind", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(SystemExit, match="norm: no AVX2 here"):
        tool.instructions("program", "norm", 1)


@pytest.mark.parametrize("name", ["c++", "g++", "g++-12", "x86_64-linux-gnu-g++-12"])
def test_one_compiler_under_several_names_is_one(tool: ModuleType, tmp_path: Path, name: str) -> None:
    compiler = script(tmp_path / "bin", name, f'echo "{name} (Debian 12.2.0-14+deb12u1) 12.2.0"')
    assert tool.compiler_version(str(compiler)) == HERE


def test_other_compilers_keep_their_names(tool: ModuleType, tmp_path: Path) -> None:
    compiler = script(tmp_path / "bin", "c++", f'echo "{OTHER}"')
    assert tool.compiler_version(str(compiler)) == OTHER
