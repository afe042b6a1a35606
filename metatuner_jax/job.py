"""A whole run: all that is checked before anything slow, and then training and evaluation in its folder."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from metatuner_jax import (
    checkpoint,
    data,
    evaluate,
    files,
    lora,
    memory,
    methods,
    networks,
    preference,
    pretrained,
    processes,
    product,
    report,
    rollout,
    sharding,
    tasks,
    train,
)
from metatuner_jax import config as config_lib
from metatuner_jax import metrics as metrics_lib
from metatuner_jax import workdir as workdir_lib
from metatuner_jax.generator import Setup
from metatuner_jax.passes import Passes


class Start(NamedTuple):
    """What a run takes of an earlier one."""

    folder: pathlib.Path
    step: int
    like: dict  # the parts that both have, as shapes
    anew: tuple[str, ...]  # those that the earlier run does not have


@dataclasses.dataclass
class Job:
    """All of a run that is known before any weights are loaded."""

    given: config_lib.Config  # as the user gave it; the setup's is what the method makes of it
    setup: Any  # generator.Setup: the config, both architectures
    task: Any  # tasks.Task
    tokens: Any  # data.Tokens
    rows: dict  # split name -> data.Rows
    lengths: Any  # data.Lengths
    too_long: dict  # split name -> (queries, answers) above the limits
    mesh: Any
    sums: dict  # of the rows (see `data.digest`)
    checkpoints: dict = dataclasses.field(default_factory=dict)  # step -> what is wrong with it, None where nothing is
    start: Start | None = None


@contextlib.contextmanager
def begin(config: config_lib.Config, workdir: pathlib.Path, others: dict | None = None, task: tasks.Task | None = None):
    """Yields the job of a config, with the run folder held for it; None where the folder has its results already.

    Args:
      others: what `processes.join` takes.
      task: rows and their scoring, where they are not those that the config names.

    Raises:
      ValueError, OSError: it cannot be done, in one line with the field, the value and the way out; nothing was written.
    """
    saved = workdir_lib.check_workdir(config, workdir, goes_on=True)
    if saved is not None and workdir_lib.finished(workdir, saved, config):
        yield None
        return
    if saved is not None and (workdir / "results.json").exists():
        workdir_lib.results_of(workdir)  # which are set aside for those of more steps: what is no result is refused first
    processes.join(**(others or {}))
    if len(set(processes.group.gather(saved is not None))) > 1:
        raise ValueError(workdir_lib.NOT_SHARED.format(workdir=workdir))
    with contextlib.ExitStack() as folder:
        if saved is not None:
            folder.enter_context(workdir_lib.held(workdir))
        job = prepare(config, saved and saved.get("resolved", {}).get("dtype"), task=task)
        if saved is not None:
            job.checkpoints = check_saved(job, workdir, saved)
        else:
            folder.enter_context(workdir_lib.held(workdir))
            if processes.group.index == 0 and (workdir / "config.json").exists():
                raise ValueError(f"--workdir={workdir} was taken by another run just now; give another --workdir")
        if config.train.start_from is not None and not any(wrong is None for wrong in job.checkpoints.values()):
            job.start = start_of(job.setup, config)
        yield job


# What a run has learnt means something under these settings alone, where one of these parts is taken; None: whatever is.
BELONG = {
    "generator.model": None, "actor.model": None, "generator.scale": {"shared", "prompt", "encoder"}, "warmup.scale": {"actor"},
    **{name: {"hyper"} for name in ("hyper.scale", "hyper.pool", "hyper.standardize", "hyper.network")},
}  # fmt: skip


def start_of(setup, config) -> Start:
    """Returns what a run takes of `train.start_from`; raises ValueError where that has nothing for it, from shapes alone."""
    folder, way_out = pathlib.Path(config.train.start_from), "take another train.start_from, or none"
    field = f"train.start_from={folder}"
    theirs, results = workdir_lib.read_config(folder, "train.start_from"), files.read_json(folder / "results.json", way_out)
    try:
        step = results["checkpoint"] if results else checkpoint.best_in(folder / "checkpoints")
    except (KeyError, TypeError, ValueError, OSError):
        raise ValueError(f"{field} has results or checkpoints that no run of ours wrote: {way_out}") from None
    if step is None:
        raise ValueError(f"{field} has no checkpoint yet: let that run go on for longer, or {way_out}")
    saved, (state, _) = checkpoint.saved_params(folder / "checkpoints", step, way_out), networks.shapes(setup)
    like = {part: tree for part, tree in state.params.items() if part in saved}
    if not like:
        raise ValueError(f"{field} has learnt nothing that method={config.method} learns: {', '.join(saved)}; take a run of another method")
    if "actor" in saved and "actor" not in like:
        raise ValueError(f"{field} has warmed up its actor, to which all else that it learnt belongs: set warmup.actor_steps here too")
    for name, parts in BELONG.items():
        section, leaf = name.split(".")
        there, here = (getattr(getattr(one, section), leaf) for one in (theirs, config))
        if there != here and (parts is None or parts & set(like)):
            raise ValueError(f"{field} has {name}={there}, to which what it learnt belongs, and this run has {here}: take the same")
    wanted = {part: saved[part] for part in like}
    checkpoint.check_like(folder / "checkpoints" / str(step), wanted, like, f"give the settings that it was made with, or {way_out}")
    return Start(folder, step, like, tuple(part for part in state.params if part not in like))


def tell(error, progress):
    """Says that the run has failed. Where there are other processes, it ends there."""
    processes.group.wait_for_news()  # it may be that another process is gone
    print(f"failed: {error}", file=sys.stderr)
    progress.note(f"failed: {error}")
    processes.group.fail(str(error), 1)


def prepare(config, dtype=None, mesh=None, task=None) -> Job:
    """Returns the job that a config describes; raises ValueError where it cannot be done. Loads no weights.

    Args:
      dtype: what dtype=auto stands for, such as in the run that goes on; None: what is fastest here.
      mesh: of a plan, which has no need of weights; None: that of the devices here.
      task: in the place of the one that the config names.
    """
    metrics_lib.check(config.train)
    if task is None:
        tasks.check(config.task)
    devices = find_devices()
    given, (setup, tokens) = config, make_setup(config, dtype)
    config, generator, actor = setup.config, setup.generator, setup.actor
    task = task or tasks.load(config.task, config.seed)
    initial_prompt = config.task.initial_prompt or task.initial_prompt
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    check_alike(lambda: {**data.digest_texts(splits), "config": config_lib.plain(given), "versions": workdir_lib.versions()})
    rows, lengths, too_long = data.make_rows(tokens, config, initial_prompt, splits)
    highest = data.largest_id(rows, tokens)
    if highest >= setup.actor.vocab_size:
        raise ValueError(
            f"actor.model={config.actor.model!r}: its tokenizer gives the id {highest}, and the embeddings of generator and actor have "
            f"{setup.actor.vocab_size} rows: the tokenizer does not belong to the weights"
        )
    check_lengths(config, generator, actor, lengths, len(tokens.template.prefix))
    if len(rows["test"]) < 2:
        raise ValueError(
            f"task.num_test={config.task.num_test} leaves {len(rows['test'])} test row, and at least 2 are needed: the shuffled controls give "
            "each query another one's prompt; raise it, or give task.test more rows"
        )
    planned, mesh = mesh is not None, mesh or sharding.make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    for role in () if planned else ("generator", "actor"):
        of_model(config, role, pretrained.check_weights)
    sums = data.digest(rows)
    check_alike(lambda: sums)
    return Job(given, setup, task, tokens, rows, lengths, too_long, mesh, sums)


def make_setup(config, dtype=None) -> tuple[Setup, data.Tokens]:
    """Returns what the passes of a config need besides arrays, from its models' settings and tokenizers alone.

    Args:
      dtype: as in `prepare`.
    """
    config = methods.resolve(config)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=dtype or processes.group.from_first(product.fastest_dtype))
    generator, actor = (of_model(config, role, pretrained.load_config) for role in ("generator", "actor"))
    config_lib.check_model(config, generator, actor)
    tokenizer = of_model(config, "actor", pretrained.load_tokenizer)
    if config.generator.model != config.actor.model:
        difference = pretrained.same_tokenizer(of_model(config, "generator", pretrained.load_tokenizer), tokenizer)
        if difference:
            raise ValueError(
                f"generator.model={config.generator.model!r} and actor.model={config.actor.model!r} have different tokenizers "
                f"({difference}): written prompts are spliced as token ids, so take two models of one family"
            )
    vocab_size = min(generator.vocab_size, actor.vocab_size)
    generator, actor = (dataclasses.replace(model, vocab_size=vocab_size) for model in (generator, actor))
    tokens = of_model(config, "actor", lambda _: data.Tokens(tokenizer, vocab_size, config.generator.instruction, config.actor.stop))
    return Setup(config, generator, actor, tokens.end_id, tokens.template.prefix), tokens


def check_alike(make):
    """Raises ValueError where something that goes into a run, make() -> {name: value}, is not the same in all processes."""
    if processes.group.count == 1:
        return
    told = processes.group.gather(make())
    for other, found in enumerate(told):
        changed = [name for name in found if found[name] != told[0][name]]
        if changed:
            raise ValueError(f"process {other} differs from process 0 in {', '.join(changed)}: give all the same files, settings and versions")


def find_devices():
    """Returns jax's devices; raises ValueError where there are none of the kind that was asked for."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of jax's own fails where cuda is asked for and not installed
        asked, reason = os.environ.get("JAX_PLATFORMS", ""), str(error) or "not installed"
        raise ValueError(f"JAX_PLATFORMS={asked}: jax finds no such device here ({reason}); unset it to take what is there, or set it to cpu") from None


