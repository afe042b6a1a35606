"""The terms of the objective, and their sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metatuner_jax import actor, decode, generator, int8, lora, transformer


def token_loss(log_likelihoods: Float[Array, "b t"], weights: Float[Array, "b t"], count=None) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the targets, in nats per weighted token.

    One mean over the whole batch, not a mean of row means: a long answer counts for more than a short one.

    Args:
      log_likelihoods: of each target.
      weights: 1 where a token counts; 0 on padding.
      count: over which the mean is taken, where the rows are a part of a batch; None: the sum of the weights.
    """
    return -jnp.sum(log_likelihoods * weights) / jnp.maximum(jnp.sum(weights) if count is None else count, 1.0)


def task_loss(setup, frozen, loras, batch, prompt, prompt_mask, prompt_embedding=None) -> Float[Array, ""]:
    """Returns the cross-entropy of the answers under the actor, with the given prompts and each row's own LoRA.

    Source: MetaTuner (arXiv 2509.24245), the task term of its joint objective.
    """
    found = actor.log_likelihoods(
        setup, frozen, loras, prompt, prompt_mask, batch["query"], batch["query_mask"], batch["answer"], prompt_embedding
    )
    return token_loss(found, batch["answer_mask"].astype(jnp.float32), batch.get("answer_count"))


def prompt_loss(setup, weights, states, batch) -> Float[Array, ""]:
    """Returns the cross-entropy of the expert prompts under the generator, end token included.

    Source: MetaTuner (arXiv 2509.24245), supervised regularisation on D2.

    Args:
      weights: the generator's parameters as `transformer` takes them.
      states: [b, m, d]: the packed pass's last states for the expert prompt.
    """
    found = transformer.log_likelihoods(setup.generator, weights, states, batch["expert"])
    return token_loss(found, batch["expert_mask"].astype(jnp.float32), batch.get("expert_count"))


TERMS = ("task", "prompt")


def joint_loss(setup, params, prompt_copy, frozen, batch, key, step=0, terms=TERMS):
    """Returns (task loss + prompt_weight * prompt loss, metrics): one step of the method, sampling included.

    A term that stands alone has weight 1. A method without written prompts gives the actor the expert prompts, which are then the initial ones or the task's best; it has
    no prompt loss. One without an adapter has no task loss.

    Args:
      params: the tree that learns.
      prompt_copy: the frozen copy of params["prompt"], from which prompts are sampled where prompts are constants.
      batch: see `data.batch_at`.
      key: of this step.
      step: int, steps of the joint phase done.
      terms: those to take, of "task" and "prompt": MetaTuner-I takes one at a time.
    """
    config, method = setup.config, setup.method
    writes = method.prompt == "written"
    task, prompt = "task" in terms and method.adapter is not None, "prompt" in terms and writes
    relaxed = config.train.prompt_gradient == "straight_through"
    rows = batch.get("place", jnp.arange(batch["query"].shape[0]))  # each row's number in the whole batch
    losses, metrics, tokens = {}, {}, 0

    query = loras = embedding = None
    prompts = batch["expert"], batch["expert_mask"]
    templated = batch["generator"], batch["generator_mask"], batch["own"]
    if method.learns_generator:
        query = generator.read(setup, params, frozen, *templated)
        tokens += jnp.sum(batch["generator_mask"]) * (2 if "encoder" in params else 1)
    if writes:
        weights, _ = generator.language_model(setup, params, frozen)
        prefill = generator.start(setup, params, frozen, query)
        segments = [prompts] * prompt
        if task:
            writer = params if relaxed else {**params, "prompt": prompt_copy}
            begin = prefill if relaxed else generator.start(setup, writer, frozen, query)
            temperature = temperature_at(config, step)
            sampled = generator.write(setup, writer, frozen, begin, key, rows, temperature, layers=decode.fastest_layers(True, config.weights))
            prompts = sampled.tokens, sampled.mask
            segments += [prompts] * relaxed
            same = jnp.where(sampled.mask, sampled.tokens, -1) == jnp.where(batch["initial_mask"], batch["initial"], -1)
            metrics |= {"prompt_tokens": jnp.sum(sampled.mask) / rows.size, "initial_share": jnp.mean(jnp.all(same, axis=1))}
            tokens += jnp.sum(sampled.mask)
        states = generator.packed(setup, params, frozen, prefill, segments) if segments else []
        if prompt:
            losses["prompt"] = prompt_loss(setup, weights, states[0], batch)
            metrics["expert_tokens"] = jnp.sum(batch["expert_mask"])
            tokens += metrics["expert_tokens"]
        if task and relaxed:
            embedding = generator.relaxed_prompt(setup, weights, states[-1], sampled, frozen, key, rows, temperature)
    if task:
        loras = adapter(setup, params, frozen, query, templated)
        losses["task"] = task_loss(setup, frozen, loras, batch, *prompts, embedding)
        metrics |= delta_metrics(setup, frozen, loras)
        words = jnp.sum(prompts[1] & (prompts[0] != setup.end_id))
        tokens += rows.size * len(setup.prefix) + words + jnp.sum(batch["query_mask"]) + jnp.sum(batch["answer_mask"])
    loss = losses["task"] + config.train.prompt_weight * losses["prompt"] if len(losses) == 2 else sum(losses.values())
    return loss, {**{f"{name}_loss": value for name, value in losses.items()}, **metrics, "tokens": tokens}


