"""What goes wrong on a machine costs no more than what was done since the newest good checkpoint."""

import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import command, load_state, read_lines, start

from metatuner_jax import evaluate, losses

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """The folders of a run that is whole and of the same one stopped before its evaluation, with the checkpoints 2 and 4."""
    whole, stopped = (tmp_path_factory.mktemp(name) / "run" for name in ("whole", "stopped"))
    assert start(command(root, whole))[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        plain = evaluate.evaluate
        patch.setattr(evaluate, "evaluate", lambda *args: (signal.raise_signal(signal.SIGTERM), plain(*args)))
        assert start(command(root, stopped))[0] == 143
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["2", "4"]
    return whole, stopped


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit flipped": flip,
    "a file cut short": lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:-100]),
    "no metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "no arrays": lambda folder: shutil.rmtree(folder / "default"),
    "no sums": lambda folder: (folder.parent.parent / "checkpoint_sums" / "4.json").unlink(),
    "sums cut short": lambda folder: (folder.parent.parent / "checkpoint_sums" / "4.json").write_text('{"a": '),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_goes_on(damage, runs, root, tmp_path):
    whole, stopped = runs
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    DAMAGES[damage](folder / "checkpoints" / "4")
    code, output = start(command(root, folder))
    assert code == 0 and "resuming at step 2 of 4" in output
    assert f"note: the checkpoint of step 4 is no good and was moved to {folder}/bad_checkpoints/4: " in output
    assert (folder / "bad_checkpoints" / "4").is_dir()
    assert (folder / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    jax.tree.map(np.testing.assert_array_equal, load_state(folder, 4), load_state(whole, 4))


def test_where_no_checkpoint_is_good_the_run_begins_again(runs, root, tmp_path):
    whole, stopped = runs
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for step in ("2", "4"):
        flip(folder / "checkpoints" / step)
    code, output = start(command(root, folder))
    assert code == 0 and output.count(" is no good and was moved to ") == 2 and "resuming" not in output
    assert (folder / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def test_checkpoints_of_a_version_without_sums_are_taken_as_they_are(runs, root, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    shutil.rmtree(folder / "checkpoint_sums")
    code, output = start(command(root, folder))
    assert code == 0 and "resuming at step 4 of 4" in output and not (folder / "bad_checkpoints").exists()


def test_a_folder_in_use_is_refused(runs, root, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        code, _ = start(command(root, folder))
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert code == 2
    assert capfd.readouterr().err == f"error: --workdir={folder} is in use by a run that has not ended: wait for it, or give another --workdir\n"
    assert start(command(root, folder))[0] == 0


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(root, tmp_path):
    """The limit of a file's size stands for the disk's: what is written meets an error of the operating system."""
    folder = tmp_path / "run"
    settings = ("train.num_steps=400", "train.checkpoint_every=40", "rollout.every=0", "hyper.hidden=40", "eval.report=validation")
    arguments = command(root, folder, *settings)
    child = subprocess.Popen([sys.executable, "-m", "experiments.run", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint_sums" / "40.json").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    _, error = child.communicate(timeout=120)
    assert child.returncode == 1 and error.splitlines()[-1].startswith("failed: ")
    good = [int(path.stem) for path in (folder / "checkpoint_sums").iterdir()]
    assert good and max(good) < 400
    code, output = start(arguments)
    assert code == 0 and f"resuming at step {max(good)} of 400" in output


def test_steps_that_are_not_finite_stop_the_run_which_names_them_and_their_rows(root, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"

    def loss(setup, params, copy, frozen, batch, key, step=0, plain=losses.joint_loss, **more):
        value, metrics = plain(setup, params, copy, frozen, batch, key, step, **more)
        return jnp.where((step == 1) | (step > 2), jnp.nan, value), metrics

    monkeypatch.setattr(losses, "joint_loss", loss)
    code, _ = start(command(root, folder, "train.num_steps=20", "train.max_bad_steps=3", "rollout.every=0", "train.checkpoint_every=20"))
    lines = read_lines(folder / "metrics.jsonl")
    assert code == 1 and [line["bad_steps"] for line in lines] == [0, 1, 0, 1, 2, 3]
    said = capfd.readouterr().err
    assert said.startswith("failed: steps 3 to 5 had a loss or gradient that is not finite and were not applied (metrics.jsonl has their rows' ids)")
    bad = [line for line in lines if line["bad_steps"]]

    assert all(len(line["ids"]) == 4 for line in bad) and not any("ids" in line for line in lines if not line["bad_steps"])


KILLS = int(os.environ.get("KILLS", "3"))  # as many as the time allows


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(root, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    steps, seed = 40 + 60 * KILLS, time.time_ns()
    settings = (f"train.num_steps={steps}", "train.checkpoint_every=4", "rollout.every=8", "hyper.hidden=64")
    assert start(command(root, whole, *settings))[0] == 0
    rng, sums = random.Random(seed), lambda: {path.name for path in (folder / "checkpoint_sums").glob("*.json")}
    print(f"seed {seed}")
    for _ in range(KILLS):
        before, deadline = sums(), time.monotonic() + 120
        arguments = [sys.executable, "-m", "experiments.run", *command(root, folder, *settings)]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            while not sums() - before:  # so that it gets on
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            child.kill()
        assert child.returncode == -signal.SIGKILL
    code, output = start(command(root, folder, *settings))
    assert code == 0 and "resuming at step" in output
    metrics, expected = (
        [[line[name] for name in ("step", "loss", "grad_norm", "delta_norm")] for line in read_lines(at / "metrics.jsonl")] for at in (folder, whole)
    )
    assert metrics == expected
    for name in ("before.jsonl", "experts.jsonl", "predictions.jsonl"):
        assert (folder / name).read_text() == (whole / name).read_text()
    jax.tree.map(np.testing.assert_array_equal, load_state(folder, steps), load_state(whole, steps))
