"""The phases of a run, the compiled step of each, and the loop around them."""

import contextlib
import dataclasses
import functools
import gc
import re
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metatuner_jax import config as config_lib
from metatuner_jax import (
    data,
    evaluate,
    generator,
    lora,
    losses,
    preference,
    product,
    rollout,
    search,
    sharding,
    stopping,
    transformer,
)


@flax.struct.dataclass
class TrainState:
    step: Any  # int32 [], updates done so far, in all phases
    params: Any  # all that learns, by part: {"embed", "shared", "prompt", "hyper"} and what `generator.init` adds
    prompt_copy: Any  # params["prompt"] as of the last multiple of sync_every; {} where prompts have a gradient or are not written
    opt_state: Any  # by part; {} for a part that no longer learns
    bad_steps: Any  # int32 [], steps in a row that were not applied


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps with one objective."""

    name: str  # 'actor', 'generator' or 'joint'
    first: int  # number of its first step, counted through all phases
    steps: int
    learning_rate: float
    turns: tuple[tuple[Any, tuple[str, ...]], ...]  # (loss, the parts that it teaches); more than one take turns
    turn_steps: int = 1  # steps of one before the next one's turn
    rollouts: bool = False  # whether the expert set is refreshed

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part that learns in some turn."""
        return tuple(dict.fromkeys(part for _, parts in self.turns for part in parts))

    def turn_at(self, step: int) -> int:
        """Returns the place in `turns` of a step, counted through all phases."""
        return (step - self.first) // self.turn_steps % len(self.turns)


def phases(setup) -> list[Phase]:
    """Returns the phases of a run in their order, without empty ones.

    Source: MetaTuner (arXiv 2509.24245): two warm-ups, then the joint phase, whose terms are summed (J) or take turns (I).
    """
    config, method = setup.config, setup.method
    joint = functools.partial(losses.joint_loss, setup)
    only = lambda term: functools.partial(joint, terms=(term,))
    turns: tuple[tuple[Any, tuple[str, ...]], ...]
    if method.preference:
        turns = ((functools.partial(losses.preference_loss, setup), method.parts),)
    elif method.alternating:
        parts = method.parts
        turns = (
            (only("task"), tuple(part for part in parts if part != "prompt")),
            (only("prompt"), tuple(part for part in parts if part not in ("hyper", "encoder"))),
        )
    else:
        turns = ((joint, method.parts),)
    planned = [
        ("actor", config.warmup.actor_steps, config.warmup.learning_rate, ((functools.partial(losses.actor_loss, setup), ("actor",)),), 1),
        ("generator", config.warmup.generator_steps, config.warmup.learning_rate, ((only("prompt"), ("embed", "shared", "prompt")),), 1),
        ("joint", config.train.num_steps if method.learns else 0, config.train.learning_rate, turns, config.train.alternate_every),
    ]
    found, first = [], 0
    for name, steps, rate, turns, turn_steps in planned:
        if steps:
            rollouts = bool(config.rollout.every) and name != "actor" and (method.prompt != "initial" or method.preference)
            found.append(Phase(name, first, steps, rate, turns, turn_steps, rollouts))
            first += steps
    return found


def phase_at(planned: list[Phase], step: int) -> Phase:
    """Returns the phase of a step, counted through all phases; the last one's after the end."""
    return next((phase for phase in planned if step < phase.first + phase.steps), planned[-1])


# --- the optimiser ---


