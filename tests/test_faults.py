"""What goes wrong on a machine costs no more than what was done since the newest good checkpoint."""

import asyncio
import collections
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import SOAK, assert_same, child, command, read_lines, start, wait_for

from metatuner_jax import actor, checkpoint, evaluate, losses

pytestmark = pytest.mark.usefixtures("compiled")
KILLS = int(os.environ.get("KILLS", "2"))  # as many as the time allows
STEPS = 40 + 40 * KILLS
LONG = (f"train.num_steps={STEPS}", "train.checkpoint_every=8", "rollout.every=3", "hyper.hidden=64")


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
def test_every_damage_to_a_checkpoint_is_seen(damage, runs, tmp_path):
    for name in ("checkpoints", "checkpoint_sums"):
        shutil.copytree(runs[1] / name, tmp_path / name)
    assert checkpoint.problems(tmp_path / "checkpoints") == {2: None, 4: None}
    DAMAGES[damage](tmp_path / "checkpoints" / "4")
    found = checkpoint.problems(tmp_path / "checkpoints")
    assert found[2] is None and found[4]


@pytest.mark.parametrize("damage", DAMAGES if SOAK else ("no metadata",))
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_goes_on(damage, runs, root, tmp_path):
    whole, stopped = runs
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    DAMAGES[damage](folder / "checkpoints" / "4")
    code, output = start(command(root, folder))
    assert code == 0 and "resuming at step 2 of 4" in output
    assert f"note: the checkpoint of step 4 is no good and was moved to {folder}/bad_checkpoints/4: " in output
    assert (folder / "bad_checkpoints" / "4").is_dir()
    assert_same(folder, whole)


def test_where_no_checkpoint_is_good_the_run_begins_again(runs, root, tmp_path):
    whole, stopped = runs
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for step in ("2", "4"):
        flip(folder / "checkpoints" / step)
    code, output = start(command(root, folder))
    assert code == 0 and output.count(" is no good and was moved to ") == 2 and "resuming" not in output
    assert_same(folder, whole)


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


@pytest.fixture(scope="module")
def six_steps(root, tmp_path_factory):
    """The settings and the folder of a run of six steps with a constant rate."""
    settings, folder = ("train.decay=constant", "train.num_steps=6"), tmp_path_factory.mktemp("six") / "run"
    assert start(command(root, folder, *settings))[0] == 0
    return settings, folder


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_may_be_given_more_steps(stopped, six_steps, root, tmp_path):
    """With a constant rate, as many steps in two runs as in one come to the same."""
    (*constant, _), folder, (more, whole) = six_steps[0], tmp_path / "run", six_steps
    with pytest.MonkeyPatch.context() as patch:
        if stopped:
            plain = evaluate.evaluate
            patch.setattr(evaluate, "evaluate", lambda *args: (signal.raise_signal(signal.SIGTERM), plain(*args)))
        assert start(command(root, folder, *constant))[0] == (143 if stopped else 0)
    earlier = None if stopped else (folder / "results.json").read_text()
    (folder / "report.html").write_text("of 4 steps")
    code, output = start(command(root, folder, *more))
    assert code == 0 and "note: going on with other settings: train.num_steps=6 (was 4)" in output and "resuming at step 4 of 6" in output
    assert_same(folder, whole)
    assert json.loads((folder / "config.json").read_text())["changes"] == [{"train.num_steps": [4, 6]}]
    if not stopped:
        assert (folder / "results-4.json").read_text() == earlier and (folder / "predictions-4.jsonl").exists()
        assert (folder / "report-4.html").read_text() == "of 4 steps"
        assert f"the results after 4 steps are in {folder}/results-4.json" in output


def test_a_run_goes_on_with_settings_that_do_not_matter_and_says_which(runs, root, tmp_path, capfd):
    whole, folder = runs[0], tmp_path / "run"
    shutil.copytree(runs[1], folder)
    changes = ("train.keep_checkpoints=3", "train.checkpoint_every=3", "train.remat=all", "eval.num_bootstrap=50", "eval.batch_size=4")
    code, output = start(command(root, folder, *changes))
    assert code == 0 and "resuming at step 4 of 4" in output
    for text in ("train.keep_checkpoints=3 (was 2)", "train.checkpoint_every=3 (was 2)", "train.remat=all (was products)"):
        assert text in output
    assert (folder / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    assert start(command(root, folder, *changes, "train.num_steps=3"))[0] == 2
    assert "train.num_steps=4 there, 3 here; give another" in capfd.readouterr().err
    assert start(command(root, folder, *changes, "seed=1"))[0] == 2


def test_a_checkpoint_is_whole_without_another_step(tmp_path):
    """Rollouts, which may take long, come right after one where both are due."""
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"step": jnp.int32(1)}, 0.0)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoint_sums" / "1.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert checkpoint.problem(tmp_path / "checkpoints", 1) is None
    checkpoints.close()


def test_as_many_checkpoints_are_kept_as_asked_for_and_the_best(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=3)
    for step, validation in enumerate((0.1, 0.5, 0.2, 0.3, 0.1, 0.2)):
        checkpoints.save(step, {"step": jnp.int32(step)}, validation)
    checkpoints.close()
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [1, 3, 4, 5]
    assert sorted(path.stem for path in (tmp_path / "checkpoint_sums").iterdir()) == ["1", "3", "4", "5"]


