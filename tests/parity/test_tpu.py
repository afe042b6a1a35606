"""The step is compiled for TPUs where there are none: their compiler comes with libtpu (`make tpu`)."""

import re

import pytest
from steps import LENGTHS, MODEL, ROWS, gathered, kernel_bytes, setup_of

from experiments import compiled, plan, topology
from metatuner_jax import config as config_lib
from metatuner_jax import sharding


@pytest.mark.parametrize(("shape", "train"), [((4, 1, 1), "lora"), ((1, 4, 1), "full")], ids=str)
def test_the_step_compiles_for_tpus_and_fits(shape, train):
    setup = setup_of(train)
    mesh = sharding.make_mesh(config_lib.MeshConfig(*shape), topology.devices("v5e:2x2"))
    program = compiled.lower_step(setup, LENGTHS, mesh, "tpu").compile()
    text, memory = program.as_text(), compiled.memory_of(program)
    lines = compiled.run_lines(text, setup)
    cycles, sent = compiled.read_cycles(lines), compiled.read_collectives(lines, setup)
    print(f"\ndata, fsdp, tensor = {shape}, {train}: {memory['bytes'] / 2**30:.2f} GiB a device, of these {memory['temporary'] / 2**30:.2f} temporary")
    print(", ".join(f"{part} {count / 1e6:.1f}" for part, count in cycles.items()), "million cycles by the compiler's estimate;", sent)
    assert memory["bytes"] < 16 * 2**30  # of a v5e chip
    flops = plan.step_flops(setup, LENGTHS)["all"] / 4
    assert all(cycles.values()) and 0.02 < flops / (131072 * sum(cycles.values())) < 1  # a v5e multiplies and adds 65,536 pairs a cycle

    brought = gathered(lines)
    # The rows' LoRA are not brought together; nor, for each token that is sampled, are any weights: a token of all rows is, and what it is scored by.
    loras = ROWS * MODEL.num_layers * config_lib.Config().hyper.rank * MODEL.width
    assert shape != (4, 1, 1) or max((size for size, _ in brought), default=0) < loras
    assert max((size for size, sampling in brought if sampling), default=0) == (ROWS * MODEL.width if shape == (1, 4, 1) else 0)
    # A product of many tokens is one product, summed in float32, and not many whose sums are rounded to bfloat16 one after the other.
    assert "windowed_dot_general" not in text
    # Of most gradients, each device is given the sum of its own part: the compiler does so where it likes the part's width. No table changes places.
    kernels = kernel_bytes()
    assert shape == (4, 1, 1) or sent["reduce-scatter"]["bytes"] > 0.5 * kernels / 4
    assert not re.search(rf"f32\[[\d,]*\b{MODEL.vocab_size // 4}\b[\d,]*\]\S* all-to-all\(", text)
