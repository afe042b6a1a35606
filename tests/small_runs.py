"""Small runs through the command line, for the tests of whole runs."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import uvicorn

from experiments import run
from metatuner_jax import config as config_lib
from metatuner_jax import transformer

WORDS = "zero one two three four five six seven eight nine reverse the list of words say in order question instruction".split()  # noqa: SIM905
SOAK = os.environ.get("SOAK") == "1"  # the full counts of what is otherwise a sample


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(root, workdir, *settings):
    """Returns the arguments of a small run; later settings win."""
    small = (
        "dtype=float32", "task.name=jsonl", f"task.train={root}/train.jsonl", f"task.validation={root}/validation.jsonl",
        f"task.test={root}/test.jsonl", "task.num_validation=8", "task.initial_prompt=reverse the list",
        f"generator.model={root}/model", "generator.max_prompt_tokens=8", f"actor.model={root}/model", "actor.max_answer_tokens=6",
        "hyper.hidden=5", "train.num_steps=4", "train.batch_size=4", "train.checkpoint_every=2", "train.sync_every=3", "train.diagnose_every=0",
        "rollout.every=2", "rollout.num_queries=4", "rollout.num_prompts=2", "eval.batch_size=8", "eval.num_mean=8",
        "eval.num_bootstrap=100",
    )  # fmt: skip
    assignments = [f"--config.{setting}" for setting in (*small, *settings)]
    return ["--config", str(root / "config.py"), "--workdir", str(workdir), *assignments]


def start(arguments):
    """Returns (exit code, what was printed) of a run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = run.main(arguments)
    return code, output.getvalue()


STRONG = ("eval.num_bootstrap=50", "hyper.scale=20", "train.learning_rate=0.02")  # for `command`: a LoRA that changes what is said


@contextlib.contextmanager
def served(app):
    """Yields the address at which a thread serves an ASGI application."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def own_logits(tuner, tokens, loras=None):
    """Returns the logits of a run's own actor, with a LoRA of all rows where one is given, numpy."""
    actor = tuner.frozen.actor
    stacks = actor["layers"] if isinstance(actor["layers"], tuple) else (actor["layers"],)
    layers = {name: {part: jnp.concatenate([stack[name][part] for stack in stacks]) for part in stacks[0][name]} for name in stacks[0]}
    return np.asarray(transformer.forward(tuner.setup.actor, {**actor, "layers": layers}, tokens, loras=jax.tree.map(jnp.asarray, loras)))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def child(arguments):
    """Yields the process of a run of its own."""
    command = [sys.executable, "-m", "experiments.run", *arguments]
    with killed_at_last(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)) as process:
        yield process


@contextlib.contextmanager
def killed_at_last(process):
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, condition, every_s=0.01):
    """Returns when condition() holds, while the process runs."""
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(every_s)


def assert_same(folder, whole):
    """Compares all that two runs have come to, bit for bit, but for how long it took."""
    lines = ([{k: v for k, v in line.items() if not k.endswith("_s")} for line in read_lines(at / "metrics.jsonl")] for at in (folder, whole))
    for here, there in zip(*lines, strict=True):
        assert here == there
    for name in ("before.jsonl", "experts.jsonl", "pairs.jsonl", "predictions.jsonl"):
        here, there = (path.read_text() if (path := at / name).exists() else None for at in (folder, whole))
        assert here == there, name
    here, there = (json.loads((at / "results.json").read_text()) for at in (folder, whole))
    for results in (here, there):
        for name in ("train_s", "rollout_s", "wall_s"):
            del results[name]
        del results["cost"]["seconds"]
    assert here == there
    last = max(int(path.name) for path in (whole / "checkpoints").iterdir())
    here, there = (load_state(at, last) for at in (folder, whole))
    assert jax.tree.structure(here) == jax.tree.structure(there)
    jax.tree.map(np.testing.assert_array_equal, here, there)


def assert_close(folder, alone):
    """Compares what a run by several devices has come to with one device's: the same texts, numbers but for rounding."""
    exact = ("step", "phase", "rollout_attempts", "rollout_changed", "tokens")
    near_of = lambda line: {name: line[name] for name in line if name.endswith(("loss", "norm"))}
    lines, others = (read_lines(at / "metrics.jsonl") for at in (folder, alone))
    assert len(lines) == len(others)
    for here, there in zip(lines, others):
        assert [here.get(name) for name in exact] == [there.get(name) for name in exact]
        assert near_of(here) == pytest.approx(near_of(there), rel=1e-4, abs=1e-6)
    for name in ("experts.jsonl", "predictions.jsonl", "before.jsonl"):
        here, there = ([{k: v for k, v in line.items() if k != "log_likelihood"} for line in read_lines(at / name)] for at in (folder, alone))
        assert here == there, name


