"""The command line itself: dispatch, exit codes, one-line errors."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from flashmoe import cli
from flashmoe.errors import BundleError

Install = Callable[[Callable[[], int]], None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a sub-command `boom` that does what the test wants."""

    def install(action: Callable[[], int]) -> None:
        module = ModuleType("flashmoe.cli.boom")
        module.configure = lambda parser: None  # type: ignore[attr-defined]
        module.execute = lambda args: action()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flashmoe.cli.boom", module)
        monkeypatch.setitem(cli.COMMANDS, "boom", "for a test")

    return install


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_no_command_is_wrong_usage() -> None:
    assert cli.main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flashmoe ")


@pytest.mark.parametrize(("name", "hint"), [("rum", "did you mean run?"), ("xyz", "see flashmoe --help")])
def test_an_unknown_command(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == f"flashmoe: error: unknown command {name!r}: {hint}\n"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"usage: flashmoe {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_an_unknown_option_is_wrong_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--no-such-option", "x", "y"]) == 2
    assert f"flashmoe {name}: error:" in capsys.readouterr().err


def test_the_commands_exit_code_is_ours(command: Install) -> None:
    command(lambda: 7)
    assert cli.main(["boom"]) == 7


def test_a_user_error_is_one_line(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(BundleError("x.bin is\n too short")))
    assert cli.main(["boom"]) == 1
    assert capsys.readouterr().err == "flashmoe: error: x.bin is too short\n"


def test_a_file_error_names_the_file(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(OSError(errno.ENOSPC, "No space left on device", "/data/out.bin")))
    assert cli.main(["boom"]) == 1
    assert capsys.readouterr().err == "flashmoe: error: /data/out.bin: No space left on device\n"


def test_an_error_of_ours_keeps_its_traceback(command: Install) -> None:
    command(raising(OSError(errno.EBADF, "Bad file descriptor")))
    with pytest.raises(OSError, match="Bad file"):
        cli.main(["boom"])


def test_the_traceback_of_a_user_error_can_be_asked_for(
    command: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(raising(BundleError("x")))
    monkeypatch.setenv("FLASHMOE_TRACEBACK", "1")
    with pytest.raises(BundleError):
        cli.main(["boom"])


def test_ctrl_c_is_one_line_and_130(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(KeyboardInterrupt()))
    assert cli.main(["boom"]) == 130
    assert capsys.readouterr().err.strip() == "flashmoe: interrupted"


def test_a_reader_that_leaves_is_no_error() -> None:
    endless = (
        "import sys, types; from flashmoe import cli\n"
        "boom = types.ModuleType('flashmoe.cli.boom'); boom.configure = lambda parser: None\n"
        "def execute(args):\n    while True: print('x' * 4096)\n"
        "boom.execute = execute; sys.modules['flashmoe.cli.boom'] = boom; cli.COMMANDS['boom'] = ''\n"
        "sys.exit(cli.main(['boom']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
