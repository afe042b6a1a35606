"""A user's own JSON Lines file, on two CPU cores.

    python -m experiments.run --config experiments/configs/jsonl.py --config.task.train=mine.jsonl

Each line is an object with `question` and `answer`, both text; other names by --config.task.options.question=... and
--config.task.options.answer=.... Validation and test rows are cut from the file unless files of their own are named.
"""

import dataclasses

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    base = config.Config()

    def change(section, **values):
        return dataclasses.replace(getattr(base, section), **values)

    return config.to_tree(
        dataclasses.replace(
            base,
            dtype="float32",
            task=change("task", name="jsonl", num_validation=32, num_test=64, options={"metric": "exact_match"}),
            actor=change("actor", max_answer_tokens=64),
            train=change(
                "train", num_steps=60, batch_size=8, learning_rate=5e-4, warmup_steps=10, checkpoint_every=30,
                prompt_gradient="straight_through",
            ),  # fmt: skip
            rollout=change("rollout", every=30, num_queries=32),
        )
    )