def of_model(config, role, read):
    """Returns read(the model's name) for the generator or the actor, whose name goes before what is wrong with it."""
    name = getattr(config, role).model
    try:
        return read(name)
    except ValueError as error:
        raise ValueError(f"{role}.model={name!r} cannot be used: {error}") from None


def check_lengths(config, generator, actor, lengths, prefix_tokens):
    """Raises ValueError where the longest rows do not fit the models' windows."""
    prompt = config.generator.max_prompt_tokens
    longest = {
        "generator": (generator, lengths.generator + prompt),
        "actor": (actor, prefix_tokens + prompt + lengths.query + max(lengths.answer, config.actor.max_answer_tokens)),
    }
    for role, (model, length) in longest.items():
        if length > model.max_positions:
            raise ValueError(
                f"{role}.model has max_position_embeddings={model.max_positions}, and the longest row takes {length} tokens: lower generator.max_query_tokens, "
                "generator.max_prompt_tokens or actor.max_answer_tokens"
            )


def check_rows(config, mesh):
    """Raises ValueError where the mesh does not split the rows of a batch evenly."""
    ways = sharding.row_parts(mesh)
    parts = config.train.accumulate
    if parts > 1 and config.train.batch_size % (parts * ways):
        raise ValueError(
            f"train.batch_size={config.train.batch_size} must be a multiple of train.accumulate={parts} times mesh.data * mesh.fsdp = {ways}, "
            "which split the rows of each part"
        )
    for name, size in (("train.batch_size", config.train.batch_size), ("eval.batch_size", config.eval.batch_size)):
        if size % ways:
            raise ValueError(f"{name}={size} must be a multiple of mesh.data * mesh.fsdp = {ways}, which split the rows of a batch")


