"""Errors a user can act on.

Each message is one line that names the file or option and the remedy; the command prints it after
``flashmoe: error:`` and exits with 1.  Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

_LONGEST = 600  # characters: room for two long paths; what a hostile file puts into a message has no end


class FlashmoeError(Exception):
    """Base of every error caused by the user's input, files or machine.

    Whatever a message quotes, it becomes one printable line of at most 600 characters: a longer one loses its
    middle, because the file stands at the beginning and the remedy at the end.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[5 - _LONGEST // 2 :]}"
        super().__init__(line)


class CheckpointError(FlashmoeError):
    """A source checkpoint is missing, truncated or of a form we do not read."""


class BundleError(FlashmoeError):
    """A flashmoe bundle is missing, damaged or of another format version."""


class ConfigError(FlashmoeError):
    """A configuration value or an option is out of its range."""


class BudgetError(FlashmoeError):
    """The memory budget cannot hold what was asked for."""


class ReadError(FlashmoeError):
    """Reading an expert or a resident weight failed."""


class TraceError(FlashmoeError):
    """A routing trace, or a policy trained on one, cannot be read or does not fit the model."""


class PromptError(FlashmoeError):
    """A prompt or a conversation cannot be processed."""


class BusyError(FlashmoeError):
    """There is no room for another request now."""


class StructureError(FlashmoeError):
    """A schema, a regular expression or a grammar for structured output cannot be used."""


class ToolError(FlashmoeError):
    """A tool cannot be reached, or could not do what it was asked; text: all of the message, for the model."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class RequestError(FlashmoeError):
    """A request that says what is not possible; param: the field; code: a word for it that clients know."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code
