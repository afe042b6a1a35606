"""Several processes do one run together: the same losses as one, and none goes on without the others."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from small_runs import SOAK, assert_close, assert_same, command, killed_at_last, read_lines, start

pytestmark = pytest.mark.usefixtures("compiled")
SETTINGS = ("train.num_steps=8", "rollout.every=4")
END_S = 30  # in which the others end when one is gone
WITH_FAULT = """
import os, resource, signal, sys
from experiments import run
from metatuner_jax import checkpoint, job
die = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
save = checkpoint.Checkpoints.save
{}
sys.exit(run.main())
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def together(count, arguments, slurm=False, second=None, fault=None):
    """Yields the processes of one run, which are told of each other by options, or find each other as on Slurm.

    Args:
      second: the arguments of process 1, where they are others.
      fault: code that process 1 does first.
    """
    port = free_port()

    def begun(i):
        words = second if second and i == 1 else arguments
        if slurm:
            found = {"JOB_ID": port, "STEP_NODELIST": "localhost", "STEP_NUM_NODES": 1, "NTASKS": count, "PROCID": i, "LOCALID": i}
            options = []
        else:
            options, found = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(count), "--process_id", str(i)], {}
        # Process 0 leaves what it compiles to those that go on.
        environment = {f"SLURM_{name}": str(value) for name, value in found.items()} | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        program = ["-c", WITH_FAULT.format(fault)] if fault and i == 1 else ["-m", "experiments.run"]
        return subprocess.Popen(
            [sys.executable, *program, *words, *options], env={**os.environ, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(killed_at_last(begun(i))) for i in range(count)]


def outcome(process):
    """Returns (exit code, output, errors) of a process once it has ended."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """The folder of the same run by one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert start(command(root, folder, *SETTINGS))[0] == 0
    return folder


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """made(count) -> the folder of the same run by several processes, and what came of each of them."""

    @functools.cache
    def made(count):
        folder = tmp_path_factory.mktemp("whole") / "run"
        with together(count, command(root, folder, *SETTINGS)) as processes:
            return folder, [outcome(process) for process in processes]

    return made


@pytest.mark.parametrize("count", (2, 4) if SOAK else (2,))
def test_several_processes_give_the_losses_prompts_and_answers_of_one(count, whole, alone):
    folder, outcomes = whole(count)
    assert [code for code, _, _ in outcomes] == [0] * count, outcomes[-1]
    assert_close(folder, alone)
    assert f"device: {count} x " in outcomes[0][1] and "Everything is in" in outcomes[0][1]
    for _, output, _ in outcomes[1:]:
        assert "training" not in output and "Everything" not in output  # one says what is done
    assert len({path.name for path in (folder / "checkpoint_sums").iterdir()}) == 2


@pytest.mark.parametrize("dies", (0, 1) if SOAK else (0,))
def test_when_a_process_dies_the_others_end_and_a_restart_goes_on(dies, whole, root, tmp_path):
    folder = tmp_path / "run"
    with together(2, command(root, folder, *SETTINGS)) as processes:
        deadline = time.monotonic() + 240
        while not (folder / "checkpoint_sums" / "4.json").exists():
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[dies].send_signal(signal.SIGKILL)
        died = time.monotonic()
        code, _, errors = outcome(processes[1 - dies])
        assert time.monotonic() - died < END_S
    assert code == 1, errors
    assert errors.splitlines()[-1] == f"failed: process {dies} has died; the same command, in all processes, goes on from what is saved"
    with together(2, command(root, folder, *SETTINGS)) as processes:
        outcomes = [outcome(process) for process in processes]
    assert [code for code, _, _ in outcomes] == [0, 0] and "resuming at step" in outcomes[0][1], outcomes
    assert_same(folder, whole(2)[0])


SAVING = """
def fault(checkpoints, step, *args):
    {before}
    save(checkpoints, step, *args)
    {after}
checkpoint.Checkpoints.save = fault
"""
FAULTS = {  # what process 1 does, what the other one says of it, and the checkpoint from which all go on
    "dies before it has read the data": ("job.prepare = die", "process 1 has died", None),
    "dies while a checkpoint is written": (SAVING.format(before="", after="step > 2 and die()"), "process 1 has died", (2, 4)),
    "has a full disk": (
        SAVING.format(before="step > 2 and resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))", after=""),
        "process 1 has failed: the checkpoint of step 4 could not be written: File too large", (2,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS if SOAK else list(FAULTS)[:1])
def test_whenever_a_process_fails_the_other_ends_and_a_restart_goes_on(fault, root, tmp_path):
    code, text, steps = FAULTS[fault]
    folder, arguments = tmp_path / "run", command(root, tmp_path / "run", *SETTINGS, "mesh.data=1", "mesh.fsdp=2", "hyper.hidden=40")
    with together(2, arguments, fault=code) as processes:
        one = outcome(processes[1])
        failed = time.monotonic()
        code, _, errors = outcome(processes[0])
        assert time.monotonic() - failed < END_S
    assert code == 1 and errors.splitlines()[-1].startswith(f"failed: {text}"), (errors, one)
    if steps is None:
        assert not folder.exists()
        return
    with together(2, arguments) as processes:
        outcomes = [outcome(process) for process in processes]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert any(f"resuming at step {step} of 8" in outcomes[0][1] for step in steps), outcomes[0][1]


def test_a_signal_to_one_stops_all_and_a_mistake_of_one_ends_all(root, tmp_path):
    folder = tmp_path / "run"
    with together(2, command(root, folder, "train.num_steps=100000", "train.checkpoint_every=100000", "rollout.every=0"), slurm=True) as processes:
        deadline = time.monotonic() + 240
        while not (folder / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        outcomes = [outcome(process) for process in processes]
    assert [code for code, _, _ in outcomes] == [143, 143]
    (step,) = [path.name for path in (folder / "checkpoints").iterdir()]
    assert all(f"stopped by SIGTERM: {folder}/checkpoints/{step} has all that was trained" in errors for _, _, errors in outcomes)
    assert len(read_lines(folder / "metrics.jsonl")) == int(step)

    with together(2, command(root, tmp_path / "other", "train.batch_size=3")) as processes:
        outcomes = [outcome(process) for process in processes]
    assert [code for code, _, _ in outcomes] == [2, 2] and not (tmp_path / "other").exists()
    for _, _, errors in outcomes:
        assert errors.splitlines()[-1].startswith(("error: ", "ended: process "))
        assert "train.batch_size=3 must be a multiple of mesh.data * mesh.fsdp = 2" in errors


STAGES = {  # what one process does otherwise, and what all of them come to
    "a setting of its own": (("train.clip_norm=2",), "process 1 differs from process 0 in config: give all the same files, settings and versions", 2),
    "a workdir of its own": (("--workdir=other",), "is not the same folder for all processes: name one that all of them see", 2),
}


@pytest.mark.parametrize("stage", STAGES if SOAK else list(STAGES)[:1])
def test_a_process_that_is_not_like_the_others_ends_all(stage, root, tmp_path):
    (own,), text, code = STAGES[stage]
    arguments = command(root, tmp_path / "run", *SETTINGS)
    others = ["--workdir", str(tmp_path / "other")] if own.startswith("--") else ["--workdir", str(tmp_path / "run"), f"--config.{own}"]
    with together(2, arguments, second=[*arguments[:2], *others, *arguments[4:]]) as processes:
        outcomes = [outcome(process) for process in processes]
    assert [code for code, _, _ in outcomes] == [code, code], outcomes
    assert all(text in errors.splitlines()[-1] for _, _, errors in outcomes)


ALONE = """
import os, signal, sys, time
from metatuner_jax import processes

processes.WAIT_S, stage, index = 8, sys.argv[1], int(sys.argv[2])
dies = index == 1
if stage == "never comes" and dies:
    sys.exit()
try:
    processes.join(sys.argv[3], 2, index)
except ValueError as error:
    sys.exit(f"error: {error}")
if stage == "at the end":
    if dies:
        processes.group.gather(None)
        os.kill(os.getpid(), signal.SIGKILL)
    processes.group.end(0)
if stage == "while a large value is sent" and dies:
    os.kill(os.getpid(), signal.SIGSTOP)
if stage == "no output is taken":
    os.close(1)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
processes.SILENT_S = 4
processes.group.gather("x" * (10_000_000 if stage == "while a large value is sent" else 1))
time.sleep(60)
"""
DEATHS = {
    "never comes": ("of 2 processes these did not come within 8 s: 1; start all of them", 1),
    "at the end": ("", 0),  # all was done
    "while a large value is sent": ("failed: nothing has been heard from process 1 for 4 s; ", 1),
    "no output is taken": ("failed: process 1 has died; ", 1),
}


@pytest.mark.parametrize("stage", DEATHS)
def test_whenever_a_process_is_missing_the_other_ends_with_one_line(stage):
    text, code = DEATHS[stage]
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        first, _ = (
            stack.enter_context(killed_at_last(subprocess.Popen(
                [sys.executable, "-c", ALONE, stage, str(i), address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )))
            for i in range(2)
        )  # fmt: skip
        found, _, errors = outcome(first)
    assert found == code and text in (errors.splitlines() or [""])[-1], errors
