"""The step is compiled for GPUs where there are none: their compiler comes with jax's plugin for CUDA (`make gpu`)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import LENGTHS, MODEL, ROWS, gathered, kernel_bytes, setup_of

from experiments import bench, compiled, plan, roofline, topology
from metatuner_jax import config as config_lib
from metatuner_jax import product, sharding

MEASURED = pathlib.Path(__file__).parents[2] / "results" / "bench" / "nvidia-h100-jax-0.11-qwen2.5-1.5b.json"


@pytest.mark.parametrize("kind", topology.GPUS)
def test_every_kind_of_gpu_is_one_that_its_compiler_takes(kind):
    devices = topology.devices(f"{kind}:2x4")
    assert len(devices) == 8 and devices[0].device_kind == topology.GPUS[kind].name
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
    x, w = (
        jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
        for axes in (("rows",), ())
    )  # fmt: skip
    program = jax.jit(lambda x, w: (x @ w).sum()).trace(x, w).lower(lowering_platforms=("cuda",)).compile()
    assert "all-reduce" in program.as_text()


@pytest.mark.parametrize(("shape", "train"), [((4, 1, 1), "lora"), ((1, 4, 1), "full")], ids=str)
def test_the_step_compiles_for_gpus_and_takes_what_is_planned(shape, train):
    setup = setup_of(train)
    mesh = sharding.make_mesh(config_lib.MeshConfig(*shape), topology.devices("h100:4"))
    program = compiled.lower_step(setup, LENGTHS, mesh, "gpu").compile()
    memory, lines = compiled.memory_of(program), compiled.run_lines(program.as_text(), setup)
    sent = compiled.read_collectives(lines, setup)
    with product.written_for("gpu"):
        planned = sum(plan.memory(setup, LENGTHS, plan.Mesh(*shape))["step"].values())
    print(f"\ndata, fsdp, tensor = {shape}, {train}: {memory['bytes'] / 2**30:.2f} GiB a device, planned {planned / 2**30:.2f}; {sent}")
    assert 0.8 < memory["bytes"] / planned < 1.1

    kernels = kernel_bytes()
    brought = gathered(lines)
    if shape == (4, 1, 1):  # the rows' LoRA stay where they are, but for those of the few rows that are diagnosed; weights are nowhere else
        loras = ROWS * MODEL.num_layers * config_lib.Config().hyper.rank * MODEL.width
        assert max(size for size, _ in brought) < loras and not any(sampling for _, sampling in brought)
    else:  # for each token that is sampled, a token of all rows is brought together, and no weights; of its gradients each device is given its part alone
        assert max(size for size, sampling in brought if sampling) == ROWS * MODEL.width
        assert sent["reduce-scatter"]["bytes"] > 0.5 * kernels / 4 > sent["all-reduce"]["bytes"]


@pytest.mark.parametrize("part", json.loads(MEASURED.read_text())["settings"]["parts"])
def test_memory_and_time_are_those_of_a_card_which_was_there(part, work, monkeypatch):
    """The benchmark's parts, compiled without a card, take the memory, and by their roofline the time, that they took on one."""
    place, texts = jax.sharding.SingleDeviceSharding(topology.devices("h100:1")[0]), []

    def compile(function, *args):
        args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), args)
        program = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()
        texts.append(program.as_text())
        return None, 0.0, bench.sizes(program)

    monkeypatch.setattr(bench, "compiled", compile)
    with product.written_for("gpu"):
        memory = bench.PARTS[part](work).temporary
    config = work.setup.config  # of the loop whose turns are not known, which decoding alone has, this says how many there are
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, max_prompt_tokens=bench.DECODE_NEW))
    lines = compiled.run_lines(texts[0], dataclasses.replace(work.setup, config=config))
    seconds = sum(roofline.seconds(texts[0], lines, topology.GPUS["h100"]).values())
    measured = json.loads(MEASURED.read_text())["parts"]["bfloat16"][part]
    print(f"\n{part}: {memory / 2**30:.3f} GiB and {1e3 * seconds:.1f} ms, on the card {measured['temporary_bytes'] / 2**30:.3f} and {1e3 * measured['median_s']:.1f}")
    assert memory == pytest.approx(measured["temporary_bytes"], rel=0.05)
    assert seconds == pytest.approx(measured["median_s"], rel=0.1)


@pytest.fixture(scope="module")
def work():
    settings = json.loads(MEASURED.read_text())["settings"]
    return bench.make_work(settings["model"], "bfloat16", settings["batch_size"])
