"""SmolLM2-135M-Instruct learns four small tasks at once under one small adapter, on two CPU cores.

    python -m experiments.run --config experiments/configs/reasoning_mixture.py --workdir runs/reasoning_mixture

What a query asks for is in its words alone: all parts have one initial prompt. A static LoRA must hold all four tasks; a hypernetwork
may write another one for each.
"""

from metatuner_jax import config

PARTS = {
    "reversal": {"name": "reasoning_gym:word_sequence_reversal", "options": {"min_words": 3, "max_words": 5}},
    "families": {"name": "reasoning_gym:family_relationships"},
    "sorting": {"name": "reasoning_gym:word_sorting", "options": {"min_words": 3, "max_words": 4}},
    "filtering": {"name": "reasoning_gym:number_filtering", "options": {"min_numbers": 3, "max_numbers": 5}},
}
PROMPT = "Solve the problem. Give only the final answer, without any other words."


def get_config():
    """Returns the config tree."""
    parts = {name: {**part, "initial_prompt": PROMPT} for name, part in PARTS.items()}
    return config.to_tree(
        config.make(
            dtype="float32",
            task={"name": "mixture", "num_train": 1024, "num_validation": 60, "num_test": 200, "options": {"parts": parts}},
            generator={"max_query_tokens": 256, "max_prompt_tokens": 18},
            actor={"max_answer_tokens": 40},
            hyper={"standardize": True},
            train={
                "num_steps": 96,
                "batch_size": 8,
                "learning_rate": 3e-3,
                "hyper_rate": 0.03,
                "generator_rate": 0.03,
                "warmup_steps": 8,
                "prompt_weight": 0.3,
                "prompt_gradient": "none",
                "checkpoint_every": 48,
            },
            rollout={"every": 48, "num_queries": 32, "num_prompts": 4},
            eval={"batch_size": 40, "num_mean": 256},
        )
    )
