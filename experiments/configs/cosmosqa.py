"""SmolLM2-135M-Instruct on Cosmos QA's four choices, on two CPU cores.

    python -m experiments.run --config experiments/configs/cosmosqa.py --config.task.train=FOLDER

FOLDER holds train.jsonl and test.jsonl with the hub's fields; without the setting, the rows come from the hub, whose validation
split is test, as the labels of its test split are secret. Guessing scores 25%.
"""

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    return config.to_tree(
        config.make(
            task={"name": "cosmosqa", "num_train": 1600, "num_validation": 50, "num_test": 200},
            generator={"max_query_tokens": 320, "max_prompt_tokens": 32},
            actor={"max_answer_tokens": 16},
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
