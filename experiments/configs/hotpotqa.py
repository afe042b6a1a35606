"""SmolLM2-135M-Instruct on HotpotQA with three of each question's ten paragraphs, on two CPU cores.

    python -m experiments.run --config experiments/configs/hotpotqa.py --config.task.train=FOLDER

FOLDER holds train.jsonl, validation.jsonl and test.jsonl with the hub's fields; without the setting, the rows come from the hub.
Three paragraphs, the two that hold the answer among them, are easier than the published setting, whose ten
(--config.task.options.paragraphs=none) are more than this model has positions for in many queries. On 1,991 rows, queries of
three are 400 tokens long in the middle, and 99 in 100 are below 768; longer ones are dropped and counted.
"""

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    return config.to_tree(
        config.make(
            task={"name": "hotpotqa", "num_train": 800, "num_validation": 50, "num_test": 100, "options": {"paragraphs": 3}},
            generator={"max_query_tokens": 768, "max_prompt_tokens": 32},
            actor={"max_answer_tokens": 24},
            train={
                "num_steps": 100,
                "batch_size": 4,
                "learning_rate": 3e-4,
                "generator_rate": 0.2,
                "warmup_steps": 10,
                "checkpoint_every": 50,
            },
            rollout={"every": 50, "num_queries": 16, "num_prompts": 4},
            eval={"batch_size": 25},
        )
    )
