"""SmolLM2-135M-Instruct trained on three tasks and tested on a fourth, as the paper's transfer experiment, on two CPU cores.

    python -m experiments.run --config experiments/configs/mixture.py --config.task.options.parts.gsm8k.train=FOLDER ...

Each part takes rows from the hub unless its `train` names a FOLDER. Another task is held out by turning two settings round:
--config.task.options.parts.math.use=train --config.task.options.parts.gsm8k.use=test. A part is left out by
--config.task.options.parts.math=none; with use=both on every part, the mixture is trained on and tested on all of them.
"""

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    parts = {
        "gsm8k": {"use": "train", "weight": 1.0},
        "hotpotqa": {"use": "train", "weight": 1.0, "options": {"paragraphs": 2}},
        "cosmosqa": {"use": "train", "weight": 1.0},
        "math": {"use": "test", "weight": 1.0},
    }
    return config.to_tree(
        config.make(
            task={"name": "mixture", "num_train": 2100, "num_validation": 60, "num_test": 100, "options": {"parts": parts}},
            generator={"max_query_tokens": 512, "max_prompt_tokens": 40},
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
