"""Small runs through the command line, for the tests of whole runs."""

import contextlib
import io
import json

import orbax.checkpoint as ocp

from experiments import run


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


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_state(folder, step):
    return ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step) / "default")