def check_saved(job, workdir, saved):
    """Returns what is wrong with each of its checkpoints (see `checkpoint.problems`) of a run that was begun in the folder.

    Raises ValueError where it cannot go on with this data and these models.
    """
    changed = [name for name in job.sums if saved.get("data", {}).get(name) != job.sums[name]]
    if changed:
        raise ValueError(f"--workdir={workdir} was begun with other data: {', '.join(changed)} changed since; give another --workdir")
    problems = dict(processes.group.from_first(lambda: list(checkpoint.problems(workdir / "checkpoints").items())))
    good = [step for step, wrong in problems.items() if not wrong]
    if good:
        check_checkpoint(job.setup, workdir, good[-1])
    return problems


def check_checkpoint(setup, workdir, step):
    """Raises ValueError where a checkpoint of the folder is of another architecture, from shapes alone."""
    state, _ = networks.shapes(setup)
    checkpoint.check(workdir / "checkpoints", step, train.rest(state, train.phases(setup), step))


def do(job: Job, workdir, progress) -> None:
    """Does the whole run in its folder. Raises what a step, an evaluation or the disk does, `memory.OutOfMemory` where there is not enough."""
    with memory.watched(job.setup.config, lambda: progress.doing, sharding.row_parts(job.mesh)), contextlib.ExitStack() as closing:
        _do(job, workdir, progress, closing)


