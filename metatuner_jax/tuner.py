"""What a run has trained, to answer with: for any query the prompt, the LoRA and the answer."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from metatuner_jax import checkpoint, data, files, generator, lora, memory, networks, passes, sharding, tasks, train
from metatuner_jax import config as config_lib
from metatuner_jax import job as job_lib
from metatuner_jax import workdir as workdir_lib
from metatuner_jax.generator import Frozen, Setup
from metatuner_jax.lora import Lora
from metatuner_jax.progress import Progress

ADAPTERS = ("own", "mean", "none")
PROMPTS = ("own", "initial")
SIZES = 4  # batches have 1, 4, 16 .. queries, of which the least is taken that holds all


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the actor says to a query, and the prompt under which it does."""

    query: str
    prompt: str
    text: str
    ids: tuple[int, ...] = dataclasses.field(default=(), repr=False, compare=False)  # of the text, the end token included where it was reached
    num_read: int = dataclasses.field(default=0, repr=False, compare=False)  # tokens that the actor read: template, prompt and query


class Tuner:
    """A trained run: writes prompts and LoRA for queries, and answers them, greedily.

    >>> import metatuner_jax as mt
    >>> tuner = mt.Tuner.load("runs/quickstart")
    >>> [answer] = tuner.answer(["Reverse this list of words: one, two, three"])
    >>> answer.query
    'Reverse this list of words: one, two, three'
    >>> answer.prompt == tuner.prompt(answer.query)
    True
    >>> [bare] = tuner.answer([answer.query], adapter="none", prompt="initial")  # what the model said before
    >>> sorted(tuner.lora(answer.query))
    ['q', 'v']
    """

    def __init__(
        self, setup: Setup, tokens: data.Tokens, step: int | None, params: dict, frozen: Callable[[], Frozen], mesh: Mesh,
        initial_prompts: Mapping[str, str], searched: Sequence[int] | None, mean: dict[str, Lora] | str, progress: Progress | None = None,
    ):
        """Takes the parts of a run; `load` and `train` put them together.

        Args:
          step: of the checkpoint, None where nothing was to be learnt.
          params: the tree that was learnt.
          frozen: returns the weights that do not learn, as the checkpoints have them; called when the models are needed.
          initial_prompts: by the names of a mixture's parts, or by ''.
          searched: ids of the prompt for all queries, of a method that searches it.
          mean: the mean adapter, of a method that writes an adapter a query; or a text that says why there is none.
        """
        self.setup, self.tokens, self.step, self.params, self.mesh, self._load_frozen = setup, tokens, step, params, mesh, frozen
        self.initial_prompts, self.searched, self._mean = initial_prompts, searched, mean
        self.progress = progress or Progress(stream=sys.stderr)
        self._passes: dict[int, passes.Passes] = {}

    @classmethod
    def load(cls, workdir: str | os.PathLike, step: int | None = None, settings: Mapping[str, Any] | None = None, progress: Progress | None = None) -> "Tuner":
        """Returns what the run in a folder has trained. Its rows are not needed.

        Args:
          step: of the checkpoint; None: the one that was evaluated or, of a run that has not ended, the best so far.
          settings: of `config.MAY_DIFFER` by their dotted names, such as {"eval.batch_size": 8}.

        Raises:
          ValueError: the folder holds no run of ours, or its models or checkpoint cannot be used; in one line.
        """
        workdir = pathlib.Path(workdir)
        config = _changed(workdir_lib.read_config(workdir), settings or {})
        saved, results = (files.read_json(workdir / f"{name}.json") for name in ("config", "results"))
        job_lib.find_devices()
        setup, tokens = job_lib.make_setup(config, saved.get("resolved", {}).get("dtype"))
        mesh = _mesh(config.mesh, any(name.startswith("mesh.") for name in settings or {}))
        if step is None:
            step = results["checkpoint"] if results else checkpoint.best_in(workdir / "checkpoints")
        if step is None and setup.method.learns:
            raise ValueError(f"--workdir={workdir} has no checkpoint yet: let the run go on for longer")
        if setup.method.prompt == "searched" and "searched_prompt" not in (results or {}):
            raise ValueError(f"--workdir={workdir} has not found its prompt yet: run the same command again, until it has ended")
        params = _load_params(setup, workdir, step, mesh) if setup.method.learns and step is not None else {}
        frozen, mean = functools.partial(networks.load_frozen, setup, tokens, mesh), _mean_of(workdir, step)
        prompts = saved.get("initial_prompts") or _read_initial_prompts(setup.config)
        return cls(setup, tokens, step, params, frozen, mesh, prompts, (results or {}).get("searched_prompt"), mean, progress)

    @classmethod
    def train(
        cls, config: config_lib.Config, workdir: str | os.PathLike, train: Sequence[dict], validation: Sequence[dict] | None = None,
        test: Sequence[dict] | None = None, progress: Progress | None = None,
    ) -> "Tuner":
        """Trains on rows in memory, evaluates, and returns what was trained. The same call goes on where it was broken off.

        Args:
          config: as `config.make` returns it; its `task` names the fields (`options`), the metric, the initial prompt and the numbers of rows.
          workdir: folder of the run, with all that `experiments.run` leaves there.
          train, validation, test: rows such as {"question": ..., "answer": ...}; a split that is not given is cut from train.

        Raises:
          ValueError, OSError: config, rows, models or folder cannot be used; in one line, before anything slow.
          RuntimeError: training failed.

        >>> import metatuner_jax as mt
        >>> rows = [{"question": f"reverse: {a} {b}", "answer": f"{b} {a}"} for a in "abcdefg" for b in "abcdefg" if a != b]
        >>> config = mt.config.make(
        ...     generator={"model": "my-model"}, actor={"model": "my-model", "max_answer_tokens": 8}, task={"num_validation": 8, "num_test": 8},
        ...     train={"num_steps": 2, "batch_size": 4}, rollout={"num_queries": 4, "num_prompts": 1},
        ... )
        >>> tuner = mt.Tuner.train(config, "runs/mine", rows)  # doctest: +ELLIPSIS
        metatuner_j on jsonl, seed 0: both terms in every step: MetaTuner-J
        ...
        Everything is in runs/mine
        """
        config_lib.check(config)
        workdir = pathlib.Path(workdir)
        task_config, task = tasks.of_rows(config.task, config.seed, train, validation, test)
        config = dataclasses.replace(config, task=task_config)
        with job_lib.begin(config, workdir, task=task) as work:
            if work is not None:
                job_lib.do(work, workdir, progress or Progress(log=workdir / "run.log"))
        return cls.load(workdir)

    @functools.cached_property
    def frozen(self) -> Frozen:
        """The weights that do not learn in the joint phase, the actor warmed up where it was."""
        frozen = self._load_frozen()
        return frozen if self.warmed_up is None else train.warmed_up(self.setup, frozen, self.params)

    @property
    def warmed_up(self) -> dict | None:
        """What the actor learnt in its warm-up, a static LoRA or all weights; None where there was none, or it was not over yet."""
        return self.params.get("actor") if (self.step or 0) >= self.setup.config.warmup.actor_steps else None

    def answer(
        self, queries: Sequence[str], adapter: str = "own", prompt: str = "own", part: str | None = None, prompts: Sequence[str | None] = (),
    ) -> list[Answer]:
        """Returns the answers to queries.

        Args:
          adapter: 'own': the LoRA that is written for each query, or the static one; 'mean': that of all queries; 'none': the bare actor.
          prompt: 'own': what the method writes or has found; 'initial': the hand-written one.
          part: of a mixture, the part whose initial prompt the queries have.
          prompts: for each query, one that it is answered under in their place, or None.

        Raises:
          ValueError: a query or prompt is empty or too long, or the run has no such adapter or part.
          memory.OutOfMemory: the answers need more than there is; says which settings need less.
        """
        config_lib.one_of("adapter", adapter, ADAPTERS)
        config_lib.one_of("prompt", prompt, PROMPTS)
        if adapter == "mean":
            self.mean_lora()
        rows = self._rows(queries, part)
        if rows is None:
            return []
        with self._watched():
            return self._answer(rows, adapter, prompt, prompts)

    def _answer(self, rows: data.Rows, adapter: str, prompt: str, prompts: Sequence[str | None]) -> list[Answer]:
        runner, index = self._passes_for(len(rows)), np.arange(len(rows))
        if prompt == "own":
            h, tokens, mask = runner.prompts(self.params, rows, index, self.searched)
        else:
            h = runner.encode(self.params, rows, index) if adapter == "own" and self.setup.method.adapter == "generated" else None
            tokens, mask = rows.initial, rows.initial_mask
        tokens, mask = np.array(tokens), np.array(mask)
        for i, text in enumerate(prompts):
            if text is not None:
                tokens[i], mask[i] = self._given(text)
        answered = runner.answer(rows, index, tokens, mask, self._adapter(runner, adapter, h))
        texts = self.tokens.answers(answered.tokens, answered.mask)
        num_read = len(self.tokens.template.prefix) + (mask & (tokens != self.setup.end_id)).sum(axis=1) + rows.query_mask.sum(axis=1)
        return [
            Answer(e.query, self.tokens.decode(tokens[i], mask[i]), texts[i], tuple(answered.tokens[i][answered.mask[i]].tolist()), int(num_read[i]))
            for i, e in enumerate(rows.examples)
        ]  # fmt: skip

    def check(self, queries: Sequence[str], part: str | None = None, given: str | None = None) -> None:
        """Raises ValueError where one of the queries cannot be answered, or not under a given prompt, as `answer` does."""
        self._rows(queries, part)
        if given is not None:
            self._given(given)

    def stream(self, queries: Iterable[str], adapter: str = "own", prompt: str = "own", part: str | None = None) -> Iterator[Answer]:
        """Yields the answers to queries in their order, a batch of `eval.batch_size` at a time, which are taken as they are needed."""
        batch = []
        for query in queries:
            batch.append(query)
            if len(batch) == self.setup.config.eval.batch_size:
                yield from self.answer(batch, adapter, prompt, part)
                batch = []
        yield from self.answer(batch, adapter, prompt, part)

    def prompt(self, query: str, part: str | None = None) -> str:
        """Returns the prompt that the method writes for a query, or has found for all of them."""
        return self.prompts([query], part)[0]

    def prompts(self, queries: Sequence[str], part: str | None = None) -> list[str]:
        """Returns the prompts of several queries, as `prompt` returns one."""
        rows = self._rows(queries, part)
        if rows is None:
            return []
        with self._watched():
            _, tokens, mask = self._passes_for(len(rows)).prompts(self.params, rows, np.arange(len(rows)), self.searched)
        return [self.tokens.decode(*written) for written in zip(tokens, mask)]

    def lora(self, query: str, part: str | None = None) -> dict[str, Lora]:
        """Returns the LoRA for a query by the names of the projections, numpy, float32: `a` is [l, i, r], `b` is [l, r, o], scale included.

        Raises:
          ValueError: the method has none.
        """
        method = self.setup.method
        if method.adapter is None:
            raise ValueError(f"method={self.setup.config.method} has no adapter: it adapts the prompt alone")
        if method.adapter == "static":
            return jax.tree.map(np.asarray, generator.static(self.params["hyper"], self.setup.config.hyper.scale))
        with self._watched():
            rows = self._rows([query], part)
            runner = self._passes_for(1)
            h = runner.encode(self.params, rows, np.arange(1))
            at = np.zeros(sharding.row_parts(self.mesh), np.int32)  # a row for each part of the mesh
            return lora.row(sharding.fetch(runner.adapt(self.params["hyper"], h[at])), 0)

    def mean_lora(self) -> dict[str, Lora]:
        """Returns the mean adapter, as `lora` returns one: of a method with one LoRA for all queries, that one.

        Raises:
          ValueError: the method has none, or it was not made for this checkpoint.
        """
        if self.setup.method.adapter != "generated":
            return self.lora("")
        if isinstance(self._mean, str):
            raise ValueError(self._mean)
        return self._mean

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        return memory.watched(self.setup.config, lambda: "answers")

    def _adapter(self, runner: passes.Passes, name: str, h: np.ndarray | None) -> Callable[[np.ndarray], dict[str, Lora]] | None:
        """Returns what `Passes.answer` takes as adapter."""
        if name == "none" or self.setup.method.adapter is None:
            return None
        if name == "mean" and self.setup.method.adapter == "generated":
            mean = self.mean_lora()
            return lambda at: lora.repeat(mean, len(at))
        return runner.adapter(self.params, h)

    def _rows(self, queries: Sequence[str], part: str | None) -> data.Rows | None:
        """Returns queries as rows, None where there are none."""
        queries = [queries] if isinstance(queries, str) else list(queries)
        if not queries:
            return None
        wrong = next((query for query in queries if not isinstance(query, str)), None)
        if wrong is not None:
            raise ValueError(f"query {config_lib.short(wrong)} is no text")
        config, model = self.setup.config, (self.setup.generator, self.setup.actor)
        rows = data.query_rows(self.tokens, config, self._initial_prompt(part), queries)
        longest = data.Lengths(*(int(getattr(rows, name).sum(axis=1).max()) for name in ("generator_mask", "query_mask", "answer_mask")))
        job_lib.check_lengths(config, *model, longest, len(self.tokens.template.prefix))
        return rows

    def _given(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens, mask) of a prompt that somebody wrote."""
        limit, ids = self.setup.config.generator.max_prompt_tokens, self.tokens.prompt_ids(prompt)
        if len(ids) > limit:
            raise ValueError(f"prompt {config_lib.short(prompt)} takes {len(ids)} tokens with the end token, above generator.max_prompt_tokens={limit}: shorten it")
        tokens, mask = data.pad([ids], limit, "right")
        return tokens[0], mask[0]

    def _initial_prompt(self, part: str | None) -> str:
        if part is None and len(self.initial_prompts) == 1:
            return next(iter(self.initial_prompts.values()))
        if part is None or part not in self.initial_prompts:
            raise ValueError(f"part={part!r} is not one of the parts of this run's task: {', '.join(map(repr, self.initial_prompts))}")
        return self.initial_prompts[part]

    def _passes_for(self, count: int) -> passes.Passes:
        """Returns the passes whose batches are the least that hold so many queries."""
        size, largest = 1, self.setup.config.eval.batch_size
        while size < min(count, largest):
            size = min(size * SIZES, largest)
        if size not in self._passes:
            self._passes[size] = passes.Passes(self.setup, self.frozen, self.mesh, size, self.progress, self.tokens)
        return self._passes[size]


def _changed(config: config_lib.Config, settings: Mapping[str, Any]) -> config_lib.Config:
    """Returns a run's config with other settings for answering."""
    for name in settings:
        if name not in config_lib.MAY_DIFFER:
            near = config_lib.nearest(name, config_lib.MAY_DIFFER)
            raise ValueError(f"{name} cannot be another one than in training{near}; of a trained run these can: {', '.join(config_lib.MAY_DIFFER)}")
    tree = config_lib.to_tree(config)
    text = lambda value: "none" if value is None else json.dumps(list(value)) if isinstance(value, (list, tuple)) else str(value)
    config_lib.override(tree, [(name, text(value)) for name, value in settings.items()])
    config = config_lib.from_tree(tree)
    config_lib.check(config)
    return config


