"""The options that give an answer its form."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.errors import StructureError

if TYPE_CHECKING:
    from flashmoe.chat.structured.spec import StructuredOutput


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare them; at most one form can be asked for."""
    group = parser.add_argument_group("form of the answer", "needs the extra flashmoe[structured]")
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--json-schema", metavar="FILE", help="JSON that is valid by the schema in FILE")
    forms.add_argument("--json-object", action="store_true", help="any JSON object")
    forms.add_argument("--regex", metavar="R", help="a text that R matches as a whole")
    forms.add_argument("--lark", metavar="FILE", help="a text of the Lark grammar in FILE")
    forms.add_argument("--choice", metavar="A,B", help="one of these texts")
    group.add_argument("--after", metavar="TEXT", help="the form begins behind TEXT, such as </think>")


def form(args: argparse.Namespace) -> StructuredOutput | None:
    """The form that was asked for; raises StructureError when its file cannot be read."""
    from flashmoe.chat.structured.spec import StructuredOutput

    wanted: StructuredOutput | None = None
    if args.json_schema is not None:
        wanted = StructuredOutput.json_schema(_read_json(Path(args.json_schema)))
    elif args.json_object:
        wanted = StructuredOutput.json_object()
    elif args.regex is not None:
        wanted = StructuredOutput.regex(args.regex)
    elif args.lark is not None:
        wanted = StructuredOutput.lark(_read(Path(args.lark)))
    elif args.choice is not None:
        wanted = StructuredOutput.choice(args.choice.split(","))
    if args.after is None:
        return wanted
    if wanted is None:
        raise StructureError(
            "--after needs a form to begin: add --json-schema, --json-object, --regex, --lark or --choice"
        )
    return wanted.begin_after(args.after)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StructureError(f"{file} cannot be read ({error}): give a text file in UTF-8") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise StructureError(f"{file} is no JSON ({error}): give a JSON Schema") from error
