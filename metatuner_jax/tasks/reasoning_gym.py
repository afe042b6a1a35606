"""Tasks of reasoning-gym (arXiv 2505.24760), made as they are needed and scored by its own verifiers."""

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Sequence

from metatuner_jax import config
from metatuner_jax.tasks import Example, Score, Task, rows

INITIAL_PROMPT = "Solve the problem. Give only the final answer, with no explanation and no other words."
NUM_TRAIN, NUM_TEST = 1000, 200
# Most data sets draw row i from seed + i: the splits take ranges that cannot meet.
OFFSETS = {"train": 0, "validation": 10**8, "test": 2 * 10**8}

_ARITHMETIC = re.compile(r"(?:[0-9\s+\-/()]|(?<!\*)\*(?!\*))*")
# Powers are small and never of one another, and no number is such as 1e999999, so that no answer can keep the parser busy.
_FORMULA = re.compile(
    r"(?!(?:.*\)\s*\*\*){3})(?>\s|[0-9]++(?:\.[0-9]++)?(?![eE])|[a-zA-Z](?![a-zA-Z])|[-+/()]|\*(?!\*)|\*\*\s*[0-9]{1,2}(?![0-9.]|\s*\*\*)"
    r"|(?:sin|cos|tan|exp|log|sqrt|asin|acos|atan|sinh|cosh|tanh)(?=\())*+"
)
# Verifiers that run the answer as Python, by eval or by SymPy's parser, or make a fraction of it, which 1e999999 would take minutes to
# be, are shown nothing but such texts, and short ones.
_MAX_HARMLESS_CHARS = 300
_HARMLESS = {
    "binary_matrix": re.compile(r"[0-9\s]*"),
    "coin_flip": re.compile(r"[-+0-9\s./,]*"),
    "countdown": _ARITHMETIC,
    "intermediate_integration": _FORMULA,
    "n_queens": re.compile(r"[Q_\s]*"),
    "polynomial_multiplication": _FORMULA,
    "puzzle24": _ARITHMETIC,
    "simple_integration": _FORMULA,
    "spiral_matrix": re.compile(r"[-0-9\s]*"),
    "string_insertion": re.compile(r"[A-E]*"),
}


# --- settings ---


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for a setting that the data set refuses. Makes one row of it to find out."""
    for split in OFFSETS:
        if getattr(task, split) is not None:
            raise ValueError(f"task.{split}={getattr(task, split)!r} has no use: {task.name} makes its own rows; leave it none")
        num = getattr(task, f"num_{split}")
        if num is not None and num > 10**6:
            raise ValueError(f"task.num_{split}={num} must be at most {10**6}: the seeds of the splits lie {10**8} apart")
    row = _row(task, _dataset(task, seed=0, size=1), 0)
    if not isinstance(row["answer"], str) or not row["answer"].strip():
        raise ValueError(f"task.name={task.name!r} has a verifier but no written answers: there is nothing to train on")


def _dataset(task, seed, size):
    from reasoning_gym.factory import DATASETS

    name = task.name.partition(":")[2]
    names = [known for known in DATASETS if known != "composite"]  # a mixture has no options that fit on a command line
    if name not in names:
        raise ValueError(
            f"task.name={task.name!r} is not among the {len(names)} data sets of reasoning-gym{config.nearest(name, names)}"
        )
    make, settings = DATASETS[name]
    hints = typing.get_type_hints(settings)
    known = [field.name for field in dataclasses.fields(settings) if field.name not in ("seed", "size")]
    options = {}
    for key, value in task.options.items():
        if key in ("seed", "size"):
            instead = "config.seed" if key == "seed" else "task.num_train and task.num_test"
            raise ValueError(f"task.options.{key}={value!r} is not to be set here: use {instead}")
        if key not in known:
            has = f"{', '.join(known)}{config.nearest(key, known)}"
            raise ValueError(f"task.options.{key}={value!r} is unknown to {task.name}, which has {has}")
        try:
            options[key] = _typed(hints[key], value)
        except ValueError as error:
            raise ValueError(f"task.options.{key}={value!r} must be {error}") from None
    try:
        return make(settings(**options, seed=seed, size=size))  # its constructor validates the settings
    except Exception as error:  # assertions, mostly
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"task.options={task.options} does not suit {task.name}: {reason}") from None


def _typed(kind, value):
    """Returns the value as the type `kind`; the message of its ValueError says what would do."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _typed(next(arg for arg in args if arg is not type(None)), value)
    if origin is typing.Literal or isinstance(kind, enum.EnumMeta):
        choices = {str(getattr(choice, "value", choice)): choice for choice in (args or kind)}
        if str(getattr(value, "value", value)) not in choices:
            raise ValueError(f"one of {', '.join(choices)}{config.nearest(value, choices)}")
        return choices[str(getattr(value, "value", value))]
    if origin in (list, tuple, Sequence) and args and args[0] in (str, int, float):
        items = [word.strip() for word in value.split(",")] if isinstance(value, str) and args[0] is str else value
        if not isinstance(items, (list, tuple)):
            raise ValueError("names with commas between" if args[0] is str else "a list of numbers")
        return (tuple if origin is tuple else list)(_typed(args[0], item) for item in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if kind in names and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError(names[kind])
    return value


# --- rows ---


def load(task: config.TaskConfig, seed: int) -> Task:
    """Returns the task. A validation or test row whose query was drawn before is dropped, counted and drawn anew."""
    asked = {"train": task.num_train, "validation": task.num_validation, "test": task.num_test}  # 0 in parts of a mixture
    nums = {split: {"train": NUM_TRAIN, "test": NUM_TEST}[split] if num is None else num for split, num in asked.items()}
    splits: dict[str, list[Example]] = {}
    dropped: dict[str, int] = {}
    seen: set[str] = set()
    for split, num in nums.items():
        limit = num if split == "train" else 20 * num + 1000
        dataset = _dataset(task, seed + OFFSETS[split], max(limit, 1))
        splits[split], index = [], 0
        while len(splits[split]) < num:
            if index == limit:
                raise ValueError(
                    f"task.num_{split}={num}: of {limit} rows of {task.name} only {len(splits[split])} ask what train and "
                    f"validation do not: set it or task.num_train={nums['train']} lower, or widen the task in task.options"
                )
            entry = _row(task, dataset, index)
            if split == "train" or rows.query_key(entry["question"]) not in seen:
                splits[split].append(_example(f"{split}-{index}", entry))
            index += 1
        seen |= {rows.query_key(example.query) for example in splits[split]}
        dropped[f"{split}_in_train"] = index - num
    del dropped["train_in_train"]
    prompt = task.initial_prompt or INITIAL_PROMPT
    return Task(
        task.name,
        "verifier",
        prompt,
        tuple(splits["train"]),
        tuple(splits["validation"]),
        tuple(splits["test"]),
        make_score(task.name.partition(":")[2], dataset),
        dropped,
    )


def _row(task, dataset, index):
    try:
        return dataset[index]
    except Exception as error:  # a setting that validates and yet cannot be met
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"task.options={task.options}: {task.name} could not make row {index}: {reason}") from None


