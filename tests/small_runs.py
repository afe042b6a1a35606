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


def assert_one_line(error, *texts):
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    for text in texts:
        assert text in error
