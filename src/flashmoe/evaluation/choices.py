"""Multiple choice by log-likelihood: the answer is the continuation that the model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe.chat.llm import LLM
from flashmoe.errors import ConfigError
from flashmoe.evaluation.perplexity import Progress
from flashmoe.evaluation.scoring import log_probabilities
from flashmoe.evaluation.tasks import Task, read_tasks


@dataclass(frozen=True)
class ChoiceReport:
    """accuracy: by the sum of the choice's log-probabilities; accuracy_per_byte: that sum over its UTF-8 bytes.

    chance: what guessing gives on average.
    """

    questions: int
    accuracy: float
    accuracy_per_byte: float
    chance: float


def choice_accuracy(llm: LLM, file: Path, progress: Progress | None = None) -> ChoiceReport:
    """Score the questions of a JSONL file: {"prompt": text, "choices": [texts], "answer": index}.

    Prompt and choice are tokenised together (blanks at the prompt's end go to the choice), after the model's own
    BOS.  Raises ConfigError for a line of another form, PromptError when a question does not fit the context.
    """
    tasks = read_tasks(file, {"prompt": (str,), "choices": (list,), "answer": (int,)})
    for number, task in enumerate(tasks, start=1):
        _check(task, f"{file}: question {number}")
    by_sum = by_byte = 0
    for done, task in enumerate(tasks, start=1):
        sums = np.array([_score(llm, task["prompt"], choice) for choice in task["choices"]])
        sizes = np.array([len(choice.encode()) for choice in task["choices"]])
        by_sum += int(sums.argmax()) == task["answer"]
        by_byte += int((sums / sizes).argmax()) == task["answer"]
        if progress is not None:
            progress(done, len(tasks))
    count = len(tasks)
    chance = sum(1 / len(task["choices"]) for task in tasks) / count
    return ChoiceReport(count, by_sum / count, by_byte / count, chance)


def _score(llm: LLM, prompt: str, choice: str) -> float:
    bos = llm.tokenizer.bos_id()
    head = [] if bos is None else [bos]
    stem = prompt.rstrip()
    ids = head + llm.tokenizer.encode(prompt + choice, add_special_tokens=False)
    first = len(head) + len(llm.tokenizer.encode(stem, add_special_tokens=False))
    # A token that straddles the border belongs to the choice; without a BOS the first token is given.
    first = max(1, min(first, len(ids) - 1))
    return float(log_probabilities(llm.engine, ids, first).sum()) if len(ids) > 1 else 0.0


def _check(task: Task, where: str) -> None:
    choices: Sequence[object] = task["choices"]
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ConfigError(f'{where}: "choices" must be at least two texts that are not empty: correct it')
    if not 0 <= task["answer"] < len(choices):
        raise ConfigError(
            f'{where}: "answer" {task["answer"]} is no index of its {len(choices)} choices: correct it'
        )
