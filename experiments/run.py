"""The command line: one run of one config, from data to results.

    python -m experiments.run --config experiments/configs/quickstart.py --workdir runs/quickstart --config.train.num_steps=20
"""

import contextlib
import dataclasses
import difflib
import fcntl
import importlib.util
import json
import logging
import os
import pathlib
import secrets
import sys
import time
import traceback
from typing import Any

from metatuner_jax import config as config_lib
from metatuner_jax import files, methods, processes, stopping, tasks

USAGE = """usage: python -m experiments.run --config FILE [--workdir FOLDER] [--config.SECTION.NAME=VALUE ...]

Trains what the config says and shows on unseen queries how much better the model answers. A second run with the same
workdir resumes; a finished one says so and changes nothing.

  --config FILE     a Python file with get_config(), such as experiments/configs/quickstart.py
  --workdir FOLDER  where everything goes (default: runs/<name of the config file>)
  --coordinator HOST:PORT --num_processes N --process_id I
                    one of several processes that do the run together, I from 0 to N-1, the first one at HOST:PORT; on TPU
                    pods and on Slurm they find one another
  --plan            say what the run would take, and do nothing: with --devices N (default: those there are), --memory GIB of each
                    (default: what it says), --json FILE; exit code 1 where it does not fit
  --help            this text

Settings and their defaults (`none` clears an optional one):
"""


class Mistake(Exception):
    """What the user can mend: one line for standard error, exit code 2."""


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(USAGE + "\n".join(f"  --config.{key}={_text(value)}\n      {help}" for key, value, help in config_lib.leaves()))
        return 0
    stop = stopping.Stop()
    try:
        with stop.heard():
            code = run(argv, stop)
    except stopping.Stopped as stopped:
        print(f"stopped by {stopped}: {stopped.kept or 'nothing was done that could be lost'}", file=sys.stderr)
        code = 128 + stopped.number
        if not stop.waits:  # this process alone
            processes.group.fail(f"stopped by {stopped}", code)
    except Exception as error:
        if processes.group.count > 1:
            traceback.print_exc()
            processes.group.fail(f"{type(error).__name__}: {error}", 1)
        raise
    processes.group.end(code)
    return code


def run(argv, stop) -> int:
    """Does what the command line says. Returns the exit code.

    Raises:
      Stopped: the process was asked to stop.
    """
    with contextlib.ExitStack() as folder:
        try:
            if "--plan" in argv:
                from experiments import plan

                return plan.main(argv)
            path, workdir, assignments, others = parse(argv)
            config = load_config(path, assignments)
            saved = check_workdir(config, workdir, goes_on=True)
            if saved is not None and finished(workdir, saved, config):
                print(f"{workdir} holds this run, finished: nothing to do. Its results:\n\n{results_of(workdir)}")
                return 0
            if saved is not None and (workdir / "results.json").exists():
                results_of(workdir)  # which are set aside for those of more steps: what is no result is refused first
            processes.join(**others)
            if len(set(processes.group.gather(saved is not None))) > 1:
                raise Mistake(NOT_SHARED.format(workdir=workdir))
            if saved is not None:
                folder.enter_context(held(workdir))
            job = prepare(config, saved and saved.get("resolved", {}).get("dtype"))
            if saved is not None:
                job.checkpoints = check_saved(job, workdir, saved)
            else:
                folder.enter_context(held(workdir))
                if processes.group.index == 0 and (workdir / "config.json").exists():
                    raise Mistake(f"--workdir={workdir} was taken by another run just now; give another --workdir")
        except (Mistake, ValueError, OSError) as error:
            text = " ".join(str(error).split())
            print("error: " + text, file=sys.stderr)
            processes.group.fail(text, 2)
            return 2
        from metatuner_jax import checkpoint
        from metatuner_jax.progress import Progress

        progress = Progress(stop=stop, log=workdir / "run.log")
        try:
            train_and_evaluate(job, workdir, progress)
        except stopping.Stopped as stopped:
            steps = [step for step in checkpoint.steps_in(workdir / "checkpoints") if not job.checkpoints.get(step)]
            stopped.kept = f"{workdir}/checkpoints/{steps[-1]} has all that was trained; the same command goes on from it" if steps else None
            progress.note(f"stopped by {stopped}")
            raise
        except (RuntimeError, ValueError, OSError) as error:
            tell(error, progress)
            return 1
    return 0


