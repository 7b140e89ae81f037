"""What the command loads before it knows what to do: nothing heavy (it has 150 ms on a small machine)."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "jinja2",
    "rich",
    "flashmoe._native",
    "flashmoe.engine",
)
# Python itself loads about 60; numpy alone would add 150.
MODULE_LIMIT = 110


def modules_after(statement: str) -> set[str]:
    code = f"import sys\ntry:\n    {statement}\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import flashmoe",
        "from flashmoe.cli import main; main(['--help'])",
        "from flashmoe.cli import main; main([])",
    ],
)
def test_help_and_import_load_nothing_heavy(statement: str) -> None:
    modules = modules_after(statement)
    assert not modules & set(HEAVY)
    assert len(modules) < MODULE_LIMIT


@pytest.mark.parametrize("command", ["run", "convert", "inspect", "verify", "synth", "doctor"])
def test_a_commands_help_loads_neither_numpy_nor_the_native_core(command: str) -> None:
    modules = modules_after(f"from flashmoe.cli import main; main(['{command}', '--help'])")
    assert f"flashmoe.cli.{command}" in modules
    assert not modules & set(HEAVY)


def test_no_command_loads_another_ones_file() -> None:
    modules = modules_after("from flashmoe.cli import main; main(['verify', '--help'])")
    assert not modules & {"flashmoe.cli.run", "flashmoe.cli.doctor", "flashmoe.cli.inspect"}
