"""The step that is compiled for devices which need not be there: SmolLM2-135M in both roles, at the lengths of the benchmark."""

import math
import re

from experiments import bench
from metatuner_jax import config as config_lib
from metatuner_jax import data, generator, methods

MODEL, ROWS = bench.SHAPES["smollm2-135m"], 64
LENGTHS = data.Lengths(bench.QUERY + bench.TEMPLATE, bench.QUERY, bench.ANSWER)


def setup_of(train: str) -> generator.Setup:
    """Returns the setup of a step in which the generator learns by LoRA or in full."""
    same = {"model": "SmolLM2-135M"}
    config = config_lib.make(
        dtype="bfloat16", generator={"max_prompt_tokens": bench.PROMPT, "train": train, **same}, actor={"max_answer_tokens": bench.ANSWER, **same},
        train={"batch_size": ROWS},
    )  # fmt: skip
    return generator.Setup(methods.resolve(config), MODEL, MODEL, bench.END, (3, 4, 5))


def gathered(lines) -> list[tuple[int, bool]]:
    """Returns (how many numbers, whether while rows are sampled) of each array that is brought together, of `compiled.run_lines`."""
    return [
        (math.prod(int(n) for n in dims.split(",")), line.sampling)
        for line in lines
        for arrays in re.findall(r"= (.+) all-gather(?:-start)?\(", line.text)
        for dims in re.findall(r"\w\[([\d,]+)\]", arrays)
    ]


def kernel_bytes() -> int:
    """Returns the bytes of the kernels of all layers, bfloat16."""
    return 2 * sum(math.prod(config_lib.projection_widths(MODEL, name)) for name in config_lib.PROJECTIONS) * MODEL.num_layers
