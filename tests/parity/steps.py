"""The step that is compiled for devices which need not be there: SmolLM2-135M in both roles, at the lengths of the benchmark."""

from experiments import bench
from metatuner_jax import config as config_lib
from metatuner_jax import data, generator, methods

MODEL, ROWS = bench.SHAPES["smollm2-135m"], 64
LENGTHS = data.Lengths(bench.QUERY, bench.ACTOR_QUERY, bench.ANSWER)


def setup_of(train: str) -> generator.Setup:
    """Returns the setup of a step in which the generator learns by LoRA or in full."""
    same = {"model": "SmolLM2-135M"}
    config = config_lib.make(
        dtype="bfloat16", generator={"max_prompt_tokens": bench.PROMPT, "train": train, **same}, actor={"max_answer_tokens": bench.ANSWER, **same},
        train={"batch_size": ROWS},
    )  # fmt: skip
    return generator.Setup(methods.resolve(config), MODEL, MODEL, bench.END, (3, 4, 5))
