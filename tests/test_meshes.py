"""Whole runs on eight pretended devices come to what one device comes to, on any mesh, and go on on another number of devices."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_runs import SOAK, assert_close, command, load_state, start

pytestmark = pytest.mark.usefixtures("compiled")
# On busy cores a device may wait long for the others; XLA would give up after 40 s.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
# XLA has as many threads as cores. With two, the devices' collectives may each hold one and wait for a third: for ever.
EIGHT = {**os.environ, "NPROC": "32", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 {PATIENT}"}
DIVIDED = ("generator.model={root}/divided", "actor.model={root}/divided")  # models whose words the meshes divide
KINDS = {  # what learns and in which order, with rollouts and evaluation
    "lora, joint": (*DIVIDED, "generator.train=lora", "method=metatuner_j", "train.prompt_gradient=straight_through"),
    "full, alternating": (*DIVIDED, "generator.train=full", "method=metatuner_i", "train.alternate_every=1", "hyper.network=trunk"),
    "lora, in parts": (*DIVIDED, "generator.train=lora", "method=metatuner_j", "train.batch_size=16", "train.accumulate=2"),
    "full, joint": ("generator.train=full", "method=metatuner_j"),
    "lora, alternating": ("generator.train=lora", "method=metatuner_i", "train.alternate_every=1", "warmup.actor_steps=1"),
}
MESHES = {(8, 1, 1): ("lora, joint",), (1, 8, 1): ("full, alternating",), (2, 2, 2): ("lora, in parts",)}
if SOAK:
    MESHES = dict.fromkeys([*MESHES, (4, 1, 2), (1, 4, 2), (2, 4, 1), (4, 2, 1)], tuple(KINDS))
SETTINGS = ("train.batch_size=8", "train.learning_rate=1e-3")

RUNS = "import json, sys; from experiments import run; sys.exit(max(run.main(arguments) for arguments in json.loads(sys.argv[1])))"


def settings_of(kind, root, mesh=(1, 1, 1)):
    return (*SETTINGS, *(setting.format(root=root) for setting in KINDS[kind]), *(f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh)))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """folder(kind) of a run on one device."""

    @functools.cache
    def folder(kind):
        folder = tmp_path_factory.mktemp("alone") / "run"
        assert start(command(root, folder, *settings_of(kind, root)))[0] == 0
        return folder

    return folder


@pytest.fixture(scope="module")
def on_mesh(root, tmp_path_factory):
    """folders(mesh) of the runs of a mesh, by their kind, all in one process."""

    @functools.cache
    def folders(mesh):
        found = {kind: tmp_path_factory.mktemp("mesh") / "run" for kind in MESHES[mesh]}
        runs = [command(root, folder, *settings_of(kind, root, mesh)) for kind, folder in found.items()]
        done = subprocess.run([sys.executable, "-c", RUNS, json.dumps(runs)], env=EIGHT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return found

    return folders


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_run_on_eight_devices_comes_to_what_one_comes_to(mesh, on_mesh, alone):
    for kind, folder in on_mesh(mesh).items():
        assert json.loads((folder / "config.json").read_text())["devices"]["count"] == 8
        assert_close(folder, alone(kind))
        last = max(int(path.name) for path in (folder / "checkpoints").iterdir())
        here, there = (load_state(at, last)["params"] for at in (folder, alone(kind)))
        assert jax.tree.structure(here) == jax.tree.structure(there)
        # Adam turns the rounding of a gradient near zero into a step of another sign, so the whole is compared, not each number.
        jax.tree.map(lambda a, b: np.testing.assert_array_less(np.linalg.norm(a - b), 1e-4 * np.linalg.norm(b) + 1e-9), here, there)


def test_a_run_goes_on_on_another_number_of_devices(on_mesh, alone, root, tmp_path):
    folder, kind = tmp_path / "run", "full, alternating"
    shutil.copytree(on_mesh((1, 8, 1))[kind], folder)
    for path in (folder / "results.json", folder / "predictions.jsonl", folder / "checkpoint_sums" / "4.json"):
        path.unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    code, output = start(command(root, folder, *settings_of(kind, root)))
    assert code == 0 and "resuming at step 2 of 4" in output and "mesh.fsdp=1 (was 8)" in output
    assert_close(folder, alone(kind))


RESTORED = """
import pathlib, sys
import jax, numpy as np
sys.path.insert(0, sys.argv[1])
import conftest
from metatuner_jax import checkpoint, sharding, train
from metatuner_jax.config import MeshConfig

setup = conftest.make_setup(generator={"train": "full"})
state = train.init_state(setup, conftest.make_networks()(setup)[1])
place = lambda shape: sharding.place(state, sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))]))
step, eight = 0, (2, 2, 2)

def carried(source, target):
    "Saves on one mesh and restores on another one."
    global step
    step += 1
    checkpoints = checkpoint.Checkpoints(pathlib.Path(sys.argv[2]) / "checkpoints")
    checkpoints.save(step, place(source), 0.0)
    like = place(target)
    found = checkpoints.restore(step, checkpoint.shapes(like))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, like)))

for other in ((1, 1, 1), (1, 2, 1), (2, 1, 2), (8, 1, 1), (1, 8, 1)):
    carried(eight, other)
    carried(other, eight)
print("carried", step)
"""


def test_a_checkpoint_of_eight_devices_is_restored_on_fewer_and_back(tmp_path):
    arguments = [sys.executable, "-c", RESTORED, str(pathlib.Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(arguments, env=EIGHT, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("carried 10\n"), done.stderr[-2000:]


LOADED = """
import json, pathlib, sys
import jax, numpy as np
from experiments import run
from metatuner_jax import job as job_lib
from metatuner_jax import networks, pretrained, sharding

path, _, assignments, _ = run.parse(json.loads(sys.argv[1]))
job = job_lib.prepare(run.load_config(path, assignments))
load, largest = pretrained.load, 0

def watched(name, dtype, put, *rest):
    "Loads, and looks at what any device holds after each array."
    def look(path, array):
        global largest
        placed = put(path, array)
        here = [array for array in jax.live_arrays() if jax.devices()[0] in array.sharding.device_set]
        largest = max(largest, sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in here))
        return placed
    return load(name, dtype, look, *rest)

pretrained.load = watched
frozen, params = networks.load(job.setup, job.tokens, jax.random.key(0), job.mesh)
whole = sum(leaf.nbytes for leaf in jax.tree.leaves((frozen.actor, frozen.generator)))
for path, leaf in jax.tree_util.tree_leaves_with_path((frozen.actor, frozen.generator)):
    assert leaf.sharding.spec == sharding.spec_at(sharding.path_text(path), leaf.shape, job.mesh), path
print(json.dumps([largest, whole]))
"""


def test_weights_go_straight_to_the_devices_that_hold_them(root, tmp_path):
    arguments = command(root, tmp_path / "run", f"generator.model={root}/larger", "generator.train=lora", *SETTINGS, "mesh.fsdp=8")
    done = subprocess.run([sys.executable, "-c", LOADED, json.dumps(arguments)], env=EIGHT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    largest, whole = json.loads(done.stdout)
    assert whole / 8 <= largest < whole / 6  # norms, which are not split, are on each device