def test_a_line_of_the_log_stands_for_the_steps_since_the_one_before(root, tmp_path):
    every, folder = tmp_path / "every", tmp_path / "run"
    settings = ("train.num_steps=7", "train.checkpoint_every=5", "rollout.every=0", "eval.report=validation")
    for at, more in ((every, ()), (folder, ("train.log_every=3",))):
        assert start(command(root, at, *settings, *more))[0] == 0
    lines, others = read_lines(folder / "metrics.jsonl"), read_lines(every / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5, 6] and [line.get("steps", 1) for line in lines] == [3, 2, 1, 1]
    assert [line["loss"] for line in lines] == [others[line["step"]]["loss"] for line in lines]
    assert lines[0]["tokens"] == pytest.approx(np.mean([line["tokens"] for line in others[:3]]), rel=1e-5)
    tokens = [json.loads((at / "results.json").read_text())["cost"]["tokens"] for at in (folder, every)]
    assert tokens[0] == pytest.approx(tokens[1], abs=2)


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


PHASES = ("steps", "rollouts", "evaluation", "checkpoint")


def phase_of(log):
    """Returns what a run does or did, by its log: 'checkpoint' while one is not whole."""
    written, whole = (re.findall(rf"checkpoint (\d+) is {what}", log) for what in ("being written", "whole"))
    return "checkpoint" if written and written[-1] not in whole else re.findall(r"now: (\w+)", log)[-1]


@pytest.mark.parametrize(("module", "name", "doing", "ways"), [
    (losses, "delta_metrics", "steps", "raise train.accumulate=1 to 2, set train.remat=all in the place of products, lower train.batch_size=4, set weights=int8, "),
    (actor, "begin", "evaluation", "lower eval.batch_size=8, lower actor.max_answer_tokens=6, set weights=int8, "),
])  # fmt: skip
def test_where_the_memory_does_not_suffice_the_options_are_named(module, name, doing, ways, root, tmp_path, monkeypatch, capfd):
    plain = getattr(module, name)

    def too_large(*args, **how):
        size = jnp.sort(jnp.arange(2**45) + args[0].end_id)[3]  # no compiler does without it, and no machine has it
        return jax.tree.map(lambda leaf: leaf + size.astype(leaf.dtype), plain(*args, **how))

    monkeypatch.setattr(module, name, too_large)
    assert start(command(root, tmp_path / "run"))[0] == 1
    error = capfd.readouterr().err
    assert error.startswith(f"failed: the memory does not suffice for the {doing}, for want of 131072.00 GiB more: {ways}") and error.count("\n") == 1
    assert "set generator.train=lora" not in error and error.endswith("split the weights over more devices with mesh.fsdp, take smaller models; --plan says what a run takes\n")


def test_a_run_killed_in_every_phase_ends_as_if_it_had_not_been(root, tmp_path):
    """At random moments, of which a fifth at least lie in each phase, and none before the first checkpoint of the process."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    seed, killed = time.time_ns(), collections.Counter()
    assert start(command(root, whole, *LONG))[0] == 0
    rng, log = random.Random(seed), folder / "run.log"
    print(f"seed {seed}")
    while killed.total() < KILLS or min(killed[phase] for phase in PHASES) < KILLS // 5:
        wanted = min(PHASES, key=lambda phase: (killed[phase], rng.random()))
        begin = log.stat().st_size if log.exists() else 0
        said = lambda begin=begin: log.read_text()[begin:] if log.exists() else ""
        with child(command(root, folder, *LONG)) as process:
            wait_for(process, lambda: " is whole" in said())
            time.sleep(rng.uniform(0, 0.2))
            wait_for(process, lambda: phase_of(said()) == wanted, every_s=0.001)
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        killed[phase_of(said())] += 1
    print(f"killed {killed.total()} times: {dict(killed)}")
    code, output = start(command(root, folder, *LONG))
    assert code == 0 and "resuming at step" in output
    assert_same(folder, whole)


def test_only_traces_of_late_writes_are_kept_quiet(monkeypatch):
    class Thing:
        pass

    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(str(unraisable.exc_value)))
    checkpoint._hush()
    checkpoint._hush()
    loop = asyncio.new_event_loop()
    loop.close()
    for callback in (loop.call_soon_threadsafe, lambda _: loop.run_until_complete(None), lambda _: 1 / 0):
        thing = Thing()
        reference = weakref.ref(thing, callback)  # what it raises has nobody to go to
        del thing, reference
    assert said == ["Event loop is closed", "division by zero"]


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(root, tmp_path):
    """The limit of a file's size stands for the disk's: what is written meets an error of the operating system."""
    folder = tmp_path / "run"
    arguments = command(root, folder, *LONG, "rollout.every=0", "eval.report=validation")
    with child(arguments) as process:
        wait_for(process, (folder / "checkpoint_sums" / "40.json").exists)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in error and "RuntimeWarning" not in error, error
    assert len(re.findall(r"^failed: the checkpoint of step \d+ could not be written: File too large; those before it are kept$", error, re.MULTILINE)) == 1, error
    good = [int(path.stem) for path in (folder / "checkpoint_sums").iterdir()]
    assert good and max(good) < STEPS
    code, output = start(arguments)
    assert code == 0 and f"resuming at step {max(good)} of {STEPS}" in output
