"""A user's own JSON Lines file, on two CPU cores.

    python -m experiments.run --config experiments/configs/jsonl.py --config.task.train=mine.jsonl

Each line is an object with `question` and `answer`, both text; other names by --config.task.options.question=... and
--config.task.options.answer=.... Validation and test rows are cut from the file unless files of their own are named.
"""

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    return config.to_tree(
        config.make(
            task={"name": "jsonl", "num_validation": 32, "num_test": 64, "options": {"metric": "exact_match"}},
            actor={"max_answer_tokens": 64},
            train={
                "num_steps": 60,
                "batch_size": 8,
                "learning_rate": 5e-4,
                "generator_rate": 0.2,
                "warmup_steps": 8,
                "prompt_weight": 0.3,
                "checkpoint_every": 30,
            },
            rollout={"every": 30, "num_queries": 32},
        )
    )
