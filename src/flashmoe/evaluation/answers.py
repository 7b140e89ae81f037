"""Answers that a program must be able to use: JSON by a schema, tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.chat.dialects import Dialect, ToolCallArguments, ToolCallEnd, ToolCallStart, detect
from flashmoe.chat.llm import LLM
from flashmoe.chat.structured import StructuredOutput
from flashmoe.errors import ConfigError
from flashmoe.evaluation.perplexity import Progress
from flashmoe.evaluation.tasks import conversation, read_tasks

MAX_TOKENS = 256


@dataclass(frozen=True)
class JsonReport:
    """Shares of the tasks.

    valid_alone: the answer without any help is JSON.  valid_held: the answer that is held to the schema is whole;
    the others ran into max_tokens.
    """

    tasks: int
    valid_alone: float
    valid_held: float
    max_tokens: int


@dataclass(frozen=True)
class ToolReport:
    """Shares of the tasks: with any call, with a call of the right function, with exactly the expected call alone."""

    tasks: int
    any_call: float
    right_name: float
    exact: float
    max_tokens: int


def json_validity(
    llm: LLM, file: Path, max_tokens: int = MAX_TOKENS, progress: Progress | None = None
) -> JsonReport:
    """Greedy answers to the tasks of a JSONL file: {"prompt" or "messages", "schema"}, each alone and held to it.

    Raises ConfigError for a line of another form, StructureError for a schema that cannot be used.
    """
    tasks = read_tasks(file, {"schema": (dict,)})
    params = llm.sampling_params(temperature=0.0, max_tokens=max_tokens)
    alone = held = 0
    for done, task in enumerate(tasks, start=1):
        messages = conversation(task, f"{file}: task {done}")
        prompt = llm.chat_ids(messages, enable_thinking=False)
        alone += _is_json(llm.generate(prompt, params).text)
        form = StructuredOutput.json_schema(task["schema"])
        answer = llm.generate(prompt, params, structured=form)
        held += answer.finish_reason == "stop" and _is_json(answer.text)
        if progress is not None:
            progress(done, len(tasks))
    return JsonReport(len(tasks), alone / len(tasks), held / len(tasks), max_tokens)


def tool_success(
    llm: LLM, file: Path, max_tokens: int = MAX_TOKENS, progress: Progress | None = None
) -> ToolReport:
    """Greedy answers to the tasks of a JSONL file: {"prompt" or "messages", "tools", "name", "arguments"}.

    Raises ConfigError for a line of another form, and when the model's template writes calls in no known way.
    """
    tasks = read_tasks(file, {"tools": (list,), "name": (str,), "arguments": (dict,)})
    dialect = detect(llm.chat_template.source)
    if dialect is None:
        raise ConfigError(f"{llm.bundle.path}: its chat template knows no tool calls that flashmoe reads")
    params = llm.sampling_params(temperature=0.0, max_tokens=max_tokens)
    any_call = right_name = exact = 0
    for done, task in enumerate(tasks, start=1):
        messages = conversation(task, f"{file}: task {done}")
        text = llm.chat_template.render(messages, tools=task["tools"], enable_thinking=False)
        calls = _calls(llm, dialect, text, task["tools"], params)
        expected = (task["name"], dict(task["arguments"]))
        any_call += bool(calls)
        right_name += any(name == task["name"] for name, _ in calls)
        exact += calls == [expected]
        if progress is not None:
            progress(done, len(tasks))
    count = len(tasks)
    return ToolReport(count, any_call / count, right_name / count, exact / count, max_tokens)


def _calls(
    llm: LLM, dialect: Dialect, prompt: str, tools: Sequence[Mapping[str, Any]], params: Any
) -> list[tuple[str, Any]]:
    """(name, arguments) of each complete call of the answer."""
    answer = llm.generate(llm.tokenizer.encode(prompt, add_special_tokens=False), params)
    parser = dialect.parser(tools, dialect.opens_reasoning(prompt))
    # Markers of calls are special tokens in several dialects, so the text is decoded with them.
    text = llm.tokenizer.decode(answer.token_ids, skip_special_tokens=False)
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    calls = []
    for event in parser.push(text) + parser.finish():
        if isinstance(event, ToolCallStart):
            names[event.index], arguments[event.index] = event.name, ""
        elif isinstance(event, ToolCallArguments):
            arguments[event.index] += event.json_delta
        elif isinstance(event, ToolCallEnd):
            calls.append((names[event.index], json.loads(arguments[event.index])))
    return calls


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
