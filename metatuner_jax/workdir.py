"""A run's folder: whose it is, what its config.json says, that one run at a time holds it, and the table of its results."""

import contextlib
import fcntl
import os
import secrets
import time

from metatuner_jax import config as config_lib
from metatuner_jax import files, methods, processes, tasks

NOT_SHARED = "--workdir={workdir} is not the same folder for all processes: name one that all of them see, such as a network file system's"


@contextlib.contextmanager
def held(workdir):
    """Holds a run folder, made where it is not there, for this run alone.

    Of several processes the first one does, and the others look whether it is the same folder. Raises ValueError where it is not, or another run
    holds it.
    """
    if processes.group.index:
        mark = processes.group.gather(None)[0]
        deadline = time.monotonic() + 30  # in which a network file system shows what another machine wrote
        while not (workdir / "lock").exists() or (workdir / "lock").read_text(encoding="utf-8") != mark:
            if time.monotonic() > deadline:
                raise ValueError(NOT_SHARED.format(workdir=workdir))
            time.sleep(0.1)
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be written to ({error.strerror}); give another --workdir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--workdir={workdir} is in use by a run that has not ended: wait for it, or give another --workdir") from None
        if processes.group.count > 1:
            mark = secrets.token_hex()
            file.truncate(0)
            file.write(mark)
            file.flush()
            processes.group.gather(mark)
        yield


def check_workdir(config, workdir, goes_on=False):
    """Returns the content of the folder's config.json, None where there is none; raises ValueError where the folder is not this run's.

    Args:
      goes_on: whether it may have been begun with other settings of those that a run may go on with.
    """
    try:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    except OSError as error:  # a name that is too long
        raise ValueError(f"--workdir={config_lib.short(workdir)}: {error.strerror}; give another --workdir") from None
    if not existing.is_dir():
        raise ValueError(f"--workdir={workdir}: {existing} is a file: name a folder")
    saved = files.read_json(workdir / "config.json")
    if saved is not None:
        if not is_ours(saved):
            raise ValueError(f"--workdir={workdir} has a config.json that no run of ours wrote; give another --workdir")
        changed = differences(with_newer_settings(saved["config"]), config_lib.plain(config))
        texts = [f"{key}={a} there, {b} here" for key, a, b in changed if not (goes_on and config_lib.may_change(config.method, key, a, b))]
        if texts:
            raise ValueError(f"--workdir={workdir} holds another run: {'; '.join(texts[:4])}; give another --workdir")
        if (workdir / "results.json").exists():
            return saved
    for name in ("checkpoints", "before.jsonl", "metrics.jsonl", "experts.jsonl", "pairs.jsonl", "predictions.jsonl", "results.json"):
        if saved is None and (workdir / name).exists():
            raise ValueError(f"--workdir={workdir} holds {name} and no config.json: it is not a run of ours; give another --workdir")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--workdir={workdir}: {existing} cannot be written to; give another --workdir")
    return saved


def read_config(workdir, option: str = "--workdir") -> config_lib.Config:
    """Returns the config of the run in a folder that an option names; raises ValueError where there is none of ours."""
    saved = files.read_json(workdir / "config.json", f"give another {option}")
    if saved is None or not is_ours(saved):
        raise ValueError(f"{option}={workdir} holds no run: name the folder of one, such as runs/quickstart")
    return config_lib.from_tree(with_newer_settings(saved["config"]))


def is_ours(saved):
    """Returns whether the content of a config.json is laid out as a run writes it."""
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        return False
    resolved, data = (saved.get(name, {}) for name in ("resolved", "data"))  # which early versions did not write
    sections = [name for name, leaf in config_lib.plain(config_lib.Config()).items() if isinstance(leaf, dict)]
    return (
        isinstance(data, dict) and isinstance(resolved, dict) and resolved.get("dtype") in (None, "bfloat16", "float32")
        and all(isinstance(saved["config"].get(name, {}), dict) for name in sections) and "train" in saved["config"]
    )  # fmt: skip


