"""A user's own rows: JSON Lines, CSV or Parquet files, folders or hub ids, with a field for the query and one for the answer."""

import importlib
import re
from collections.abc import Callable

from metatuner_jax import config
from metatuner_jax.tasks import Example, Score, Task, gsm8k, rows

INITIAL_PROMPT = "Answer the question. Give only the answer, with no explanation."
_NUMBER = re.compile(r"-?[0-9,]*+(?:\.[0-9]++)?(?<=[0-9])")
OPTIONS = {"question": "question", "answer": "answer", "metric": "exact_match", "config": None}


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for a setting that is known to be wrong without reading rows."""
    check_options(task)
    if task.train is None and task.num_train != 0:
        raise ValueError("task.train=none: name the file, folder or hub id of the train rows")
    for split in ("train", "validation", "test"):
        if getattr(task, split) is not None:
            rows.check_source(f"task.{split}", getattr(task, split))
    if task.test is None and task.num_test is None and not (task.train and rows.has_splits(task.train)):
        raise ValueError("task.test=none: name a test file, or set task.num_test to cut that many rows from train")


def check_options(task: config.TaskConfig) -> None:
    """Raises ValueError for an option that is wrong wherever the rows come from."""
    rows.check_options(task, tuple(OPTIONS))
    metric_of(task.options.get("metric", "exact_match"))


def load(task: config.TaskConfig, seed: int, read=rows.read) -> Task:
    """Returns the task.

    Args:
      read: in the place of `rows.read`.
    """
    options = {**OPTIONS, **task.options}

    def example(id, row):
        query, answer = (
            rows.text(row, options[option], f"name the right one in task.options.{option}") for option in ("question", "answer")
        )
        if options["metric"] == "number" and gsm8k.last_number(answer) is None:
            field = options["answer"]
            raise ValueError(f"{row.where}: field {field!r} holds no number: mend it, or set task.options.metric=exact_match")
        return Example(id, query, answer, reference=answer)

    train, validation, test, dropped = rows.load_splits(task, seed, example, read=read)
    prompt = task.initial_prompt or INITIAL_PROMPT
    return Task(task.name, options["metric"], prompt, train, validation, test, metric_of(options["metric"]), dropped)


def metric_of(name) -> Callable[[str, Example], Score]:
    """Returns the metric of a name: one of ours, or as `module:function` the user's own, which is imported as Python would from here.

    A user's function takes the answer and the reference, both text, and returns a number from 0 to 1, or True or False: both the strict
    and the flexible score.

    Raises:
      ValueError: there is no such metric.
    """
    if name in METRICS:
        return METRICS[name]
    field = f"task.options.metric={config.short(name)}"
    module, colon, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon:
        raise ValueError(f"{field} is not one of {', '.join(METRICS)}, nor module:function of your own{config.nearest(name, METRICS)}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # the module is the user's own code
        raise ValueError(f"{field} could not be imported: {type(error).__name__}: {error}; a file {module}.py here would be found") from None
    if not callable(found):
        raise ValueError(f"{field} is {config.short(found)}, no function: name one that takes answer and reference")

    def score(text, example):
        try:
            worth = float(found(text, example.reference))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        else:
            if 0 <= worth <= 1:
                return Score(worth, worth)
            what = f"{worth:g} is no score from 0 to 1"
        raise ValueError(f"{field} failed for the answer {config.short(text)} to row {example.id}: {what}; mend it, and run the same command again")

    return score


def exact_match(text: str, example: Example) -> Score:
    """Returns strict: the text is the reference, but for white space at its ends; flexible: after `normalize`."""
    strict = text.strip() == example.reference.strip()
    return Score(float(strict), float(strict or normalize(text) == normalize(example.reference)))


def number(text: str, example: Example) -> Score:
    """Returns strict: the text, or what follows its last "####", is the number alone or the reference; flexible: the last number is it."""
    gold = gsm8k.last_number(example.reference)
    final = text.rsplit("####", 1)[-1].strip()
    flexible = gsm8k.last_number(text) == gold
    strict = example.reference in (final, text.strip()) or (bool(_NUMBER.fullmatch(final)) and gsm8k.last_number(final) == gold)
    return Score(float(strict), float(strict or flexible))


def contains(text: str, example: Example) -> Score:
    """Returns strict: the reference stands in the text as it is, as whole words; flexible: both after `normalize`."""
    strict = _has_words(text, example.reference.strip())
    return Score(float(strict), float(strict or _has_words(normalize(text), normalize(example.reference))))


METRICS = {"exact_match": exact_match, "number": number, "contains": contains}


def normalize(text: str) -> str:
    """Returns the text in lower case, without punctuation and articles, its words one space apart.

    A point or sign that belongs to a number stays, so that 1.5 is not 15, nor -5 the same as 5; 1,200 is 1200. A text of articles
    alone keeps them, so that the choice "A" is not nothing, and one of punctuation alone stays whole.
    """
    lower = text.lower()
    words = re.sub(
        r"((?<=\d)(?:[.:/-]|,(?!\d{3}(?!\d)))(?=\d)|(?<![\w)])-?\.?(?=\d))|[^\w\s]|_", lambda m: m[1] or "", lower
    ).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words) or " ".join(lower.split())


def _has_words(text, words):
    return re.search(rf"(?<![\w-])(?<!\d[.,:/]){re.escape(words)}(?!\w|[.,:/-]\d)", text) is not None
