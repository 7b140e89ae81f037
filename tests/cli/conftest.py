"""What the tests of commands that must fail share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashmoe.cli import main


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with 1 and one line, nothing else; what the line says after its prefix."""

    def run(*words: object) -> str:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (1, "", 1), out + err
        assert err.startswith("flashmoe: error: ")
        assert "Traceback" not in err
        return err.removeprefix("flashmoe: error: ").rstrip("\n")

    return run