def _do(job, workdir, progress, closing):
    began = time.perf_counter()
    for name in ("absl", "asyncio"):  # which print pages, again and again, about an error that is raised here too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    keep_compiled()
    progress.stop.waits = True
    progress.now("start")
    setup, config, task, tokens, rows = job.setup, job.setup.config, job.task, job.tokens, job.rows
    introduce(progress, job)
    if processes.group.index == 0:
        workdir_lib.write_config(job, workdir, progress)

    keys = dict(zip(("init", "step", "rollout"), jax.random.split(jax.random.key(config.seed), 3)))
    with progress.wait("loading the models"):
        frozen, params = networks.load(setup, tokens, keys["init"], job.mesh)
    if job.start is not None:
        folder, step, like, anew = job.start
        params |= checkpoint.restore_params(folder / "checkpoints", step, sharding.shapes_at(like, job.mesh))
        progress.line(f"starting from step {step} of {folder}: {', '.join(like)}" + (f"; anew: {', '.join(anew)}" if anew else ""))
    state = sharding.place(train.init_state(setup, params), job.mesh)
    shapes = checkpoint.shapes(state)
    del params
    learning = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    progress.line(f"parameters: {learning / 1e6:.1f} million learn, {_millions(frozen)} million are frozen")

    passes = Passes(setup, frozen, job.mesh, config.eval.batch_size, progress, tokens)
    del frozen  # the passes hold the weights, which a warm-up replaces
    full = config.eval.report == "test"
    progress.now("evaluation")
    before = score_before(passes, job, workdir) if full else None  # first of all: a warm-up changes the actor

    ids = [example.id for example in rows["train"].examples]
    keeps = setup.method.adapter is None and not config.warmup.actor_steps
    experts = rollout.Experts(workdir / "experts.jsonl", ids, rows["train"].initial, rows["train"].initial_mask, keeps)
    pairs = preference.Pairs(workdir / "pairs.jsonl", ids, config.actor.max_answer_tokens)
    for line in processes.group.from_first(lambda: checkpoint.set_aside(workdir / "checkpoints", job.checkpoints)):
        progress.line(f"note: {line}")
    sound = (step for step, wrong in job.checkpoints.items() if not wrong)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints, sound, progress.note)
    try:
        newest = checkpoints.latest()
        planned = train.phases(setup)
        if newest is not None:
            state = checkpoints.restore(newest, train.rest(shapes, planned, newest))
            progress.line(f"resuming at step {newest} of {sum(phase.steps for phase in planned)}")
        experts.restore(newest or 0)
        pairs.restore(newest or 0)
        metrics = metrics_lib.Metrics(workdir, config, newest or 0, began, progress.line)
        closing.callback(metrics.close)
        trainer = train.Trainer(passes, keys, rows, experts, pairs, tokens, task.score, checkpoints, metrics.add, workdir / "profile")
        state = trainer.fit(state)
        best = checkpoints.best()
        if best not in (None, trainer.total):
            progress.line(f"taking the checkpoint of step {best}, the best on validation rows")
            state = checkpoints.restore(best, train.rest(shapes, planned, best))
    except (RuntimeError, ValueError, OSError) as error:
        if processes.group.count > 1:  # now: to close, the others are waited for
            tell(memory.named(error, config, progress.doing, sharding.row_parts(job.mesh)), progress)
        raise
    finally:
        checkpoints.close()
    for_all = trainer.last_search(state, best)
    progress.now("evaluation")
    logged = metrics.lines()
    validation = next((m["validation"] for m in reversed(logged) if m.get("validation") is not None and m["step"] + 1 == best), None)
    if validation is None or (for_all and for_all != experts.for_all(best)):
        validation = evaluate.validate(passes, state.params, rows["validation"], tokens, task.score, for_all)
    results = {
        "task": task.name, "method": config.method, "seed": config.seed, "metric": task.metric,
        "validation": validation,
    }  # fmt: skip
    if full:
        scores, predictions, mean_lora = evaluate.evaluate(
            passes, state.params, rows["test"], rows["train"], tokens, task.score, before, for_all
        )
        files.write_lines(workdir / "predictions.jsonl", predictions)
        results |= scores
        if mean_lora is not None and processes.group.index == 0:
            lora.save(workdir / "mean_adapter.safetensors", mean_lora, checkpoint=str(int(np.asarray(state.step))))
    total = lambda name: sum(m.get(name, 0) * (m.get("steps", 1) if name in ("step_s", "tokens") else 1) for m in logged)
    results |= {
        "steps": config.train.num_steps if setup.method.learns else 0, "checkpoint": int(np.asarray(state.step)),
        "wall_s": metrics.wall_s, "train_s": round(total("step_s"), 1), "rollout_s": round(total("rollout_s"), 1),
        "cost": {
            "trained_parameters": learning, "actor_calls": int(total("rollout_attempts")), "tokens": int(total("tokens") + total("rollout_tokens")),
            "seconds": round(total("step_s") + total("rollout_s"), 1),
        },
        "dropped": task.dropped,
        **({"searched_prompt": for_all} if setup.method.prompt == "searched" else {}),
    }  # fmt: skip
    files.write_json(workdir / "results.json", results)
    metrics.finish(results)
    progress.line("\n" + workdir_lib.summary(results, predictions[:3] if full else []))
    if processes.group.index == 0:
        draw(workdir, progress)
    progress.line(f"\nEverything is in {workdir}")


