"""Errors a user can act on.

Each message is one line that names the file or option and the remedy; the command prints it after
``flashmoe: error:`` and exits with 1.  Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class FlashmoeError(Exception):
    """Base of every error caused by the user's input, files or machine."""


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


class PromptError(FlashmoeError):
    """A prompt or a conversation cannot be processed."""


class StructureError(FlashmoeError):
    """A schema, a regular expression or a grammar for structured output cannot be used."""