def tell(error, progress):
    """Says that the run has failed. Where there are other processes, it ends there."""
    processes.group.wait_for_news()  # it may be that another process is gone
    print(f"failed: {error}", file=sys.stderr)
    progress.note(f"failed: {error}")
    processes.group.fail(str(error), 1)


# --- the command line ---


def parse(argv):
    """Returns (config path, workdir, [(dotted key, text)], what `processes.join` takes).

    Raises:
      Mistake: an argument is unknown, or one is missing.
    """
    options, assignments = read_arguments(argv, ("--config", "--workdir", *OF_PROCESSES), ("--plan",))
    path = path_of(options, "--config")
    return path, path_of(options, "--workdir", f"runs/{path.stem}"), assignments, parse_processes(options)


def path_of(options, name, default=None):
    """Returns the path that an option names; raises Mistake where it names none."""
    value = options.get(name, default)
    if value is None:
        raise Mistake(f"{name} is missing: name a file such as experiments/configs/quickstart.py")
    if not value:
        raise Mistake(f"argument {name} needs a value: {name}=VALUE")
    if "\0" in value:
        raise Mistake(f"{name}={config_lib.short(value)} holds a NUL, which no name of a file has: take it out")
    return pathlib.Path(value)


OF_PROCESSES = ("--coordinator", "--num_processes", "--process_id")


def parse_processes(options) -> dict:
    """Returns what `processes.join` takes, from the options of the command line."""
    missing = [name for name in OF_PROCESSES if name not in options]
    if len(missing) == len(OF_PROCESSES):
        return {}
    if missing:
        raise Mistake(f"{missing[0]} is missing: {', '.join(OF_PROCESSES)} go together")
    address, *numbers = (options[name] for name in OF_PROCESSES)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise Mistake(f"--coordinator={address} must be host:port, where process 0 is to listen")
    for name, number in zip(OF_PROCESSES[1:], numbers):
        if not number.isdecimal():
            raise Mistake(f"{name}={number} must be a whole number")
    count, index = map(int, numbers)
    if index >= count:
        raise Mistake(f"--process_id={index} must be below --num_processes={count}: the processes are numbered from 0")
    return {"coordinator": address, "count": count, "index": index}


