r"""SmolLM2-135M-Instruct on MATH's competition problems, on two CPU cores: a test of the loop on a hard task, not a good score.

    python -m experiments.run --config experiments/configs/math.py --config.task.train=FOLDER

FOLDER holds train.jsonl and test.jsonl with `problem` and `solution`, whose answer is in \boxed{}; without the setting, the
rows come from the hub. Rows with a longer solution than actor.max_answer_tokens are left out of training, and counted.
"""

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    return config.to_tree(
        config.make(
            task={"name": "math", "num_train": 2000, "num_validation": 50, "num_test": 100},
            generator={"max_query_tokens": 320, "max_prompt_tokens": 40},
            actor={"max_answer_tokens": 256},
            train={
                "num_steps": 100,
                "batch_size": 8,
                "learning_rate": 3e-4,
                "generator_rate": 0.2,
                "warmup_steps": 10,
                "checkpoint_every": 50,
            },
            rollout={"every": 50, "num_queries": 16, "num_prompts": 4},
            eval={"batch_size": 50},
        )
    )
