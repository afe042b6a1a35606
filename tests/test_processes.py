"""Several processes do one run together: the same losses as one, and none goes on without the others."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from small_runs import assert_close, assert_same, command, read_lines, start

pytestmark = pytest.mark.usefixtures("compiled")
SOAK = bool(os.environ.get("SOAK"))
SETTINGS = ("train.num_steps=8", "rollout.every=4")
END_S = 30  # in which the others end when one is gone


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def together(count, arguments, slurm=False):
    """Yields the processes of one run, which are told of each other by options, or find each other as on Slurm."""
    port = free_port()

    def begun(i):
        if slurm:
            found = {"JOB_ID": port, "STEP_NODELIST": "localhost", "STEP_NUM_NODES": 1, "NTASKS": count, "PROCID": i, "LOCALID": i}
            options, environment = [], {f"SLURM_{name}": str(value) for name, value in found.items()}
        else:
            options, environment = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(count), "--process_id", str(i)], {}
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.run", *arguments, *options], env={**os.environ, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(killed_at_last(begun(i))) for i in range(count)]


@contextlib.contextmanager
def killed_at_last(process):
    with process:
        try:
            yield process
        finally:
            process.kill()


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
    found = {}

    def made(count):
        if count not in found:
            folder = tmp_path_factory.mktemp("whole") / "run"
            with together(count, command(root, folder, *SETTINGS)) as processes:
                found[count] = folder, [outcome(process) for process in processes]
        return found[count]

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
    assert errors.splitlines()[-1] == f"failed: process {dies} has died; the same command, in all processes, goes on from the newest checkpoint"
    with together(2, command(root, folder, *SETTINGS)) as processes:
        outcomes = [outcome(process) for process in processes]
    assert [code for code, _, _ in outcomes] == [0, 0] and "resuming at step" in outcomes[0][1], outcomes
    assert_same(folder, whole(2)[0])


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
    assert {code for code, _, _ in outcomes} <= {1, 2} and not (tmp_path / "other").exists()
    for code, _, errors in outcomes:
        said = "error: " if code == 2 else "failed: process "
        assert errors.splitlines()[-1].startswith(said) and "train.batch_size=3 must be a multiple of mesh.data * mesh.fsdp = 2" in errors