def draw(workdir, progress):
    """Writes the run's report. Where the disk is full, matplotlib cannot be loaded, or numbers cannot be drawn, the run is done all the same."""
    try:
        report.write(workdir)
    except (OSError, ImportError, ValueError) as error:
        text = " ".join(str(error).split())
        progress.line(f"note: the report could not be written ({text}); python -m experiments.report {workdir} tries again")


def keep_compiled():
    """Lets a later process take from disk what this one compiles, where the user has not said where such things go."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(pretrained.cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def score_before(passes, job, workdir):
    """Returns what the bare actor says to the test queries (see `evaluate.answer_before`), from the run folder where it is there."""
    path, rows = workdir / "before.jsonl", job.rows["test"]
    lines = files.read_lines(path)
    if [line["id"] for line in lines] != [example.id for example in rows.examples]:
        lines = evaluate.answer_before(passes, rows, job.tokens, job.task.score)
        files.write_lines(path, lines)
    mean = sum(line["score"] for line in lines) / len(lines)
    passes.progress.line(f"before: {100 * mean:.1f}% of {len(lines)} test queries")
    return lines


def introduce(progress, job):
    """Prints what is about to run, and what was dropped."""
    setup, task, rows = job.setup, job.task, job.rows
    config = setup.config
    device = jax.devices()[0]
    progress.line(f"{config.method} on {task.name}, seed {config.seed}: {setup.method.summary}")
    progress.line(
        f"generator: {config.generator.model}, {setup.generator.num_layers} layers of {setup.generator.width}, {setup.num_shared} shared, "
        f"train={config.generator.train}; actor: {config.actor.model}, {setup.actor.num_layers} layers of {setup.actor.width}"
    )
    progress.line(f"device: {jax.device_count()} x {device.device_kind} ({jax.default_backend()}), {config.dtype}{', frozen layers in int8' * (config.weights == 'int8')}, mesh {dict(job.mesh.shape)}")
    progress.line("rows: " + ", ".join(f"{len(part)} {name}" for name, part in rows.items()) + f"; longest: {_lengths(job.lengths)}")
    for split, (queries, answers) in job.too_long.items():
        if queries or answers:
            done = "dropped" if config.data.too_long == "drop" else "cut"
            progress.line(
                f"note: {split}: {queries} queries above generator.max_query_tokens={config.generator.max_query_tokens} and {answers} answers "
                f"above actor.max_answer_tokens={config.actor.max_answer_tokens} were {done}"
            )
    for stop in config.actor.stop:
        number = sum(stop in example.answer for part in rows.values() for example in part.examples)
        if number:
            progress.line(f"note: actor.stop={stop!r} stands in {number} of the answers that are to be learnt: no answer can be like these")
    for what, number in task.dropped.items():
        if number:
            progress.line(f"note: {number} rows dropped: {what.replace('_', ' ')}")


def _lengths(lengths):
    return f"{lengths.generator} tokens for the generator, {lengths.query} and {lengths.answer} in query and answer"


def _millions(frozen):
    leaves = {id(leaf): leaf.size for leaf in jax.tree.leaves((frozen.generator, frozen.actor))}
    return f"{sum(leaves.values()) / 1e6:.1f}"
