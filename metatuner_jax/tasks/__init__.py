"""Tasks: rows with a query and an answer, and how a text is scored. One module a task, with `check` and `load`."""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from metatuner_jax import config, processes

# A name that ends in ":" is a family, whose members are named after it. A new task is one module and one line here.
_MODULES = {
    "gsm8k": "gsm8k",
    "math": "competition_math",
    "hotpotqa": "hotpotqa",
    "cosmosqa": "cosmosqa",
    "jsonl": "jsonl",
    "mixture": "mixture",
    "reasoning_gym:": "reasoning_gym",
}


@dataclass(frozen=True)
class Example:
    """One query with its answer."""

    id: str
    query: str
    answer: str  # what the actor is trained to say
    reference: str  # the gold answer as predictions show it
    source: Any = None  # what scoring needs
    part: str = ""  # its task in a mixture
    initial_prompt: str | None = None  # its own initial prompt; None: the task's


@dataclass(frozen=True)
class Score:
    """Two scores of one text, each 0 to 1."""

    strict: float  # the text as it stands
    flexible: float  # never below strict: an answer found in the text, by the rules of the task


@dataclass(frozen=True)
class Task:
    """Rows and their scoring. No query of train is in validation or test, and none of validation is in test."""

    name: str
    metric: str
    initial_prompt: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    score: Callable[[str, Example], Score]
    # rows left out: validation_in_train, test_in_train, and unlabelled where a source has rows without an answer
    dropped: dict[str, int] = field(default_factory=dict)


def initial_prompts(examples, of_task: str) -> dict[str, str]:
    """Returns the initial prompt of each part of a mixture by its name, or of the whole task by ''."""
    return {example.part: example.initial_prompt or of_task for example in examples}


def score_all(score: Callable[[str, Example], Score], texts, examples) -> list[Score]:
    """Returns the scores of texts, each for its example; several processes do a share each."""

    def one(text, example):
        found = score(text, example)
        return found.strict, found.flexible

    return [Score(*pair) for pair in processes.group.shared(one, texts, examples)]


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for the first setting of the task that is known to be wrong without reading its rows."""
    _module(task).check(task)


def load(task: config.TaskConfig, seed: int) -> Task:
    """Returns the task with its rows, the same for the same settings and seed.

    Raises:
      ValueError: a setting or a row cannot be used; one line with the field or file:line, the value and the way out.
    """
    module = _module(task)
    module.check(task)
    return module.load(task, seed)


IN_MEMORY = "(rows in memory)"  # stands for the source of a split


def of_rows(task: config.TaskConfig, seed: int, train, validation=None, test=None) -> tuple[config.TaskConfig, Task]:
    """Returns a task of rows in memory, and the settings that stand for it.

    Args:
      task: of which count the options, the initial prompt and the numbers of rows, as for `task.name=jsonl`.
      train, validation, test: rows as dicts of a field for the query and one for the answer; a split that is None is cut from train.

    Raises:
      ValueError: a setting or a row cannot be used.
    """
    from metatuner_jax.tasks import jsonl, rows

    given = {}
    for split, items in (("train", train), ("validation", validation), ("test", test)):
        for number, item in enumerate(() if items is None else items, 1):
            if not isinstance(item, dict):
                raise ValueError(f"{split} row {number} is {config.short(item)}, no dict: give rows such as {{'question': ..., 'answer': ...}}")
        if items is not None and not len(items):
            raise ValueError(f"{split} holds no rows: give some, or none at all")
        if items is not None:
            given[split] = [rows.Row(f"{split} row {number}", item) for number, item in enumerate(items, 1)]
    source = lambda split: IN_MEMORY if split in given else None
    task = dataclasses.replace(task, name="jsonl", train=source("train"), validation=source("validation"), test=source("test"))
    jsonl.check_options(task)
    return task, jsonl.load(task, seed, read=lambda name, source, split, *_: given.get(split))


def _module(task):
    prefix, colon, _ = task.name.partition(":")
    if prefix + colon not in _MODULES:
        if prefix + ":" in _MODULES:
            raise ValueError(f"task.name={task.name!r} lacks the name of a data set: write {prefix}:<name>")
        if prefix in _MODULES:
            raise ValueError(f"task.name={task.name!r} must be just {prefix!r}: it has no members")
        names = [name + "<name>" * name.endswith(":") for name in _MODULES]
        near = config.nearest(prefix, [name.rstrip(":") for name in _MODULES])
        raise ValueError(f"task.name={task.name!r} is not one of {', '.join(names)}{near}")
    return importlib.import_module(f"{__name__}.{_MODULES[prefix + colon]}")
