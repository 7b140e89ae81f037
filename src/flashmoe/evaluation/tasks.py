"""Questions with known answers, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashmoe.errors import ConfigError

Task = Mapping[str, Any]


def read_tasks(file: Path, fields: Mapping[str, tuple[type, ...]]) -> list[Task]:
    """The objects of a JSONL file, each with at least these fields of these types; empty lines are left out.

    Raises ConfigError (file, line and field) for anything else, and when there is no task at all.
    """
    tasks = list(_tasks(file, fields))
    if not tasks:
        raise ConfigError(f"{file} holds no task: give one JSON object a line")
    return tasks


def conversation(task: Task, where: str) -> list[Any]:
    """The task's "messages", or its "prompt" as one message of the user.  Raises ConfigError when it has neither."""
    messages, prompt = task.get("messages"), task.get("prompt")
    if isinstance(messages, list):
        return messages
    if not isinstance(prompt, str):
        raise ConfigError(f'{where} has neither "messages" nor a "prompt": give one of them')
    return [{"role": "user", "content": prompt}]


def _tasks(file: Path, fields: Mapping[str, tuple[type, ...]]) -> Iterator[Task]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text (byte {error.start}): convert it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            task = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is no JSON ({error}): give one object a line") from error
        if not isinstance(task, dict):
            raise ConfigError(f"{where} is no JSON object: give one object a line")
        for name, kinds in fields.items():
            if not isinstance(task.get(name), kinds) or isinstance(task[name], bool):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ConfigError(f"{where}: {name!r} must be a {wanted}: correct it")
        yield task