def adapter(setup, params, frozen, query, templated):
    """Returns the LoRA of a batch: each row's own, or the static one of all rows."""
    if setup.method.adapter == "static":
        return generator.static(params["hyper"], setup.config.hyper.scale)
    return generator.adapt(setup, params["hyper"], generator.state(setup, params, frozen, query, *templated))


def temperature_at(config, step):
    """Returns the temperature at which prompts are sampled in a step of the joint phase: `final_temperature` in its last."""
    first, last = config.generator.temperature, config.generator.final_temperature
    return first if last is None else first * (last / first) ** (step / max(config.train.num_steps - 1, 1))


COMPARED_ROWS = 16  # of a batch, whose deltas are measured against each other: all of them would have to come together from all devices


def delta_metrics(setup, frozen, loras) -> dict:
    """Returns the norm of the deltas of a batch's first rows (root mean square over queries), that norm over the adapted weights' own, and for
    generated ones the share of their squared norm that differs between queries and the number of directions that they span.
    """
    loras = jax.lax.stop_gradient(loras)
    layers = frozen.actor["layers"]
    stacks = layers if isinstance(layers, tuple) else (layers,)
    weights = sum(jnp.sum(jnp.square(int8.dense(stack[name]))) for stack in stacks for name in loras)
    if setup.method.adapter == "static":
        norm = lora.norm(loras)
        return {"delta_norm": norm, "delta_ratio": norm / jnp.sqrt(weights)}
    gram = lora.gram(jax.tree.map(lambda leaf: leaf[:, :COMPARED_ROWS], loras))
    squared = jnp.mean(jnp.diagonal(gram))
    found = {"delta_norm": jnp.sqrt(squared), "delta_ratio": jnp.sqrt(squared / weights)}
    if gram.shape[0] == 1:  # a part of a batch, which has nothing to differ from
        return found
    variance = 1 - jnp.mean(gram) / jnp.where(squared > 0, squared, jnp.inf)
    return {**found, "delta_variance": jnp.where(squared > 0, variance, 0.0), "delta_rank": lora.effective_rank(gram)}


def actor_loss(setup, params, prompt_copy, frozen, batch, key, step):
    """Returns (loss, metrics) of the actor's warm-up: cross-entropy of the answers under the initial prompt.

    Source: MetaTuner (arXiv 2509.24245), supervised fine-tuning before the joint phase.
    """
    config = setup.config.warmup
    if config.actor_train == "full":
        frozen = frozen.replace(actor=jax.tree.map(lambda leaf: leaf.astype(setup.dtype), params["actor"]))
        loras = None
    else:
        loras = generator.static(params["actor"], config.scale)
    loss = task_loss(setup, frozen, loras, batch, batch["initial"], batch["initial_mask"])
    words = jnp.sum(batch["initial_mask"]) - batch["initial_mask"].shape[0]
    prefix = batch["query"].shape[0] * len(setup.prefix)
    tokens = prefix + words + jnp.sum(batch["query_mask"]) + jnp.sum(batch["answer_mask"])
    return loss, {"task_loss": loss, "tokens": tokens}


def preference_loss(setup, params, prompt_copy, frozen, batch, key, step):
    """Returns (loss, metrics) of direct preference optimisation: -log sigmoid(beta * margin), meaned over pairs.

    The margin is how much more than the reference policy the actor with the adapter prefers `chosen` to `rejected`, by summed
    log-likelihoods, in nats. The reference is the actor without the adapter, from which the adapter started.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    """
    loras = generator.static(params["hyper"], setup.config.hyper.scale)
    twice = lambda name: jnp.concatenate([batch[name]] * 2)
    rows = tuple(twice(name) for name in ("expert", "expert_mask", "query", "query_mask"))
    answers, mask = (jnp.concatenate([batch["chosen" + end], batch["rejected" + end]]) for end in ("", "_mask"))
    policy, reference = (
        actor.log_likelihood(setup, frozen, used, *rows, answers, mask) * jnp.sum(mask, axis=1) for used in (loras, None)
    )
    gain = policy - jax.lax.stop_gradient(reference)
    chosen, rejected = jnp.split(gain, 2)
    margin = setup.config.preference.beta * (chosen - rejected)
    loss = -jnp.mean(jax.nn.log_sigmoid(margin))
    words = jnp.sum(rows[1] & (rows[0] != setup.end_id))
    tokens = 2 * (answers.shape[0] * len(setup.prefix) + words + jnp.sum(rows[3]) + jnp.sum(mask))
    metrics = {"preference_loss": loss, "margin": jnp.mean(margin), "preferred": jnp.mean(margin > 0), "tokens": tokens}
    return loss, {**metrics, **delta_metrics(setup, frozen, loras)}
