"""SmolLM2-135M-Instruct on GSM8K's word problems, on two CPU cores: a test of the loop on a hard task, not a good score.

    python -m experiments.run --config experiments/configs/gsm8k.py --config.task.train=FOLDER

FOLDER holds train.jsonl and test.jsonl with `question` and `answer`; without the setting, the rows come from the hub.
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
            task=change("task", name="gsm8k", num_train=2000, num_validation=50, num_test=100),
            generator=change("generator", max_query_tokens=256, max_prompt_tokens=40),
            actor=change("actor", max_answer_tokens=192),
            train=change("train", num_steps=100, batch_size=8, learning_rate=3e-4, warmup_steps=10, checkpoint_every=50),
            rollout=change("rollout", every=50, num_queries=16, num_prompts=4),
            eval=change("eval", batch_size=50),
        )
    )