def read_arguments(argv, names, flags=()):
    """Returns ({name: text}, [(dotted key, text)]): the options, and the settings given as --config.KEY; a flag's text is empty.

    Of a setting that is given several times the last one counts.

    Raises:
      Mistake: an argument is unknown, lacks its value, or is an option that is given twice.
    """
    options, assignments = {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in flags:
            options[word] = ""
            continue
        if name not in names and not name.startswith("--config."):
            near = difflib.get_close_matches(name, [*names, *flags, "--help"], n=1)
            raise Mistake(f"argument {config_lib.short(word)} is unknown{f'; did you mean {near[0]}?' if near else ''}; see --help")
        if not equals:
            if not words:
                raise Mistake(f"argument {name} needs a value: {name}=VALUE")
            value = words.pop(0)
        if name in names:
            if name in options:
                raise Mistake(f"argument {name} is given twice: give it once")
            options[name] = value
        else:
            assignments.append((name.removeprefix("--config."), value))
    return options, assignments


def load_config(path, assignments) -> config_lib.Config:
    """Returns the checked config of a file with the command line's settings."""
    _, given = load_module(path)
    try:  # through the dataclasses and back: the file's tree may lack a section or hold a number in its place
        tree = config_lib.to_tree(given if isinstance(given, config_lib.Config) else config_lib.from_tree(given))
    except ValueError as error:
        raise Mistake(f"--config={path}: {error}") from None
    config_lib.override(tree, assignments)
    config = config_lib.from_tree(tree)
    config_lib.check(config)
    return config


def load_module(path):
    """Returns the module of a config file, and what its get_config returns."""
    if not path.is_file():
        raise Mistake(f"--config={path} is no file: name a Python file with get_config(), such as experiments/configs/quickstart.py")
    spec = importlib.util.spec_from_file_location("run_config", path)
    if spec is None:
        raise Mistake(f"--config={path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _no_bytecode():
            spec.loader.exec_module(module)
        return module, module.get_config()
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise Mistake(f"--config={path} could not be read: {type(error).__name__}: {error}; mend it, or name another file") from None


@contextlib.contextmanager
def _no_bytecode():
    """Has Python leave no __pycache__ beside what it imports while this is entered."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _text(value):
    return ",".join(value) if isinstance(value, tuple) else "none" if value is None else value


# --- all that can go wrong before anything slow ---


NOT_SHARED = "--workdir={workdir} is not the same folder for all processes: name one that all of them see, such as a network file system's"


@contextlib.contextmanager
def held(workdir):
    """Holds a run folder, made where it is not there, for this run alone.

    Of several processes the first one does, and the others look whether it is the same folder. Raises Mistake where it is not, or another run
    holds it.
    """
    if processes.group.index:
        mark = processes.group.gather(None)[0]
        deadline = time.monotonic() + 30  # in which a network file system shows what another machine wrote
        while not (workdir / "lock").exists() or (workdir / "lock").read_text(encoding="utf-8") != mark:
            if time.monotonic() > deadline:
                raise Mistake(NOT_SHARED.format(workdir=workdir))
            time.sleep(0.1)
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a", encoding="utf-8")
    except OSError as error:
        raise Mistake(f"--workdir={workdir} cannot be written to ({error.strerror}); give another --workdir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f"--workdir={workdir} is in use by a run that has not ended: wait for it, or give another --workdir") from None
        if processes.group.count > 1:
            mark = secrets.token_hex()
            file.truncate(0)
            file.write(mark)
            file.flush()
            processes.group.gather(mark)
        yield


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


def check_workdir(config, workdir, goes_on=False):
    """Returns the content of the folder's config.json, None where there is none; raises Mistake where the folder is not this run's.

    Args:
      goes_on: whether it may have been begun with other settings of those that a run may go on with.
    """
    try:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    except OSError as error:  # a name that is too long
        raise Mistake(f"--workdir={config_lib.short(workdir)}: {error.strerror}; give another --workdir") from None
    if not existing.is_dir():
        raise Mistake(f"--workdir={workdir}: {existing} is a file: name a folder")
    saved = read_json(workdir / "config.json")
    if saved is not None:
        if not is_ours(saved):
            raise Mistake(f"--workdir={workdir} has a config.json that no run of ours wrote; give another --workdir")
        changed = differences(with_newer_settings(saved["config"]), plain(config))
        texts = [f"{key}={a} there, {b} here" for key, a, b in changed if not (goes_on and config_lib.may_change(config.method, key, a, b))]
        if texts:
            raise Mistake(f"--workdir={workdir} holds another run: {'; '.join(texts[:4])}; give another --workdir")
        if (workdir / "results.json").exists():
            return saved
    for name in ("checkpoints", "before.jsonl", "metrics.jsonl", "experts.jsonl", "pairs.jsonl", "predictions.jsonl", "results.json"):
        if saved is None and (workdir / name).exists():
            raise Mistake(f"--workdir={workdir} holds {name} and no config.json: it is not a run of ours; give another --workdir")
    if not os.access(existing, os.W_OK):
        raise Mistake(f"--workdir={workdir}: {existing} cannot be written to; give another --workdir")
    return saved


def prepare(config, dtype=None, mesh=None) -> Job:
    """Returns the job that a config describes; raises Mistake or ValueError where it cannot be done. Loads no weights.

    Args:
      dtype: what dtype=auto stands for, such as in the run that goes on; None: what is fastest here.
      mesh: of a plan, which has no need of weights; None: that of the devices here.
    """
    tasks.check(config.task)
    given, config = config, methods.resolve(config)

    from metatuner_jax import data, pretrained, product, sharding
    from metatuner_jax.generator import Setup

    devices = find_devices()
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=dtype or processes.group.from_first(product.fastest_dtype))

    generator, actor = (of_model(config, role, pretrained.load_config) for role in ("generator", "actor"))
    config_lib.check_model(config, generator, actor)
    tokenizer = of_model(config, "actor", pretrained.load_tokenizer)
    if config.generator.model != config.actor.model:
        difference = pretrained.same_tokenizer(of_model(config, "generator", pretrained.load_tokenizer), tokenizer)
        if difference:
            raise Mistake(
                f"generator.model={config.generator.model!r} and actor.model={config.actor.model!r} have different tokenizers "
                f"({difference}): written prompts are spliced as token ids, so take two models of one family"
            )
    task = tasks.load(config.task, config.seed)
    initial_prompt = config.task.initial_prompt or task.initial_prompt
    vocab_size = min(generator.vocab_size, actor.vocab_size)
    generator, actor = (dataclasses.replace(model, vocab_size=vocab_size) for model in (generator, actor))
    tokens = of_model(config, "actor", lambda _: data.Tokens(tokenizer, vocab_size, config.generator.instruction))
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    check_alike({**data.digest_texts(splits), "config": plain(given), "versions": versions()})
    rows, lengths, too_long = data.make_rows(tokens, config, initial_prompt, splits)
    highest = data.largest_id(rows, tokens)
    if highest >= vocab_size:
        raise Mistake(
            f"actor.model={config.actor.model!r}: its tokenizer gives the id {highest}, and the embeddings of generator and actor have "
            f"{vocab_size} rows: the tokenizer does not belong to the weights"
        )
    check_lengths(config, generator, actor, lengths, len(tokens.template.prefix))
    if len(rows["test"]) < 2:
        raise Mistake(
            f"task.num_test={config.task.num_test} leaves {len(rows['test'])} test row, and at least 2 are needed: the shuffled controls give "
            "each query another one's prompt; raise it, or give task.test more rows"
        )
    planned, mesh = mesh is not None, mesh or sharding.make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    for role in () if planned else ("generator", "actor"):
        of_model(config, role, pretrained.check_weights)
    sums = data.digest(rows)
    check_alike(sums)
    setup = Setup(config, generator, actor, tokens.end_id, tokens.template.prefix)
    return Job(given, setup, task, tokens, rows, lengths, too_long, mesh, sums)


def check_alike(mine):
    """Raises Mistake where something that goes into a run ({name: value}) is not the same in all processes."""
    told = processes.group.gather(mine)
    for other, found in enumerate(told):
        changed = [name for name in found if found[name] != told[0][name]]
        if changed:
            raise Mistake(f"process {other} differs from process 0 in {', '.join(changed)}: give all the same files, settings and versions")


def find_devices():
    """Returns jax's devices; raises Mistake where there are none of the kind that was asked for."""
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of jax's own fails where cuda is asked for and not installed
        asked, reason = os.environ.get("JAX_PLATFORMS", ""), str(error) or "not installed"
        raise Mistake(f"JAX_PLATFORMS={asked}: jax finds no such device here ({reason}); unset it to take what is there, or set it to cpu") from None


def check_saved(job, workdir, saved):
    """Returns what is wrong with each of its checkpoints (see `checkpoint.problems`) of a run that was begun in the folder.

    Raises Mistake or ValueError where it cannot go on with this data and these models.
    """
    from metatuner_jax import checkpoint

    changed = [name for name in job.sums if saved.get("data", {}).get(name) != job.sums[name]]
    if changed:
        raise Mistake(f"--workdir={workdir} was begun with other data: {', '.join(changed)} changed since; give another --workdir")
    problems = dict(processes.group.from_first(lambda: list(checkpoint.problems(workdir / "checkpoints").items())))
    good = [step for step, wrong in problems.items() if not wrong]
    if good:
        check_checkpoint(job.setup, workdir, good[-1])
    return problems


def of_model(config, role, read):
    """Returns read(the model's name) for the generator or the actor, whose name goes before what is wrong with it."""
    name = getattr(config, role).model
    try:
        return read(name)
    except ValueError as error:
        raise Mistake(f"{role}.model={name!r} cannot be used: {error}") from None


def check_checkpoint(setup, workdir, step):
    """Raises ValueError where a checkpoint of the folder is of another architecture, from shapes alone."""
    from experiments import compiled
    from metatuner_jax import checkpoint, train

    state, _ = compiled.shapes(setup)
    checkpoint.check(workdir / "checkpoints", step, train.rest(state, train.phases(setup), step))


def check_lengths(config, generator, actor, lengths, prefix_tokens):
    """Raises Mistake where the longest rows do not fit the models' windows."""
    prompt = config.generator.max_prompt_tokens
    longest = {
        "generator": (generator, lengths.generator + prompt),
        "actor": (actor, prefix_tokens + prompt + lengths.query + max(lengths.answer, config.actor.max_answer_tokens)),
    }
    for role, (model, length) in longest.items():
        limit = min(model.max_positions, model.sliding_window or model.max_positions)
        name = "sliding_window" if limit == model.sliding_window else "max_position_embeddings"
        if length > limit:
            raise Mistake(
                f"{role}.model has {name}={limit}, and the longest row takes {length} tokens: lower generator.max_query_tokens, "
                "generator.max_prompt_tokens or actor.max_answer_tokens"
            )


def check_rows(config, mesh):
    """Raises Mistake where the mesh does not split the rows of a batch evenly."""
    from metatuner_jax import sharding

    ways = sharding.row_parts(mesh)
    for name, size in (("train.batch_size", config.train.batch_size), ("eval.batch_size", config.eval.batch_size)):
        if size % ways:
            raise Mistake(f"{name}={size} must be a multiple of mesh.data * mesh.fsdp = {ways}, which split the rows of a batch")


def plain(config):
    """Returns a config as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def is_ours(saved):
    """Returns whether the content of a config.json is laid out as a run writes it."""
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        return False
    resolved, data = (saved.get(name, {}) for name in ("resolved", "data"))  # which early versions did not write
    sections = [name for name, leaf in plain(config_lib.Config()).items() if isinstance(leaf, dict)]
    return (
        isinstance(data, dict) and isinstance(resolved, dict) and resolved.get("dtype") in (None, "bfloat16", "float32")
        and all(isinstance(saved["config"].get(name, {}), dict) for name in sections) and "train" in saved["config"]
    )  # fmt: skip


def with_newer_settings(saved):
    """Returns a saved config with the settings that its version did not know, at their defaults, with which things are as they were."""
    default = plain(config_lib.Config())
    sections = {name: leaves for name, leaves in saved.items() if isinstance(leaves, dict) and isinstance(default.get(name), dict)}
    found = {**saved, **{name: {**default[name], **leaves} for name, leaves in sections.items()}}
    if isinstance(found["train"]["remat"], bool):  # as it was before there were several kinds
        found["train"]["remat"] = "all" if found["train"]["remat"] else "none"
    return found


def differences(old, new, path=""):
    """Returns (dotted key, old value, new value) of each leaf in which two configs differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "missing"), new.get(key, "missing")
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append((f"{path}{key}", a, b))
    return found


def finished(workdir, saved, config):
    """Returns whether the run in a folder has its results and is given no more steps than it had."""
    return (workdir / "results.json").exists() and config.train.num_steps <= saved["config"]["train"]["num_steps"]


# --- the run ---


def train_and_evaluate(job, workdir, progress):
    """Does the whole run in its folder."""
    import jax
    import numpy as np

    from metatuner_jax import checkpoint, evaluate, preference, rollout, sharding, train
    from metatuner_jax.passes import Passes

    began = time.perf_counter()
    for name in ("absl", "asyncio"):  # which print pages, again and again, about an error that is raised here too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    keep_compiled()
    progress.stop.waits = True
    progress.now("start")
    setup, config, task, tokens, rows = job.setup, job.setup.config, job.task, job.tokens, job.rows
    introduce(progress, job)
    if processes.group.index == 0:
        write_config(job, workdir, progress)

    keys = dict(zip(("init", "step", "rollout"), jax.random.split(jax.random.key(config.seed), 3)))
    frozen, params = load_networks(setup, tokens, keys["init"], job.mesh)
    state = sharding.place(train.init_state(setup, params), job.mesh)
    shapes = checkpoint.shapes(state)
    del params
    learning = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    progress.line(f"parameters: {learning / 1e6:.1f} million learn, {_millions(frozen)} million are frozen")

    passes = Passes(setup, frozen, job.mesh, config.eval.batch_size, progress)
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
    metrics_path = workdir / "metrics.jsonl"
    try:
        newest = checkpoints.latest()
        planned = train.phases(setup)
        if newest is not None:
            state = checkpoints.restore(newest, train.rest(shapes, planned, newest))
            progress.line(f"resuming at step {newest} of {sum(phase.steps for phase in planned)}")
        experts.restore(newest or 0)
        pairs.restore(newest or 0)
        files.write_lines(metrics_path, [m for m in files.read_lines(metrics_path) if m["step"] < (newest or 0)])

        logged = files.read_lines(metrics_path)
        began -= logged[-1]["wall_s"] if logged else 0  # what the run took before it was resumed

        def log(metrics):
            files.append_lines(metrics_path, [{**metrics, "wall_s": round(time.perf_counter() - began, 1)}])

        trainer = train.Trainer(passes, keys, rows, experts, pairs, tokens, task.score, checkpoints, log)
        state = trainer.fit(state)
        best = checkpoints.best()
        if best not in (None, trainer.total):
            progress.line(f"taking the checkpoint of step {best}, the best on validation rows")
            state = checkpoints.restore(best, train.rest(shapes, planned, best))
    except (RuntimeError, ValueError, OSError) as error:
        if processes.group.count > 1:  # now: to close, the others are waited for
            tell(error, progress)
        raise
    finally:
        checkpoints.close()
    for_all = trainer.last_search(state, best)
    progress.now("evaluation")
    logged = files.read_lines(metrics_path)
    validation = next((m["validation"] for m in reversed(logged) if m.get("validation") is not None and m["step"] + 1 == best), None)
    if validation is None or (for_all and for_all != experts.for_all(best)):
        validation = evaluate.validate(passes, state.params, rows["validation"], tokens, task.score, for_all)
    results = {
        "task": task.name, "method": config.method, "seed": config.seed, "metric": task.metric,
        "validation": validation,
    }  # fmt: skip
    if full:
        scores, predictions = evaluate.evaluate(
            passes, state.params, rows["test"], rows["train"], tokens, task.score, before, for_all
        )
        files.write_lines(workdir / "predictions.jsonl", predictions)
        results |= scores
    total = lambda name: sum(m.get(name, 0) * (m.get("steps", 1) if name in ("step_s", "tokens") else 1) for m in logged)
    results |= {
        "steps": config.train.num_steps if setup.method.learns else 0, "checkpoint": int(np.asarray(state.step)),
        "wall_s": round(time.perf_counter() - began, 1), "train_s": round(total("step_s"), 1), "rollout_s": round(total("rollout_s"), 1),
        "cost": {
            "trained_parameters": learning, "actor_calls": int(total("rollout_attempts")), "tokens": int(total("tokens") + total("rollout_tokens")),
            "seconds": round(total("step_s") + total("rollout_s"), 1),
        },
        "dropped": task.dropped,
    }  # fmt: skip
    files.write_json(workdir / "results.json", results)
    progress.line("\n" + summary(results, predictions[:3] if full else []))
    progress.line(f"\nEverything is in {workdir}")


def write_config(job, workdir, progress):
    """Writes config.json of a new run; of one that goes on with other settings, says which and puts them in, and sets old results aside."""
    import jax

    path, config = workdir / "config.json", plain(job.given)
    content, history = read_json(path), []
    if content is not None:
        changed = differences(with_newer_settings(content["config"]), config)
        if not changed:
            return
        progress.line("note: going on with other settings: " + ", ".join(f"{key}={new} (was {old})" for key, old, new in changed))
        if job.given.train.decay == "cosine" and any(key == "train.num_steps" for key, _, _ in changed):
            progress.line(f"note: the learning rate falls as over {job.given.train.num_steps} steps from here on")
        history = [*content.get("changes", []), {key: [old, new] for key, old, new in changed}]
        results = read_json(workdir / "results.json")
        if results is not None:
            for name in ("predictions.jsonl", "results.json"):  # in this order: until the results are aside, this is done again
                old = workdir / name
                if old.exists():
                    old.rename(old.with_stem(f"{old.stem}-{results['steps']}"))
            progress.line(f"note: the results after {results['steps']} steps are in {workdir}/results-{results['steps']}.json")
    devices = {
        "kind": jax.devices()[0].device_kind, "platform": jax.default_backend(), "count": jax.device_count(),
        **({"processes": processes.group.count} if processes.group.count > 1 else {}),
    }  # fmt: skip
    content = {
        "config": config, "resolved": plain(job.setup.config), "versions": versions(), "devices": devices, "data": job.sums,
        **({"changes": history} if history else {}),
    }  # fmt: skip
    files.write_json(path, content)


def keep_compiled():
    """Lets a later process take from disk what this one compiles, where the user has not said where such things go."""
    import jax

    from metatuner_jax import pretrained

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(pretrained.cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def score_before(passes, job, workdir):
    """Returns what the bare actor says to the test queries (see `evaluate.answer_before`), from the run folder where it is there."""
    from metatuner_jax import evaluate

    path, rows = workdir / "before.jsonl", job.rows["test"]
    lines = files.read_lines(path)
    if [line["id"] for line in lines] != [example.id for example in rows.examples]:
        lines = evaluate.answer_before(passes, rows, job.tokens, job.task.score)
        files.write_lines(path, lines)
    mean = sum(line["score"] for line in lines) / len(lines)
    passes.progress.line(f"before: {100 * mean:.1f}% of {len(lines)} test queries")
    return lines


def load_networks(setup, tokens, key, mesh):
    """Returns (the frozen weights, the tree that learns), on the mesh. Weights of one checkpoint are held once."""
    import jax
    import jax.numpy as jnp

    from metatuner_jax import generator, pretrained, sharding

    config, k = setup.config, setup.num_shared

    def load(name, dtype, cut):
        """Returns a model's weights, each put to where it shall live as soon as it is read."""

        def put(path, array):
            if path.startswith(("embed/", "head/")):
                array = array[: setup.actor.vocab_size]
            parts = (array[:k], array[k:]) if cut and path.startswith("layers/") else (array,)
            placed = tuple(sharding.place_one(path, part, mesh) for part in parts)
            return placed if len(parts) > 1 else placed[0]

        _, params = pretrained.load(name, dtype, put)
        if cut:
            half = lambda i: jax.tree.map(lambda halves: halves[i], params["layers"], is_leaf=lambda leaf: isinstance(leaf, tuple))
            params["layers"] = (half(0), half(1))
        return params

    same = config.generator.model == config.actor.model
    unused = setup.method.prompt == "initial" and not setup.method.learns_generator
    if unused:
        actor, frozen_generator = load(config.actor.model, config.dtype, cut=False), None
        learning = generator.init(setup, {}, key, actor)
    elif config.generator.train == "full":
        actor, frozen_generator = load(config.actor.model, config.dtype, cut=False), None
        learning = generator.init(setup, load(config.generator.model, "float32", cut=True), key, actor)
    else:
        actor = load(config.actor.model, config.dtype, cut=same)
        frozen_generator = actor if same else load(config.generator.model, config.dtype, cut=True)
        learning = generator.init(setup, frozen_generator, key, actor)
    allowed = sharding.place({"allowed": jnp.array(tokens.allowed)}, mesh)["allowed"]
    return generator.Frozen(frozen_generator, actor, allowed), learning


def introduce(progress, job):
    """Prints what is about to run, and what was dropped."""
    import jax

    setup, task, rows = job.setup, job.task, job.rows
    config = setup.config
    device = jax.devices()[0]
    progress.line(f"{config.method} on {task.name}, seed {config.seed}: {setup.method.summary}")
    progress.line(
        f"generator: {config.generator.model}, {setup.generator.num_layers} layers of {setup.generator.width}, {setup.num_shared} shared, "
        f"train={config.generator.train}; actor: {config.actor.model}, {setup.actor.num_layers} layers of {setup.actor.width}"
    )
    progress.line(f"device: {jax.device_count()} x {device.device_kind} ({jax.default_backend()}), {config.dtype}, mesh {dict(job.mesh.shape)}")
    progress.line("rows: " + ", ".join(f"{len(part)} {name}" for name, part in rows.items()) + f"; longest: {_lengths(job.lengths)}")
    for split, (queries, answers) in job.too_long.items():
        if queries or answers:
            done = "dropped" if config.data.too_long == "drop" else "cut"
            progress.line(
                f"note: {split}: {queries} queries above generator.max_query_tokens={config.generator.max_query_tokens} and {answers} answers "
                f"above actor.max_answer_tokens={config.actor.max_answer_tokens} were {done}"
            )
    for what, number in task.dropped.items():
        if number:
            progress.line(f"note: {number} rows dropped: {what.replace('_', ' ')}")


def _lengths(lengths):
    return f"{lengths.generator} tokens for the generator, {lengths.query} and {lengths.answer} in query and answer"


def _millions(frozen):
    import jax

    leaves = {id(leaf): leaf.size for leaf in jax.tree.leaves((frozen.generator, frozen.actor))}
    return f"{sum(leaves.values()) / 1e6:.1f}"


def summary(results, predictions) -> str:
    """Returns the closing table as text."""
    validation = f"{100 * results['validation']['mean']:.1f}% of {results['validation']['n']} validation rows"
    if "after" not in results:
        return f"{results['task']}, {results['method']}: {validation}"

    def row(name, score):
        low, high = score["ci95"]
        return f"  {name:<28}{100 * score['mean']:6.1f}%   [{100 * low:.1f}, {100 * high:.1f}]"

    n, prompts, energy, cost = results["after"]["n"], results["prompts"], results["mean_adapter_energy"], results["cost"]
    lines = [
        f"{results['task']}, {n} unseen test queries, {results['metric']}   [95% interval]",
        row("before", results["before"]), row("after", results["after"]),
        row("before, flexible scoring", results["before_flexible"]), row("after, flexible scoring", results["after_flexible"]),
        *(row(f"after, {part}", scores["after"]) for part, scores in results.get("parts", {}).items()),
        "with the query's own prompt, the adapter",
        *(row(name, score) for name, score in results["adapter"].items()),
        "with the query's own adapter, the prompt",
        *(row(name, score) for name, score in results["prompt"].items()),
        (
            f"prompts {'written' if methods.METHODS[results['method']].prompt == 'written' else 'used'}: {prompts['distinct']} distinct of {n}, {100 * prompts['share_initial']:.0f}% equal to the initial one, "
            f"{prompts['mean_tokens']:.1f} tokens on average"
        ),
        *([f"the mean adapter keeps {100 * energy:.0f}% of the mean delta's energy at its rank"] if energy is not None else []),
        (
            f"{results['steps']} steps in {results['train_s']:.0f} s, rollouts {results['rollout_s']:.0f} s, all {results['wall_s']:.0f} s; "
            f"{validation}"
        ),
        (
            f"cost: {cost['trained_parameters'] / 1e6:.2f} million trained parameters, {cost['actor_calls']} answers and "
            f"{cost['tokens']} tokens in training"
        ),
    ]  # fmt: skip
    for p in predictions:
        verdict = "right" if p["score"] == 1 else f"score {p['score']:g}, reference {_short(p['reference'])!r}"
        lines += ["", f"query:  {_short(p['query'])!r}", f"prompt: {_short(p['prompt'])!r}", f"answer: {_short(p['answer'])!r} ({verdict})"]
    return "\n".join(lines)


def _short(text, width=200):
    return text if len(text) <= width else text[: width - 3] + "..."


def results_of(workdir) -> str:
    """Returns the closing table of a finished run; raises Mistake where it is not what a run of ours wrote."""
    results = read_json(workdir / "results.json")
    try:
        return summary(results, files.read_lines(workdir / "predictions.jsonl")[:3])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Mistake(f"--workdir={workdir} has results that no run of ours wrote; give another --workdir") from None


def versions() -> dict:
    """Returns the versions of Python and of the packages that decide a result."""
    import importlib.metadata
    import platform

    import metatuner_jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "datasets", "numpy", "reasoning-gym")
    found = {"python": platform.python_version(), "metatuner_jax": metatuner_jax.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def read_json(path):
    """Returns the content of a JSON file of ours, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, RecursionError, OSError) as error:  # RecursionError: brackets without end
        raise Mistake(f"{path} cannot be read ({error}): give another --workdir") from None


if __name__ == "__main__":
    sys.exit(main())
