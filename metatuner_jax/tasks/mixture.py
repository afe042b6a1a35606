"""Several tasks as one: trained on by their weights and tested evenly, or trained on some and tested on others."""

import dataclasses
import random

from metatuner_jax import config, tasks
from metatuner_jax.tasks import Example, Score, Task, rows

INITIAL_PROMPT = "Do what is asked, and give the final answer in the form that is asked for."  # where no part's own is in use
USES = ("both", "train", "test")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Part:
    """One task of the mixture, as `task.options.parts` gives it under a name."""

    name: str  # as task.name; default: the part's own name
    weight: float = 1.0  # its share of the train rows, over the sum of all weights
    use: str = "both"  # "train": it is not tested on; "test": it is not trained on
    train: str | None = None  # these as in the settings of a task
    validation: str | None = None
    test: str | None = None
    initial_prompt: str | None = None
    options: dict = dataclasses.field(default_factory=dict)


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for a setting that is known to be wrong without reading rows."""
    for key, part in _tasks_of(task).items():
        _named(key, tasks.check, part)


def load(task: config.TaskConfig, seed: int) -> Task:
    """Returns the task. Its rows are those of the parts, shuffled by `seed`; their ids begin with the part's name.

    `num_train` and `num_validation` are split over the parts that are trained on, by weight; `num_test` evenly over those
    that are tested on. With num_train=none each part gives all that it has. A validation or test row whose query is in
    train, or in validation, of another part is dropped and counted, so that there may be fewer rows than asked for.

    A row's initial prompt is its part's setting, else the mixture's, else its own task's.
    """
    parts = _parts(task)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    dropped: dict[str, int] = {}
    scores = {}
    for key, part in _tasks_of(task).items():
        loaded = _named(key, tasks.load, part, seed)
        prompt = parts[key].initial_prompt or (None if task.initial_prompt else loaded.initial_prompt)
        scores[key] = loaded.score
        for split in SPLITS:
            splits[split] += [
                dataclasses.replace(example, id=f"{key}/{example.id}", part=key, initial_prompt=prompt)
                for example in getattr(loaded, split)
            ]
        for what, number in loaded.dropped.items():
            dropped[what] = dropped.get(what, 0) + number
    seen = set()
    for split in SPLITS:
        kept = [example for example in splits[split] if split == "train" or rows.query_key(example.query) not in seen]
        lost = {example.part for example in splits[split]} - {example.part for example in kept}
        if lost:
            where = f"task.options.parts.{min(lost)}"
            raise ValueError(f"{where}: all queries of its {split} rows are in train or validation of other parts")
        if split != "train":
            dropped[f"{split}_in_train"] = dropped.get(f"{split}_in_train", 0) + len(splits[split]) - len(kept)
        seen |= {rows.query_key(example.query) for example in kept}
        random.Random(f"{seed} {split}").shuffle(kept)
        splits[split] = kept

    def score(text: str, example: Example) -> Score:
        return scores[example.part](text, example)

    train, validation, test = (tuple(splits[split]) for split in ("train", "validation", "test"))
    return Task(task.name, "mean of parts", task.initial_prompt or INITIAL_PROMPT, train, validation, test, score, dropped)


def shares(total: int, weights: list[float]) -> list[int]:
    """Returns whole numbers that add up to `total`, in proportion to the weights; the largest remainders get what is left over."""
    weights = [weight / max(weights) for weight in weights]  # of any size, and never too large to add up
    exact = [total * weight / sum(weights) for weight in weights]
    found = [int(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda i: found[i] - exact[i])  # stable: the first of equals
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found


# --- settings ---


def _parts(task):
    """Returns the parts by name; one that is None is left out, so that the command line can."""
    for split in SPLITS:
        if getattr(task, split) is not None:
            instead = f"task.options.parts.<name>.{split}"
            raise ValueError(f"task.{split}={getattr(task, split)!r} has no use in a mixture: set {instead}")
    for name, value in task.options.items():
        if name != "parts":
            near = config.nearest(name, ["parts"])
            raise ValueError(f"task.options.{name}={value!r} is unknown to mixture, which has parts{near}")
    given = task.options.get("parts")
    if not isinstance(given, dict):
        example = {"gsm8k": {"weight": 2.0}, "math": {"use": "test"}}
        raise ValueError(f"task.options.parts={given!r} must be a section, written in a config file: {example}")
    parts = {key: _part(key, settings) for key, settings in given.items() if settings is not None}
    for use, what in (("train", "test"), ("test", "train")):
        if all(part.use == use for part in parts.values()):
            names = ", ".join(parts) or "its parts"
            raise ValueError(f"task.options.parts: none of {names} is there to {what} on: set use of one to both")
    return parts


def _part(key, settings):
    where = f"task.options.parts.{key}"
    if not isinstance(settings, dict):
        raise ValueError(f"{where}={settings!r} must be a section of settings; {{}} takes the defaults")
    known = [field.name for field in dataclasses.fields(Part)]
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{where}.{name}={value!r} is unknown: a part has {', '.join(known)}{config.nearest(name, known)}")
        if name == "options":
            if not isinstance(value, dict):
                raise ValueError(f"{where}.options={value!r} must be a section of settings")
        elif name == "weight":
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{where}.weight={value!r} must be a number above 0")
        elif not (isinstance(value, str) and value.strip()) and (value is not None or name in ("name", "use")):
            raise ValueError(f"{where}.{name}={value!r} must be text")
    part = Part(**{"name": key, **settings})
    if part.use not in USES:
        raise ValueError(f"{where}.use={part.use!r} is not one of {', '.join(USES)}{config.nearest(part.use, USES)}")
    if part.name == "mixture":
        raise ValueError(f"{where}.name='mixture': a mixture cannot be part of another: name its parts here")
    return part


def _tasks_of(task):
    """Returns the settings of each part's own task, by name: with its share of the rows, 0 of those it is not used for."""
    parts = _parts(task)
    weights = [part.weight * (part.use != "test") for part in parts.values()]
    tested = [float(part.use != "train") for part in parts.values()]
    if task.num_train is None and len({weight for weight in weights if weight}) > 1:
        raise ValueError("task.num_train=none takes all rows of each part, whatever its weight: set it, or leave the weights out")
    nums = {}
    for field, by in (("num_train", weights), ("num_validation", weights), ("num_test", tested)):
        total = getattr(task, field)
        nums[field] = [None if share else 0 for share in by] if total is None else shares(total, by)
        if field != "num_validation" and any(share and num == 0 for share, num in zip(by, nums[field], strict=True)):
            raise ValueError(f"task.{field}={total} leaves a part without rows: raise it; {', '.join(parts)} get {nums[field]}")
    return {
        key: config.TaskConfig(
            part.name, part.train, part.validation, part.test, **{field: nums[field][i] for field in nums},
            initial_prompt=part.initial_prompt, options=part.options,
        )
        for i, (key, part) in enumerate(parts.items())
    }  # fmt: skip


def _named(key, function, *args):
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"task.options.parts.{key}: {error}") from None