def load_state(folder, step):
    """Returns the arrays of a checkpoint in numpy, on however many devices they were."""
    place = (folder / "checkpoints" / str(step) / "default").absolute()
    leaves = ocp.StandardCheckpointHandler().metadata(place).tree
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
    return ocp.PyTreeCheckpointer().restore(place, args=ocp.args.PyTreeRestore(restore_args=how))


def snapshot(folder):
    """Returns the content and time of everything in a folder; of a link, where it leads."""

    def content(path):
        return os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {str(path): (path.lstat().st_mtime_ns, content(path)) for path in sorted(folder.rglob("*"))}


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'single' <b>"


def write_run(folder, seed=0, count=6, phases=("joint",), **settings):
    """Writes the folder of a finished run by hand, with texts that would break a careless page. Returns its results."""
    rng = np.random.default_rng(seed)
    tree = config_lib.plain(config_lib.make(method="metatuner_j", seed=seed, **settings))
    folder.mkdir(parents=True)
    scores = [float(one) for one in rng.integers(0, 2, count)]
    interval = lambda mean: {"mean": mean, "ci95": [max(mean - 0.21, 0), min(mean + 0.13, 1)], "n": count}
    own = interval(float(np.mean(scores)))
    results = {
        "task": "jsonl", "method": "metatuner_j", "seed": seed, "metric": "exact_match", "validation": {"mean": 0.25, "log_likelihood": -1.0, "n": 8},
        "before": interval(0.123), "after": own, "before_flexible": interval(0.156), "after_flexible": interval(0.789),
        "adapter": {"own": own, "shuffled": interval(0.432), "mean": interval(0.345), "none": interval(0.111)},
        "prompt": {"own": own, "shuffled": interval(0.222), "initial": interval(0.333)},
        "gains": {
            "before": {"mean": 0.3, "ci95": [0.1, 0.5], "n": count},
            "adapter": {name: {"mean": gain, "ci95": [gain - 0.05, gain + 0.05], "n": count} for name, gain in (("shuffled", 0.07), ("mean", 0.01), ("none", 0.38))},
            "prompt": {"shuffled": {"mean": 0.0, "ci95": [0.0, 0.0], "n": count}, "initial": {"mean": -0.2, "ci95": [-0.3, -0.1], "n": count}},
        },
        "prompts": {"distinct": 3, "share_initial": 0.5, "mean_tokens": 4.5}, "mean_adapter_energy": 0.9, "scores": {f"test-{i}": one for i, one in enumerate(scores)},
        "delta_norms": {"q": [0.5, 1.25, 2.0], "v": [0.0, 3.5, 1.0]}, "delta_norms_spread": {"q": [0.1, 0.2, 0.3], "v": [0.0, 0.4, 0.5]},
        "steps": 4, "checkpoint": 4, "wall_s": 321.0, "train_s": 200.0, "rollout_s": 30.0,
        "cost": {"trained_parameters": 1234567, "actor_calls": 4321, "tokens": 98765, "seconds": 230.0}, "dropped": {},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({
        "config": tree, "resolved": {"dtype": "float32"}, "versions": {"python": "3.11", "jax": "0.10"}, "devices": {"kind": "cpu", "platform": "cpu", "count": 1},
        "data": {"test": "the same rows"}, "initial_prompts": {"": "say it"},
    }))  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    steps = [(phase, step) for step, phase in enumerate(phase for phase in phases for _ in range(4))]
    write_rows(folder / "metrics.jsonl", [
        {"step": step, "phase": phase, "loss": 2.0 / (step + 1), "task_loss": 1.5 / (step + 1), "prompt_loss": 0.5, "delta_norm": 0.1 * step, "delta_variance": 0.02, "tokens_per_s": 100.0,
         "expert_size": step, "expert_score": 0.25, **({"validation": {"mean": 0.25, "log_likelihood": -1.0, "n": 8}} if step % 4 == 3 else {})}
        for phase, step in steps
    ])  # fmt: skip
    write_rows(folder / "experts.jsonl", [{"step": 0, "id": f"train-{i}", "prompt": "say it", "answer": "a", "score": i % 2, "best": i < 2} for i in range(4)])
    texts = [f"reverse {i} {HOSTILE}" for i in range(count)]
    write_rows(folder / "predictions.jsonl", [
        {"id": f"test-{i}", "query": text, "prompt": "say it" if i % 2 else HOSTILE, "answer": f"answer {i} of seed {seed} {HOSTILE}", "reference": f"{i} reverse", "score": scores[i], "flexible": 1.0}
        for i, text in enumerate(texts)
    ])  # fmt: skip
    write_rows(folder / "before.jsonl", [{"id": f"test-{i}", "answer": "no", "score": float(i == 0), "flexible": 0.0} for i in range(count)])
    return results


def assert_one_line(error, *texts):
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    for text in texts:
        assert text in error