def make_optimizer(config: config_lib.TrainConfig) -> optax.GradientTransformation:
    """Returns AdamW but for the rate (see `rate_at`), which every part of the tree has an own instance of."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay))


def rate_at(config: config_lib.TrainConfig, phase: Phase, step):
    """Returns the learning rate after `step` steps of a phase: a linear rise, then what the config names."""
    peak, rise, steps = phase.learning_rate, config.warmup_steps, max(phase.steps, config.warmup_steps + 1)
    first, last = peak / (rise + 1), peak * (1.0 if config.decay == "constant" else config.final_rate)
    if config.decay == "linear":
        fall = optax.linear_schedule(peak, last, steps - rise)
        return optax.join_schedules([optax.linear_schedule(first, peak, rise), fall], [rise])(step)
    return optax.warmup_cosine_decay_schedule(first, peak, rise, steps, last)(step)


def relative_rates(config: config_lib.TrainConfig, phase: Phase, part: str, tree):
    """Returns each leaf's learning rate over the phase's, for a part of the tree. They differ beside a hypernetwork only.

    Adam moves each number by its rate. A bias moves the LoRA by as much, a weight by that times what it is multiplied with, summed over
    the hidden width: so the hypernetwork's weights want a smaller rate, and its biases that of a static LoRA. Where the generator moves
    fast, the states that the hypernetwork reads and the prompts that the actor reads move under what was learnt from them, and the delta
    grows without bound.
    """
    alone = phase.name != "joint" or "hyper" not in phase.parts

    def one(path, leaf):
        if alone or (part == "hyper" and re.search(r"(_bias|/[ab])$", sharding.path_text(path))):
            return 1.0
        return config.hyper_rate if part == "hyper" else config.generator_rate

    return jax.tree_util.tree_map_with_path(one, tree)


def init_state(setup, params: dict) -> TrainState:
    """Returns the state before the first update."""
    config = setup.config.train
    copies = "prompt" in params and setup.method.adapter is not None and config.prompt_gradient == "none"
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params["prompt"] if copies else {})
    tx = make_optimizer(config)
    return TrainState(jnp.int32(0), params, copy, {part: tx.init(tree) for part, tree in params.items()}, jnp.int32(0))


def rest(state: TrainState, planned: list[Phase], step: int) -> TrainState:
    """Returns the state, as of `step`, without the moments of parts that no coming step teaches: an actor warmed up in full has large ones.

    After the last step those of its phase are there yet, as the run may be given more steps.
    """
    coming = {part for phase in planned if step < phase.first + phase.steps or phase is planned[-1] for part in phase.parts}
    return dataclasses.replace(state, opt_state={part: tree if part in coming else {} for part, tree in state.opt_state.items()})


# --- the step ---


@contextlib.contextmanager
def uncollected():
    """Has Python's garbage collector wait.

    To trace and lower a step makes objects by the million, all of them wanted: to look through them again and again takes a third of
    the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_train_step(loss_fn, config: config_lib.TrainConfig, phase: Phase, parts: tuple[str, ...]):
    """Returns step(state, frozen, batch, key) -> (state, metrics), compiled once, its state donated.

    Parts that are not named stay as they are: no update, no moments, no decay. A step whose loss or gradient is not finite changes
    nothing but the counts.

    Args:
      loss_fn: (params, prompt_copy, frozen, batch, key, step) -> (loss, metrics), such as `losses.joint_loss` after its setup.
      parts: of the tree, those that learn.
    """
    tx = make_optimizer(config)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=product.compiler_options())
    def train_step(state, frozen, batch, key):
        key, done, copy = begin(config, phase, state, key)
        learning = {part: state.params[part] for part in parts}

        def gradient(batch):
            loss_of = lambda learning: loss_fn({**state.params, **learning}, copy, frozen, batch, key, done)
            return jax.value_and_grad(loss_of, has_aux=True)(learning)

        (loss, metrics), grads = in_parts(gradient, batch, config.accumulate)
        grads = sharding.placed_in_jit(grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
        params, opt_state = dict(state.params), dict(state.opt_state)
        for part in parts:
            updates, moments = tx.update(jax.tree.map(lambda leaf: clip * leaf, grads[part]), state.opt_state[part], state.params[part])
            rate, relative = rate_at(config, phase, done), relative_rates(config, phase, part, updates)
            scaled = jax.tree.map(lambda leaf, times: -rate * times * leaf, updates, relative)
            updated = optax.apply_updates(state.params[part], scaled)
            params[part], opt_state[part] = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (updated, moments), (state.params[part], state.opt_state[part])
            )
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        state = TrainState(state.step + 1, params, copy, opt_state, bad_steps)
        return state, {**metrics, "loss": loss, "grad_norm": norm, "bad_steps": bad_steps}

    return train_step


