"""SmolLM2-135M-Instruct on GSM8K's word problems, on two CPU cores: a test of the loop on a hard task, not a good score.

    python -m experiments.run --config experiments/configs/gsm8k.py --config.task.train=FOLDER

FOLDER holds train.jsonl and test.jsonl with `question` and `answer`; without the setting, the rows come from the hub.
"""

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    return config.to_tree(
        config.make(
            dtype="float32",  # in which its published result was made
            task={"name": "gsm8k", "num_train": 2000, "num_validation": 50, "num_test": 100},
            generator={"max_query_tokens": 256, "max_prompt_tokens": 40},
            actor={"max_answer_tokens": 192},
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
