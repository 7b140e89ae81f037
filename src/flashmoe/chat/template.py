"""Conversations as text, by the checkpoint's own Jinja template, in a sandbox.

The environment is the one that such templates are written for (Hugging Face's conventions): blocks trimmed,
break and continue, tojson that keeps Unicode, raise_exception, strftime_now, and {% generation %} blocks.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flashmoe.chat.messages import Message, normalize_messages
from flashmoe.engine.tokenizer import read_json, token_text
from flashmoe.errors import BundleError, PromptError

_FILE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
# A template runs Python operations on whatever the caller passed, so it may fail in any of these ways.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled template.  Thread-safe: rendering changes nothing."""

    def __init__(self, source: str, name: str, variables: Mapping[str, str] | None = None) -> None:
        """Compile ``source``; ``name`` is the file that errors mention, ``variables`` its special tokens.

        Raises BundleError when it is no valid template.
        """
        self.source = source
        self._name = name
        self._variables = dict(variables or {})
        # gpt-oss has a name of its own.
        thinking = "message.thinking" in source and "reasoning_content" not in source
        self._reasoning_key = "thinking" if thinking else "reasoning_content"
        self._developer_role = "'developer'" in source or '"developer"' in source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(f"{name} is no valid template ({_one_line(error)}): correct it") from error

    @classmethod
    def from_dir(cls, path: Path | str) -> ChatTemplate:
        """The template of the model in ``path``: chat_template.jinja, else the one in tokenizer_config.json.

        Raises BundleError when there is none.
        """
        folder = Path(path)
        settings = read_json(folder / _SETTINGS)
        special = {name: token_text(value) for name, value in settings.items() if name.endswith("_token")}
        variables = {name: text for name, text in special.items() if text is not None}
        file = folder / _FILE
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), str(file), variables)
            except (OSError, UnicodeDecodeError) as error:
                raise BundleError(
                    f"{file} cannot be read ({error}): copy it from the source model"
                ) from error
        source = _default_of(settings.get("chat_template"))
        if source is None:
            raise BundleError(
                f"{folder} has no {_FILE}: copy it from the source model, or prompt without one (--raw)"
            )
        return cls(source, str(folder / _SETTINGS), variables)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation; ``kwargs`` (enable_thinking=False, ...) are the template's variables.

        The conversation may have all forms of OpenAI's API; see normalize_messages().
        Raises PromptError when it is malformed, or when the template refuses it, naming its reason.
        """
        normalized = normalize_messages(
            messages, developer_role=self._developer_role, reasoning_key=self._reasoning_key
        )
        try:
            return self._template.render(
                messages=normalized,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, **kwargs},
            )
        except _RENDER_ERRORS as error:
            raise PromptError(f"{self._name} cannot render this conversation: {_one_line(error)}") from error


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training: transparent here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        """A block that renders its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and &, which the models never saw in training.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _default_of(template: object) -> str | None:
    """The template in tokenizer_config.json: one text, or a list of named ones of which "default" counts."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
