"""SmolLM2-135M-Instruct learns to reverse lists of words, on two CPU cores.

    python -m experiments.run --config experiments/configs/quickstart.py --workdir runs/quickstart

Expected: 0% of 200 unseen test queries before, 94% after; 6 to 13 minutes on two cores of an AMD EPYC, in bfloat16.
"""

from metatuner_jax import config

# Written by hand. All score 0% on 64 validation rows, where the answers are likeliest under the fifth:
# python -m experiments.choose_prompt --config experiments/configs/quickstart.py --config.task.num_validation=64
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
    return config.to_tree(
        config.make(
            task={
                "name": "reasoning_gym:word_sequence_reversal",
                "options": {"min_words": 3, "max_words": 5},
                "initial_prompt": PROMPTS[4],
                "num_train": 576,
                "num_validation": 40,
                "num_test": 200,
            },
            generator={"max_prompt_tokens": 18, "temperature": 0.5},
            actor={"max_answer_tokens": 24},
            train={
                "num_steps": 96,
                "batch_size": 6,
                "learning_rate": 5e-4,
                "generator_rate": 0.2,
                "warmup_steps": 8,
                "prompt_weight": 0.3,
                "checkpoint_every": 48,
                "diagnose_every": 0,  # for time
            },
            rollout={"every": 48, "num_queries": 32, "num_prompts": 4},
            eval={"batch_size": 40, "num_mean": 256},
        )
    )
