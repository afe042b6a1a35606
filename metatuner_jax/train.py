"""The joint phase: one compiled step, and the loop around it."""

import functools
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metatuner_jax import config as config_lib
from metatuner_jax import data, evaluate, rollout, sharding


@flax.struct.dataclass
class TrainState:
    step: Any  # int32 [], updates done so far
    params: Any  # all that learns: {"embed", "shared", "prompt", "hyper"}
    prompt_copy: Any  # params["prompt"] as of the last multiple of sync_every; {} where prompts have a gradient
    opt_state: Any
    bad_steps: Any  # int32 [], steps in a row that were not applied


def make_optimizer(config: config_lib.TrainConfig) -> optax.GradientTransformation:
    """Returns AdamW with clipping by the global norm, a linear warm-up, and the decay and rates that the config names.

    The generator has a rate of its own: where it moves fast, the states that the hypernetwork reads and the prompts that the actor reads
    move under what was learnt from them, and the delta grows without bound.
    """
    final = 0.1 if config.decay == "cosine" else 1.0
    rate = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.num_steps, config.warmup_steps + 1),
        end_value=final * config.learning_rate,
    )

    def scale_generator(updates, _):
        scaled = jax.tree.map(lambda update: config.generator_rate * update, updates)
        return {**scaled, "hyper": updates["hyper"]}

    adam = optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam, optax.stateless(scale_generator))


def init_state(config: config_lib.TrainConfig, params: dict) -> TrainState:
    """Returns the state before the first update."""
    copy = params["prompt"] if config.prompt_gradient == "none" else {}
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), copy)
    return TrainState(jnp.int32(0), params, copy, make_optimizer(config).init(params), jnp.int32(0))


def make_train_step(loss_fn, tx, sync_every: int):
    """Returns step(state, frozen, batch, key) -> (state, metrics), compiled once, its state donated.

    A step whose loss or gradient is not finite changes nothing but the counts.

    Args:
      loss_fn: (params, prompt_copy, frozen, batch, key) -> (loss, metrics), such as `losses.joint_loss` after its setup.
      sync_every: steps between copies of params["prompt"] into the frozen copy.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        copy = state.prompt_copy
        if copy:
            synced = state.step % sync_every == 0
            copy = jax.tree.map(lambda old, live: jnp.where(synced, live, old), copy, state.params["prompt"])
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, copy, frozen, batch, key)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        state = TrainState(state.step + 1, params, copy, opt_state, bad_steps)
        return state, {**metrics, "loss": loss, "grad_norm": norm, "bad_steps": bad_steps}

    return train_step


def fit(setup, frozen, state, train_step, keys, rows, experts, tokens, score, passes, checkpoints, mesh, log) -> TrainState:
    """Trains from `state.step` to the last step: rollouts, steps, validation and checkpoints. Returns the last state.

    Args:
      keys: {"step", "rollout"}: the run's keys.
      rows: {"train", "validation"}: `data.Rows`.
      log: log(metrics), for each step.

    Raises:
      RuntimeError: too many steps in a row were not finite, or the expert set is not in use.
    """
    config, progress = setup.config, passes.progress
    total, first = config.train.num_steps, int(state.step)
    with progress.task("training", total, first) as advance:
        for step in range(first, total):
            extra = {}
            if config.rollout.every and step % config.rollout.every == 0:
                start = time.perf_counter()
                key = jax.random.fold_in(keys["rollout"], step)
                extra = rollout.refresh(passes, state.params, key, rows["train"], experts, tokens, score, step)
                extra["rollout_s"] = round(time.perf_counter() - start, 3)
                progress.line(
                    f"  step {step}: rollouts for {extra['rollout_queries']} queries, {extra['rollout_attempts']} attempts: "
                    f"{extra['rollout_changed']} new experts, mean score {extra['rollout_score']:.2f}, {extra['rollout_s']:.0f} s"
                )
            start = time.perf_counter()
            batch = data.batch_at(step, rows["train"], experts, config.train.batch_size, config.seed)
            if config.train.prompt_weight and not batch["expert_mask"].any(axis=1).all():
                raise RuntimeError(f"step {step}: the expert set is not in use: a query of the batch has no expert prompt")
            state, metrics = train_step(state, frozen, sharding.place_rows(batch, mesh), keys["step"])
            metrics = {name: np.asarray(value).item() for name, value in metrics.items()}  # waits for the device
            step_s = time.perf_counter() - start
            rate = metrics.pop("tokens") / step_s
            log({"step": step, **_rounded({**metrics, "tokens_per_s": rate, "step_s": step_s}), **extra})
            if metrics["bad_steps"] >= config.train.max_bad_steps:
                raise RuntimeError(
                    f"the last {metrics['bad_steps']} steps up to {step} had a loss or gradient that is not finite and were not applied: "
                    "lower train.learning_rate or hyper.scale, and start again in a new --workdir"
                )
            advance(1, f"loss {metrics['loss']:.3f}, {rate:.0f} tokens/s")
            if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == total:
                score_now = evaluate.validate(passes, state.params, rows["validation"], tokens, score)
                progress.line(f"  step {step + 1}: validation {100 * score_now:.1f}% of {len(rows['validation'])}, checkpoint")
                checkpoints.save(step + 1, state, score_now)
    return state


def _rounded(metrics):
    return {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in metrics.items()}