def _example(id, entry):
    answer = entry["answer"].strip()
    return Example(id, entry["question"].strip(), answer, reference=answer, source=entry)


# --- scores ---

_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.IGNORECASE | re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\b|\s*:)\s*:?(?:\s*\*\*\s)?", re.IGNORECASE)


def make_score(name, dataset):
    """Returns score(text, example): strict: the verifier's full marks for the whole text; flexible: for one of `extractions` too.

    Verifiers also give part marks, which count as nothing here. Some look for the answer anywhere in a text, or accept
    any text: a text that such a verifier takes must have no more words than the answer, or be the answer.
    """
    harmless = _HARMLESS.get(name)

    def full_marks(text, entry):
        if harmless and text != entry["answer"] and (len(text) > _MAX_HARMLESS_CHARS or not harmless.fullmatch(text)):
            return False
        try:
            return dataset.score_answer(text, entry) >= 1.0
        except Exception:  # verifiers parse the text as they please
            return False

    def accepts(text, entry):
        if not text or not full_marks(text, entry):
            return False
        gold = entry["answer"]
        if " ".join(text.lower().split()) == " ".join(gold.lower().split()):
            return True
        lax = full_marks(text + " or not", entry)
        return not lax or (len(text.split()) <= len(gold.split()) and not full_marks("?", entry))

    def score(text: str, example: Example) -> Score:
        strict = accepts(text.strip(), example.source)
        flexible = strict or any(accepts(part, example.source) for part in extractions(text))
        return Score(float(strict), float(flexible))

    return score


def extractions(text: str) -> list[str]:
    """Returns the few parts of a text that a fair reader may take for its answer.

    What is marked as the answer alone counts where there is such a mark, the last one winning. Else the whole text, its
    last line, what follows a colon there, and its first line where a blank one and an explanation follow. Each is also
    tried without the quotes, stars and full stop around it.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return []
    boxed = [*_TAGGED.findall(text), *_BOXED.findall(text)]
    marked = _ANSWER_IS.split(text)
    if boxed:
        parts = [boxed[-1]]
    elif len(marked) > 1:
        parts = [marked[-1], marked[-1].strip().split("\n")[0]]
    else:
        parts = [text, lines[-1], re.split(r":\s", lines[-1])[-1]]
        first, _, rest = text.strip().partition("\n\n")
        if first.strip() == lines[0] and len(rest.split()) >= max(5, 2 * len(first.split())):
            parts.append(first)
    parts = [part.strip() for part in parts]
    return list(dict.fromkeys(part for whole in parts for part in (whole, _bare(whole))))


def _bare(text):
    """Returns the text without quotes, stars, backticks, dollar signs and a full stop around it."""
    before = None
    while text != before:
        before, text = text, text.strip().removesuffix(".")
        for mark in ("**", "*", "__", "`", '"', "'", "$"):
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)]
    return text