def in_parts(gradient, batch: dict, count: int):
    """Returns what gradient(batch) does, ((loss, metrics), gradients), of rows that are worked on in `count` parts, one after the other.

    The loss is that of all rows together, one mean over their tokens, not a mean of the parts' means: each part is told how many tokens
    the parts have on average. Row i's part is i % count, so that what stands on a device stays there.
    """
    if count == 1:
        return gradient(batch)
    rows = batch["query"].shape[0]
    batch = {**batch, "place": jnp.arange(rows)}
    parts = {name: leaf.reshape(rows // count, count, *leaf.shape[1:]).swapaxes(0, 1) for name, leaf in batch.items()}
    counts = {f"{name}_count": jnp.sum(batch[f"{name}_mask"]) / count for name in ("answer", "expert") if f"{name}_mask" in batch}
    one = lambda part: gradient({**part, **counts})
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, {name: leaf[0] for name, leaf in parts.items()}))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zero, parts)
    (loss, metrics), grads = jax.tree.map(lambda leaf: leaf / count, total)
    return (loss, {**metrics, **{name: total[0][1][name] for name in ("tokens", "expert_tokens") if name in metrics}}), grads


def begin(config: config_lib.TrainConfig, phase: Phase, state: TrainState, key):
    """Returns what a step starts from: (its key, the steps of the phase done, the copy of the prompt decoder as of now)."""
    done, copy = state.step - phase.first, state.prompt_copy
    if copy:
        synced = done % config.sync_every == 0
        copy = jax.tree.map(lambda old, live: jnp.where(synced, live, old), copy, state.params["prompt"])
    return jax.random.fold_in(key, state.step), done, copy


def make_gradient_share(setup, phase: Phase):
    """Returns share(state, frozen, batch, key) -> the task term's part of the gradient in the shared layers, 0 to 1, in the coming step.

    Its norm over the sum of both terms' norms, the prompt term's with its weight, which is 1 where the terms take turns. A forward and
    backward pass of each term.
    """
    config = setup.config.train

    @functools.partial(jax.jit, compiler_options=product.compiler_options())
    def share(state, frozen, batch, key):
        key, done, copy = begin(config, phase, state, key)

        def norm(term):
            def loss_of(shared):
                return losses.joint_loss(setup, {**state.params, "shared": shared}, copy, frozen, batch, key, done, terms=(term,))[0]

            return optax.tree.norm(jax.grad(loss_of)(state.params["shared"]))

        weight = 1.0 if setup.method.alternating else config.prompt_weight
        task, prompt = norm("task"), weight * norm("prompt")
        return task / jnp.maximum(task + prompt, 1e-30)

    return share


# --- between phases ---


def warmed_up(setup, frozen: generator.Frozen, params: dict) -> generator.Frozen:
    """Returns the frozen weights after the actor's warm-up: its LoRA merged into them, or its own weights in their place."""
    if setup.config.warmup.actor_train == "full":
        actor = jax.tree.map(lambda leaf: jnp.array(leaf, setup.dtype, copy=True), params["actor"])
        return dataclasses.replace(frozen, actor=actor)
    loras, layers = generator.static(params["actor"], setup.config.warmup.scale), frozen.actor["layers"]
    stacks = layers if isinstance(layers, tuple) else (layers,)
    merged, first = [], 0
    for stack in stacks:
        size = jax.tree.leaves(stack)[0].shape[0]
        merged.append(jax.jit(lora.merge)(stack, transformer.cut(loras, first, first + size)))
        first += size
    return dataclasses.replace(frozen, actor={**frozen.actor, "layers": tuple(merged) if isinstance(layers, tuple) else merged[0]})


# --- the loop ---

NOT_VALIDATED = -1.0  # the score of checkpoints that are there to resume from alone: a warm-up's, and where a run was stopped


