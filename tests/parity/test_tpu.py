"""The step is compiled for TPUs where there are none: their compiler comes with libtpu (`make tpu`)."""

import re

import numpy as np
import pytest

from experiments import bench, compiled, plan
from metatuner_jax import config as config_lib
from metatuner_jax import data, generator, methods, sharding

MODEL, ROWS = bench.SHAPES["smollm2-135m"], 64
LENGTHS = data.Lengths(bench.QUERY, bench.ACTOR_QUERY, bench.ANSWER)


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1)], ids=str)
def test_the_step_compiles_for_tpus_and_fits(shape):
    topology, mesh = "v5e:2x2", config_lib.MeshConfig(*shape)
    same = {"model": "SmolLM2-135M"}
    config = config_lib.make(
        dtype="bfloat16", generator={"max_prompt_tokens": bench.PROMPT, **same}, actor={"max_answer_tokens": bench.ANSWER, **same},
        train={"batch_size": ROWS},
    )  # fmt: skip
    setup = generator.Setup(methods.resolve(config), MODEL, MODEL, bench.END, (3, 4, 5))
    devices = sharding.make_mesh(mesh, compiled.tpus(topology))
    program = compiled.lower_step(setup, LENGTHS, devices, "tpu").compile()
    text, found = program.as_text(), program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    lines = compiled.run_lines(text, setup)
    cycles = compiled.read_cycles(lines)
    print(f"\ndata, fsdp, tensor = {shape}: {held / 2**30:.2f} GiB a device, of these {found.temp_size_in_bytes / 2**30:.2f} temporary")
    print(", ".join(f"{part} {count / 1e6:.1f}" for part, count in cycles.items()), "million cycles by the compiler's estimate")
    assert held < 16 * 2**30  # of a v5e chip
    flops = plan.step_flops(setup, LENGTHS)["all"] / 4
    assert 0.05 * flops < 131072 * sum(cycles.values()) < 20 * flops  # a v5e multiplies and adds 65,536 pairs a cycle
    assert all(cycles.values())

    gathered = [
        (np.prod([int(n) for n in dims.split(",")]), line.sampling)
        for line in lines
        for arrays in re.findall(r"= (.+) all-gather(?:-start)?\(", line.text)
        for dims in re.findall(r"\w\[([\d,]+)\]", arrays)
    ]
    # The rows' LoRA are not brought together; nor, for each token that is sampled, are any weights: a token of all rows is, and what it is scored by.
    loras = ROWS * MODEL.num_layers * config_lib.Config().hyper.rank * MODEL.width
    assert shape != (4, 1, 1) or max((size for size, _ in gathered), default=0) < loras
    assert max((size for size, sampling in gathered if sampling), default=0) == (ROWS * MODEL.width if shape == (1, 4, 1) else 0)
    # A product of many tokens is one product, summed in float32, and not many whose sums are rounded to bfloat16 one after the other.
    assert "windowed_dot_general" not in text
