"""The terms of the objective, and their sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metatuner_jax import actor, generator, lora, transformer


def token_loss(logits: Float[Array, "b t v"], targets: Int[Array, "b t"], weights: Float[Array, "b t"]) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the targets, in nats per weighted token.

    One mean over the whole batch, not a mean of row means: a long answer counts for more than a short one.

    Args:
      logits: score of each target, already shifted: logits[:, i] is for targets[:, i].
      weights: 1 where a token counts; 0 on padding.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = (jax.nn.logsumexp(logits, axis=-1) - chosen) * weights
    return jnp.sum(loss) / jnp.maximum(jnp.sum(weights), 1.0)


def task_loss(setup, frozen, loras, batch, prompt, prompt_mask, prompt_embedding=None) -> Float[Array, ""]:
    """Returns the cross-entropy of the answers under the actor, with the given prompts and each row's own LoRA.

    Source: MetaTuner (arXiv 2509.24245), the task term of its joint objective.
    """
    logits = actor.answer_logits(
        setup, frozen, loras, prompt, prompt_mask, batch["query"], batch["query_mask"], batch["answer"], prompt_embedding
    )
    return token_loss(logits, batch["answer"], batch["answer_mask"].astype(jnp.float32))


def prompt_loss(setup, weights, states, batch) -> Float[Array, ""]:
    """Returns the cross-entropy of the expert prompts under the generator, end token included.

    Source: MetaTuner (arXiv 2509.24245), supervised regularisation on D2.

    Args:
      weights: the generator's parameters as `transformer` takes them.
      states: [b, m, d]: the packed pass's last states for the expert prompt.
    """
    logits = transformer.logits(setup.generator, weights, states)
    return token_loss(logits, batch["expert"], batch["expert_mask"].astype(jnp.float32))


def joint_loss(setup, params, prompt_copy, frozen, batch, key):
    """Returns (task loss + prompt_weight * prompt loss, metrics): one step of MetaTuner-J, sampling included.

    Args:
      params: the tree that learns.
      prompt_copy: the frozen copy of params["prompt"], from which prompts are sampled where prompts are constants.
      batch: see `data.batch_at`.
      key: of this step.
    """
    config = setup.config
    rows = jnp.arange(batch["generator"].shape[0])
    relaxed = config.train.prompt_gradient == "straight_through"
    writer = params if relaxed else {**params, "prompt": prompt_copy}
    query = generator.read(setup, params, frozen, batch["generator"], batch["generator_mask"], batch["own"])
    prefill = generator.start(setup, params, frozen, query)
    begin = prefill if relaxed else generator.start(setup, writer, frozen, query)
    sampled = generator.write(setup, writer, frozen, begin, key, rows, config.generator.temperature)

    prompts = [(batch["expert"], batch["expert_mask"])]
    if relaxed:
        prompts.append((sampled.tokens, sampled.mask))
    expert_states, *sampled_states = generator.packed(setup, params, frozen, prefill, prompts)
    loras = generator.adapt(setup, params["hyper"], query.h)
    weights, _ = generator.language_model(setup, params, frozen)
    embedding = None
    if relaxed:
        logits = transformer.logits(setup.generator, weights, sampled_states[0])
        source = frozen.actor["embed"]["embedding"]
        embedding = generator.relaxed_prompt(setup, logits, sampled, source, frozen.allowed, key, rows)

    task = task_loss(setup, frozen, loras, batch, sampled.tokens, sampled.mask, embedding)
    prompt = prompt_loss(setup, weights, expert_states, batch)
    written, expert = jnp.sum(sampled.mask), jnp.sum(batch["expert_mask"])
    words = jnp.sum(sampled.mask & (sampled.tokens != setup.end_id))
    read = jnp.sum(batch["generator_mask"]) + expert + written
    read += rows.size * len(setup.prefix) + words + jnp.sum(batch["query_mask"]) + jnp.sum(batch["answer_mask"])
    return task + config.train.prompt_weight * prompt, {
        "task_loss": task,
        "prompt_loss": prompt,
        "delta_norm": jnp.sqrt(jnp.mean(lora.squared_norm(loras))),
        "prompt_tokens": written / rows.size,
        "expert_tokens": expert,
        "tokens": read,
    }