class Trainer:
    """All that the loop of one run works with.

    `fit` is the loop; what it needs between two steps (rollouts, pairs, validation) are functions of other modules.
    """

    def __init__(self, passes, keys, rows, experts, pairs, tokens, score, checkpoints, log, profile=None):
        """Takes the run's parts.

        Args:
          passes: `passes.Passes`, with the setup and the frozen weights.
          keys: {"step", "rollout"}: the run's keys.
          rows: {"train", "validation"}: `data.Rows`.
          pairs: `preference.Pairs`, used by dpo alone.
          log: log(metrics), for each step.
          profile: the folder for what jax's profiler records, where it is asked to.
        """
        self.passes, self.setup, self.keys, self.rows, self.experts, self.pairs = passes, passes.setup, keys, rows, experts, pairs
        self.tokens, self.score, self.checkpoints, self.log, self.profile = tokens, score, checkpoints, log, profile
        self.config, self.phases = self.setup.config, phases(self.setup)
        self.total = sum(phase.steps for phase in self.phases)
        self.warm = False  # whether the warmed-up actor is in place
        self.state, self.saved = None, None  # while `fit` runs: the newest state, and the step of the newest checkpoint
        self.compiled, self.share = {}, None  # steps by phase and turn, and the measurement of both terms' gradients
        self.searched = None  # the prompt for all rows that the newest search of this process settled on
        self.unlogged = []  # the lines of steps since the newest one that was logged

    def fit(self, state: TrainState) -> TrainState:
        """Trains from `state.step` to the last step: rollouts, steps, validation and checkpoints. Returns the last state.

        Raises:
          RuntimeError: too many steps in a row were not finite, or the expert set is not in use.
          Stopped: the process was asked to stop; what was done is being written to a checkpoint.
        """
        self.state, self.saved = state, int(state.step)
        try:
            with contextlib.ExitStack() as recording:
                return self._fit(state, recording)
        except stopping.Stopped:
            step = int(self.state.step)
            self.write_log()
            if step != self.saved:
                self.checkpoints.save(step, rest(self.state, self.phases, step), NOT_VALIDATED)
            raise
        finally:
            self.state = None

    def _fit(self, state: TrainState, recording: contextlib.ExitStack) -> TrainState:
        progress, first = self.passes.progress, int(state.step)
        with progress.task("training", self.total, first) as advance:
            for step in range(first, self.total):
                phase = phase_at(self.phases, step)
                if len(self.phases) > 1 and step in (first, phase.first):
                    progress.line(f"  step {step}: {'training' if phase.name == 'joint' else f'warm-up of the {phase.name}'}")
                    state = rest(state, self.phases, step)
                self.enter(step, state)
                if phase.name == "joint" and step == phase.first:
                    state = self.standardise(state)
                extra = {"phase": phase.name}
                if phase.rollouts and (step - phase.first) % self.config.rollout.every == 0:
                    extra |= self.refresh(state, step)
                self.record(step - first, recording)
                with progress.stop.held():
                    state = self.do_step(state, step, phase, extra, advance)
                progress.stop.check()
        self.enter(self.total, state)
        return state

    def record(self, done: int, recording: contextlib.ExitStack) -> None:
        """Has jax's profiler record the steps that are to be, after so many of this process: the first two wait for the compiler."""
        count, wait = self.config.train.profile_steps, 2
        if count and done == wait:
            self.passes.progress.line(f"  recording {count} steps for {self.profile}")
            recording.enter_context(jax.profiler.trace(self.profile))
        if done == wait + count:
            recording.close()

    def do_step(self, state: TrainState, step: int, phase: Phase, extra: dict, advance) -> TrainState:
        """Does a step, its line in the log and, where they are due, validation and a checkpoint. Returns the state.

        Args:
          extra: what else the line is to hold.
          advance: as `Progress.task` yields it.
        """
        config, progress, turn = self.config, self.passes.progress, phase.turn_at(step)
        progress.now("steps")
        start = time.perf_counter()
        if (phase.name, turn) not in self.compiled:
            self.compiled[phase.name, turn] = make_train_step(phase.turns[turn][0], config.train, phase, phase.turns[turn][1])
        batch = data.trim(self.batch_at(phase, step), config.data.buckets)
        rows = batch.pop("rows")
        batch = sharding.place_rows(batch, self.passes.mesh)
        if phase.name == "joint" and self.diagnoses(step - phase.first):
            self.share = self.share or make_gradient_share(self.setup, phase)
            some = {name: leaf[:: config.train.accumulate] for name, leaf in batch.items()}
            extra["task_gradient_share"] = float(self.share(state, self.passes.frozen, some, self.keys["step"]))
            start = time.perf_counter()
        with uncollected():
            state, metrics = self.compiled[phase.name, turn](state, self.passes.frozen, batch, self.keys["step"])
        self.state = state
        metrics = {name: np.asarray(value).item() for name, value in metrics.items()}  # waits for the device
        step_s = time.perf_counter() - start
        metrics |= {"tokens_per_s": metrics["tokens"] / step_s, "step_s": step_s, **self.experts.summary(), **extra}
        advance(1, f"loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:.0f} tokens/s")
        if metrics["bad_steps"]:
            metrics["ids"] = [self.rows["train"].examples[row].id for row in rows]
        last = step + 1 == phase.first + phase.steps
        saves = last or (step + 1 - phase.first) % config.train.checkpoint_every == 0
        if saves and phase.name == "joint":
            metrics["validation"] = self.validate(state)
        self.unlogged.append({"step": step, **metrics})
        if saves or metrics["bad_steps"] or {"rollout_s", "task_gradient_share"} & set(extra) or (step + 1 - phase.first) % config.train.log_every == 0:
            self.write_log()
        self.checkpoints.tend()
        if metrics["bad_steps"] >= config.train.max_bad_steps:
            raise RuntimeError(
                f"steps {step + 1 - metrics['bad_steps']} to {step} had a loss or gradient that is not finite and were not applied "
                "(metrics.jsonl has their rows' ids): lower train.learning_rate or hyper.scale, and start again in a new --workdir"
            )
        if saves:
            if phase.name == "joint":
                percent = f"{100 * metrics['validation']['mean']:.1f}% of {len(self.rows['validation'])}"
                progress.line(f"  step {step + 1}: validation {percent}, checkpoint")
            score = metrics["validation"]["mean"] if "validation" in metrics else NOT_VALIDATED
            self.checkpoints.save(step + 1, rest(state, self.phases, step + 1), score)
            self.saved = step + 1
        return state

    def write_log(self) -> None:
        """Logs the steps that are not yet, in one line: the last one's, its time and tokens the means of all."""
        lines, self.unlogged = self.unlogged, []
        if not lines:
            return
        line, seconds, tokens = lines[-1], sum(line["step_s"] for line in lines), sum(line["tokens"] for line in lines)
        if len(lines) > 1:
            line |= {"steps": len(lines), "step_s": seconds / len(lines), "tokens": tokens / len(lines), "tokens_per_s": tokens / seconds}
        self.log(_rounded(line))

    def enter(self, step: int, state: TrainState) -> None:
        """Puts the warmed-up actor in its place where the actor's warm-up is over, at `step` or before."""
        if "actor" in state.params and not self.warm and step >= self.config.warmup.actor_steps:
            self.passes.frozen = warmed_up(self.setup, self.passes.frozen, state.params)
            self.warm = True

    def standardise(self, state: TrainState) -> TrainState:
        """Returns the state with which the joint phase begins: its hypernetwork reads states of mean 0 and variance 1."""
        if self.setup.method.adapter != "generated" or not self.config.hyper.standardize:
            return state
        if np.any(sharding.fetch(state.params["hyper"]["shift"])):  # as the run had it that this one started from
            return state
        rows = self.rows["train"]
        h = self.passes.encode(state.params, rows, np.arange(min(self.config.eval.num_mean, len(rows))))
        share = np.sum(np.var(h, axis=0)) / np.mean(np.sum(np.square(h), axis=1))
        self.passes.progress.line(f"  states of {len(h)} queries: {100 * share:.2g}% of their square differs between queries, standardised")
        hyper = sharding.place({"hyper": generator.standardise(state.params["hyper"], jnp.asarray(h))}, self.passes.mesh)
        return dataclasses.replace(state, params={**state.params, **hyper})

    def diagnoses(self, done: int) -> bool:
        """Returns whether a step of the joint phase measures the terms' gradients: not the first, when the delta is 0 and so is the task's."""
        both = self.setup.method.prompt == "written" and self.setup.method.adapter is not None and self.setup.method.shared
        return both and bool(self.config.train.diagnose_every) and (done + 1) % self.config.train.diagnose_every == 0

    def validate(self, state: TrainState) -> dict:
        """Returns what `evaluate.validate` finds on the validation rows."""
        self.passes.progress.now("evaluation")
        return evaluate.validate(self.passes, state.params, self.rows["validation"], self.tokens, self.score, self.experts.for_all())

    def last_search(self, state: TrainState, best: int | None) -> list[int] | None:
        """Returns the ids of the prompt for all rows with which the trained actor answers, None where each row has its own.

        Methods that search end with a search under the final adapter.

        Args:
          best: the step of the checkpoint that `state` is, None where nothing was trained.
        """
        if self.setup.method.prompt != "searched":
            return None
        self.log({"step": self.total, "phase": "search", **self.refresh(state, self.total, best)})
        return self.searched

    def batch_at(self, phase: Phase, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step: of the rows, or for preferences of the pairs found so far."""
        config, done = self.config, step - phase.first
        if phase.name == "joint" and self.setup.method.preference:
            return self.pairs.batch_at(done, self.rows["train"], self.experts, config.train.batch_size, config.seed)
        tried = np.flatnonzero(~np.isnan(self.experts.scores))
        if phase.name == "generator" and len(tried):  # the others' experts are the initial prompt, which is not what a warm-up is for
            order = data.order_at(done, len(tried), config.train.batch_size, config.seed)
            return data.batch_of(tried[order], self.rows["train"], self.experts)
        batch = data.batch_at(done, self.rows["train"], self.experts, config.train.batch_size, config.seed)
        if config.train.prompt_weight and phase.name != "actor" and not batch["expert_mask"].any(axis=1).all():
            raise RuntimeError(f"step {step}: the expert set is not in use: a query of the batch has no expert prompt")
        return batch

    def refresh(self, state: TrainState, step: int, best: int | None = None) -> dict:
        """Does what comes before a step now and then: rollouts, a search or pairs of answers. Returns its metrics.

        Args:
          best: a search starts from the best prompt as of this step; None: of all.
        """
        self.passes.progress.now("rollouts")
        tokens = self.passes.tokens
        start, phase = time.perf_counter(), phase_at(self.phases, step) if self.phases else None
        key = jax.random.fold_in(self.keys["rollout"], step)
        done, num_steps = (step - phase.first, phase.steps) if phase else (0, 0)
        rows = self.rows["train"]
        common = (self.passes, state.params, key, rows, self.experts)
        if self.setup.method.preference:
            found = preference.refresh(*common, self.pairs, self.tokens, self.score, step, done, num_steps)
        elif self.setup.method.prompt == "searched":
            found = search.search(*common, self.tokens, self.score, step, done, self.experts.for_all(best))
        else:
            found = rollout.refresh(*common, self.tokens, self.score, step, done, num_steps)
        self.searched = found.pop("prompt", None)
        found["rollout_tokens"] = self.passes.tokens - tokens
        found["rollout_s"] = round(time.perf_counter() - start, 3)
        self.passes.progress.line(f"  step {step}: {found.pop('what')}, {found['rollout_s']:.0f} s{self.budget_left(step, found)}")
        return found

    def budget_left(self, step: int, found: dict) -> str:
        """Returns how many answers for training are decoded, of how many, and how long the rest will take."""
        config, calls = self.config, self.experts.calls + self.pairs.calls
        left = sum(
            self.calls_of_refresh() for phase in self.phases if phase.rollouts
            for at in range(phase.first, phase.first + phase.steps, config.rollout.every) if at > step
        )  # fmt: skip
        if self.setup.method.prompt == "searched" and step < self.total:
            left += self.calls_of_refresh()  # the last one, after training
        total = min(calls + left, max(config.rollout.budget or calls + left, calls))
        text = f"; {calls} of at most {total} actor calls"
        if total > calls and found["rollout_attempts"]:
            minutes, seconds = divmod(int((total - calls) * found["rollout_s"] / found["rollout_attempts"]), 60)
            text += f", the rest in {minutes}:{seconds:02d}"
        return text

    def calls_of_refresh(self) -> int:
        """Returns how many answers one refresh decodes at most."""
        config, queries = self.config.rollout, min(self.config.rollout.num_queries, len(self.rows["train"]))
        if self.setup.method.preference:
            return queries * self.config.preference.num_samples
        if self.setup.method.prompt == "searched":
            return queries * (1 + config.search_rounds * config.search_prompts)
        return queries * (config.num_prompts + 1)


def _rounded(metrics):
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in metrics.items()}
