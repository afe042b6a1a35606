"""SmolLM2-135M-Instruct learns to reverse lists of words, on two CPU cores.

    python -m experiments.run --config experiments/configs/quickstart.py --workdir runs/quickstart
"""

import dataclasses

from metatuner_jax import config

# Written by hand; `python -m experiments.choose_prompt --config experiments/configs/quickstart.py` scores them on validation rows.
PROMPTS = (
    "Reverse the order of the words in the list. Write only the reversed list.",
    "Write the same words in the opposite order, from the last word to the first.",
    "Read the list from right to left and copy each word. Do not explain anything.",
    "Turn the list around: the last word comes first and the first comes last.",
    "You reverse lists. Answer only with the words, separated by commas, in reverse.",
    "Solve the problem. Give only the final answer, without any other words.",
)


def get_config():
    """Returns the config tree."""
    base = config.Config()

    def change(section, **values):
        return dataclasses.replace(getattr(base, section), **values)

    return config.to_tree(
        dataclasses.replace(
            base,
            dtype="float32",  # on most CPUs quicker than bfloat16
            task=change(
                "task",
                name="reasoning_gym:word_sequence_reversal",
                num_train=512,
                num_validation=40,
                num_test=200,
                initial_prompt=PROMPTS[4],
                options={"min_words": 3, "max_words": 5},
            ),
            generator=change("generator", max_prompt_tokens=18),
            actor=change("actor", max_answer_tokens=24),
            train=change(
                "train", num_steps=60, batch_size=8, learning_rate=5e-4, generator_rate=0.2, warmup_steps=8, prompt_weight=0.3,
                prompt_gradient="straight_through", checkpoint_every=30,
            ),  # fmt: skip
            rollout=change("rollout", every=30, num_queries=32, num_prompts=4),
            eval=change("eval", batch_size=40, num_mean=256),
        )
    )
