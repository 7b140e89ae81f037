"""House rules that no linter checks: sizes, names, and who may touch the native core."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "flashmoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "native").rglob("*") if p.suffix in (".cc", ".h"))
LONGEST_FUNCTION, LONGEST_FILE = 60, 500
NATIVE_USERS = {"kernels/cpu.py", "store/reader.py", "engine/sampler.py"}


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", [*SOURCES, *NATIVE], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


def test_no_function_is_too_long() -> None:
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in SOURCES
        for node in functions(file)
        if (node.end_lineno or node.lineno) - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert long == []


def test_only_three_modules_import_the_native_core() -> None:
    users = {
        file.relative_to(PACKAGE).as_posix()
        for file in SOURCES
        if any(name.startswith("flashmoe._native") for name in imported(file))
    }
    assert users <= NATIVE_USERS


def test_names_say_what_a_thing_is() -> None:
    vague = re.compile(r"^class \w*(Manager|Helper|Utils?)\b", re.MULTILINE)
    assert [file for file in SOURCES if vague.search(file.read_text())] == []
    assert [file for file in SOURCES if "util" in file.stem] == []


def test_kernels_and_io_know_neither_each_other_nor_python() -> None:
    forbidden = {"kernels": ("Python.h", "nanobind", "/io/"), "io": ("Python.h", "nanobind", "/kernels/")}
    for folder, words in forbidden.items():
        for file in NATIVE:
            if f"native/{folder}/" in file.as_posix():
                includes = re.findall(r"#include [<\"](.+)[>\"]", file.read_text())
                assert [i for i in includes if any(word in f"/{i}" for word in words)] == [], file
