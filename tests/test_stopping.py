"""A run that is asked to stop keeps what it has done, says where, and goes on as if it had not been stopped."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from small_runs import SOAK, assert_same, child, command, read_lines, start, wait_for

from metatuner_jax import data, evaluate, rollout
from metatuner_jax.stopping import Stop

pytestmark = pytest.mark.usefixtures("compiled")
SETTINGS = ("train.checkpoint_every=4",)  # of 4 steps, with rollouts before the steps 0 and 2

# In what, when (of its arguments), with how many updates kept.
MOMENTS = {
    "before training": (evaluate, "answer_before", lambda *args: True, None),
    "first rollouts": (rollout, "refresh", lambda *args: args[7] == 0, None),
    "step": (data, "batch_at", lambda *args: args[0] == 2, 3),
    "rollouts": (rollout, "refresh", lambda *args: args[7] == 2, 2),
    "validation": (evaluate, "validate", lambda *args: True, 4),
    "evaluation": (evaluate, "evaluate", lambda *args: True, 4),
}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(command(root, folder, *SETTINGS))[0] == 0
    return folder


@pytest.mark.parametrize("moment", MOMENTS if SOAK else ("before training", "step", "rollouts", "evaluation"))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(moment, whole, root, tmp_path, monkeypatch, capfd):
    module, name, when, kept = MOMENTS[moment]
    number = signal.SIGINT if moment == "rollouts" else signal.SIGTERM
    plain, handlers, folder = getattr(module, name), signal.getsignal(signal.SIGTERM), tmp_path / "run"

    def asked(*args, **more):
        if when(*args):
            signal.raise_signal(number)
        return plain(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, asked)
        code, _ = start(command(root, folder, *SETTINGS))
    assert code == 128 + number and signal.getsignal(signal.SIGTERM) is handlers
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"stopped by {number.name}: ")
    assert ("nothing was done" if kept is None else f"/checkpoints/{kept} has all") in said
    assert [path.name for path in (folder / "checkpoints").glob("*")] == ([] if kept is None else [str(kept)])
    assert not (folder / "results.json").exists()

    code, output = start(command(root, folder, *SETTINGS))
    assert code == 0 and (kept is None or f"resuming at step {kept} of 4" in output)
    assert_same(folder, whole)


def test_a_process_that_is_terminated_writes_a_checkpoint_and_says_so(root, tmp_path):
    folder = tmp_path / "run"
    arguments = command(root, folder, "train.num_steps=100000", "train.checkpoint_every=100000", "rollout.every=0", "task.num_validation=4")
    with child(arguments) as process:
        wait_for(process, lambda: (folder / "metrics.jsonl").exists() and len(read_lines(folder / "metrics.jsonl")) >= 3)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    done = len(read_lines(folder / "metrics.jsonl"))
    assert error.splitlines()[-1] == f"stopped by SIGTERM: {folder}/checkpoints/{done} has all that was trained; the same command goes on from it"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(done)]


WAITS = """
import hashlib, os, signal, time
from metatuner_jax.stopping import Stop, Stopped
stop = Stop()
stop.waits = {waits}
try:
    with stop.heard():
        print("ready", flush=True)
        {work}
except Stopped as stopped:
    os._exit(7)
"""


# The second kind of work gives Python no time to call a handler, as the compiler does.
@pytest.mark.parametrize("work", ["time.sleep(60)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"])
@pytest.mark.parametrize(("waits", "signals", "code"), [(True, 2, 130), (False, 1, 7)])
def test_the_second_ctrl_c_or_one_with_nothing_to_lose_ends_at_once(waits, signals, code, work):
    if not waits and "hashlib" in work:
        signals, code = 2, 130  # the first one is not heard before the work ends
    with subprocess.Popen([sys.executable, "-c", WAITS.format(waits=waits, work=work)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)  # so that it is at work
        for i in range(signals):
            child.send_signal(signal.SIGINT)
            time.sleep(0.1)
            if i == 0 and waits:
                assert child.stderr.readline() == "\n" and child.stderr.readline().startswith("SIGINT: stopping where nothing is lost")
        assert child.wait(timeout=20) == code


def test_other_threads_hear_no_signals():
    def enter():
        with Stop().heard():
            found.append(signal.getsignal(signal.SIGTERM))

    found, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