def with_newer_settings(saved):
    """Returns a saved config with the settings that its version did not know, at their defaults, with which things are as they were."""
    default = config_lib.plain(config_lib.Config())
    sections = {name: leaves for name, leaves in saved.items() if isinstance(leaves, dict) and isinstance(default.get(name), dict)}
    found = {**default, **saved, **{name: {**default[name], **leaves} for name, leaves in sections.items()}}
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


def write_config(job, workdir, progress):
    """Writes config.json of a new run; of one that goes on with other settings, says which and puts them in, and sets old results aside."""
    import jax

    path, config = workdir / "config.json", config_lib.plain(job.given)
    content, history = files.read_json(path), []
    started = {} if job.start is None else {"started_from": {"workdir": str(job.start.folder), "step": job.start.step}}
    if content is not None:
        earlier = {name: content[name] for name in ("started_from",) if name in content}
        started = started or earlier
        changed = differences(with_newer_settings(content["config"]), config)
        if not changed and started == earlier:
            return
        history = content.get("changes", [])
        if changed:
            set_aside(workdir, job, changed, progress)
            history = [*history, {key: [old, new] for key, old, new in changed}]
    devices = {
        "kind": jax.devices()[0].device_kind, "platform": jax.default_backend(), "count": jax.device_count(),
        **({"processes": processes.group.count} if processes.group.count > 1 else {}),
    }  # fmt: skip
    examples = [example for part in job.rows.values() for example in part.examples]
    initial_prompts = tasks.initial_prompts(examples, job.given.task.initial_prompt or job.task.initial_prompt)
    content = {
        "config": config, "resolved": config_lib.plain(job.setup.config), "versions": versions(), "devices": devices, "data": job.sums,
        "initial_prompts": initial_prompts,
        **started,
        **({"changes": history} if history else {}),
    }  # fmt: skip
    files.write_json(path, content)


def set_aside(workdir, job, changed, progress):
    """Says with which other settings, as `differences` gives them, a run goes on; results that are there are kept beside those to come."""
    progress.line("note: going on with other settings: " + ", ".join(f"{key}={new} (was {old})" for key, old, new in changed))
    if job.given.train.decay != "constant" and any(key == "train.num_steps" for key, _, _ in changed):
        progress.line(f"note: the learning rate falls as over {job.given.train.num_steps} steps from here on")
    results = files.read_json(workdir / "results.json")
    if results is not None:
        for name in ("predictions.jsonl", "report.html", "results.json"):  # in this order: until the results are aside, this is done again
            old = workdir / name
            if old.exists():
                old.rename(old.with_stem(f"{old.stem}-{results['steps']}"))
        progress.line(f"note: the results after {results['steps']} steps are in {workdir}/results-{results['steps']}.json")


def versions() -> dict:
    """Returns the versions of Python and of the packages that decide a result."""
    import importlib.metadata
    import platform

    import metatuner_jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "datasets", "numpy", "reasoning-gym")
    found: dict[str, str | None] = {"python": platform.python_version(), "metatuner_jax": metatuner_jax.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# --- results ---


def summary(results, predictions) -> str:
    """Returns the closing table as text."""
    validation = f"{100 * results['validation']['mean']:.1f}% of {results['validation']['n']} validation rows"
    if "after" not in results:
        return f"{results['task']}, {results['method']}: {validation}"

    row, n, prompts, energy, cost = score_line, results["after"]["n"], results["prompts"], results["mean_adapter_energy"], results["cost"]
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


def score_line(name: str, score: dict) -> str:
    """Returns a line of the table, of a score {mean, ci95, n}."""
    low, high = score["ci95"]
    return f"  {name:<28}{100 * score['mean']:6.1f}%   [{100 * low:.1f}, {100 * high:.1f}]"


def _short(text, width=200):
    return text if len(text) <= width else text[: width - 3] + "..."


def results_of(workdir) -> str:
    """Returns the closing table of a finished run; raises ValueError where it is not what a run of ours wrote."""
    results = files.read_json(workdir / "results.json")
    try:
        return summary(results, files.read_lines(workdir / "predictions.jsonl")[:3])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"--workdir={workdir} has results that no run of ours wrote; give another --workdir") from None