def _mesh(config: config_lib.MeshConfig, asked: bool) -> Mesh:
    """Returns the mesh of the run where the devices here make it up, else all devices along data; what was asked for must be so."""
    try:
        return sharding.make_mesh(config)
    except ValueError:
        if asked:
            raise
        return sharding.make_mesh(config_lib.MeshConfig())


def _load_params(setup: Setup, workdir: pathlib.Path, step: int, mesh: Mesh) -> dict:
    """Returns the tree that was learnt at a step, on the mesh."""
    state, _ = networks.shapes(setup)
    return checkpoint.load_params(workdir / "checkpoints", step, sharding.shapes_at(state.params, mesh))


def _mean_of(workdir: pathlib.Path, step: int | None) -> dict[str, Lora] | str:
    """Returns the mean adapter of a checkpoint, or a text that says why there is none."""
    path = workdir / "mean_adapter.safetensors"
    if not path.exists():
        return f"{workdir} has no mean_adapter.safetensors, which a run of this version leaves at its end: let it end, with eval.report=test"
    mean, about = lora.load(path)
    if about["checkpoint"] != str(step):
        return f"{path} is of the checkpoint of step {about['checkpoint']}, not {step}: take that one"
    return mean


def _read_initial_prompts(config: config_lib.Config) -> dict[str, str]:
    """Returns the initial prompts of a task by its rows, for a run whose config.json does not have them yet."""
    task = tasks.load(config.task, config.seed)
    return tasks.initial_prompts(task.train + task.validation + task.test, config.task.initial_prompt or task.initial_prompt)
