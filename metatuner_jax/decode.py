"""Rows are read once; what comes after them is sampled, or followed where it is given, from their keys and values."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from metatuner_jax import product, sharding, transformer
from metatuner_jax.config import ModelConfig


@flax.struct.dataclass
class Prefill:
    """Rows that were read, as what comes after them needs them. Differentiable."""

    mask: Any  # bool [b, t]: what is real; the last column is, in every row
    last: Any  # [b, 1, d]: the residual stream after the last layer, in the last column
    past: Any  # a tuple of `transformer.Cache`, one a stack

    def repeat(self, copies: int) -> "Prefill":
        """Returns every row `copies` times, the copies of a row together."""
        past = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=1), self.past)
        return Prefill(jnp.repeat(self.mask, copies, axis=0), jnp.repeat(self.last, copies, axis=0), past)


@flax.struct.dataclass
class Sampled:
    """What was written after each row."""

    tokens: Any  # int32 [b, m]: up to and with the end token, then the end token again
    mask: Any  # bool [b, m]: True up to and with the end token
    first: Any  # float32 [b]: log-probability, under the model itself, of the first token


@flax.struct.dataclass
class Writing:
    """Rows that are being written, each as far as it has come.

    All of them cache the token that they read next in one column; after the last column comes the first. There is room for what a row
    has read and may write, so that a row which takes the place of one that ended stands as far from its own beginning as any.
    """

    tokens: Any  # int32 [b, m]: what is written, and the end token in the places after it
    count: Any  # int32 [b]: how many are written
    ended: Any  # bool [b]: whether the end token is, or all m
    first: Any  # float32 [b]: as in `Sampled`
    rows: Any  # int32 [b]: each row's number (see `gumbel`)
    position: Any  # int32 [b]: of the first token written
    columns: Any  # bool [b, s]: what each row may look at
    column: Any  # int32 []: where the next token that is read goes
    caches: Any  # a tuple of `transformer.Cache`, one a stack or, without a layer axis, one a layer

    def sampled(self) -> Sampled:
        """Returns what is written."""
        return Sampled(self.tokens, jnp.arange(self.tokens.shape[1]) < self.count[:, None], self.first)


OF_ROWS = ("tokens", "count", "ended", "first", "rows", "position", "columns")


def gumbel(key, rows: Int[Array, " b"], position, num_tokens: int) -> Float[Array, "b v"]:
    """Returns Gumbel noise that depends on the key, the row's number and its position alone, an int or int32 [b].

    However rows are batched or spread over devices, a row gets the same noise.
    """

    def one(row, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), position), (num_tokens,))

    return jax.vmap(one)(rows, jnp.broadcast_to(position, rows.shape))


def pick(logits: Float[Array, "b v"], noise, temperature, top_p, allowed: Bool[Array, " v"]) -> Int[Array, " b"]:
    """Returns the next token of each row: argmax of `logits + temperature * noise`, a sample of softmax(logits / temperature).

    Temperature 0 is greedy. Only allowed tokens are taken, and of these the smallest set whose probability reaches `top_p`.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    if top_p < 1.0:
        logits = sharding.split_rows(logits)
        scaled = logits / jnp.maximum(temperature, 1e-6)
        order = -jnp.sort(-scaled, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
        least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(scaled >= least, logits, -jnp.inf)
    if noise is not None:
        logits = logits + temperature * noise
    # The first of the largest. jnp.argmax reduces pairs of number and place, for which XLA has a slow path on CPUs and none where words are split.
    largest, places = jnp.max(logits, axis=-1, keepdims=True), jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits < largest, logits.shape[-1], places), axis=-1)


def prefill(config: ModelConfig, params: dict, x: Float[Array, "b t d"], mask: Bool[Array, "b t"], loras=None) -> Prefill:
    """Reads rows, for `sample` or `follow`.

    Args:
      x: the tokens' embeddings (`transformer.embed`). The last column is real in every row: padding stands on the left, or in holes
        before it.
      loras: as in `transformer.forward`.
    """
    context = transformer.make_context(config, transformer.positions_of(mask), transformer.causal(mask))
    x, past = transformer.run(config, params["layers"], x, context, loras, keep=True)
    return Prefill(mask, x[:, -1:], past)


def follow(config: ModelConfig, params: dict, start: Prefill, segments, loras=None, remat: str = "none") -> list:
    """Returns, for each segment, the last states [b, m, d] from which its tokens are predicted where it comes right after the rows.

    Every segment sees the rows and itself, and no other; all begin at the position after the row. One differentiable pass for all.

    Args:
      segments: pairs (tokens, mask), int and bool [b, m], padding on the right. A segment's last token is predicted and not read.
      loras: as in `transformer.forward`, and those with which the rows were read.
      remat: as `train.remat`.
    """
    b, t = start.mask.shape
    sizes = [tokens.shape[1] - 1 for tokens, _ in segments]
    tokens = jnp.concatenate([tokens[:, :-1] for tokens, _ in segments], axis=1)
    mask = jnp.concatenate([mask[:, :-1] for _, mask in segments], axis=1)
    number = np.repeat(np.arange(len(sizes)), sizes)
    itself = transformer.causal(mask) & (number[:, None] == number)
    attend = jnp.concatenate([jnp.broadcast_to(start.mask[:, None], (b, len(number), t)), itself], axis=-1)
    positions = jnp.sum(start.mask, axis=1, keepdims=True) + np.concatenate([np.arange(size) for size in sizes])
    seen = lambda: jnp.concatenate([transformer.positions_of(start.mask), positions], axis=1)
    context = transformer.make_context(config, positions, attend, positions_seen=seen)
    x = transformer.embed(config, params, tokens)
    x, _ = transformer.run(config, params["layers"], x, context, loras, past=start.past, remat=remat)
    parts = jnp.split(x, np.cumsum(sizes)[:-1], axis=1)
    return [jnp.concatenate([start.last, part], axis=1) for part in parts]


def fastest_layers(in_step: bool = False, weights: str = "dtype") -> str:
    """Returns how many rows are written quickest: a scan reads or copies each layer's weights when it comes to it, an unrolled loop ahead of it.

    In a training step, a CPU scans nevertheless: there, the time to compile grows with what is unrolled. Weights in 8 bits are scanned
    everywhere: they are made wider for each token in any case, and unrolled, all layers' wide copies are alive at once on a CPU.

    Args:
      weights: as the setting of that name.
    """
    return "scan" if weights == "int8" or (in_step and product.platform() == "cpu") else "unroll"


def begin(
    config: ModelConfig, params: dict, start: Prefill, *, max_new_tokens: int, end_id: int, allowed: Bool[Array, " v"], key=None,
    rows: Int[Array, " b"] | None = None, temperature: float | Float[Array, ""] = 0.0, top_p: float = 1.0, layers: str = "scan",
) -> Writing:
    """Returns rows with the first token written, of at most `max_new_tokens`. Arguments are those of `sample`."""
    b, t = start.mask.shape
    grown = lambda leaf: jnp.pad(product.pack(leaf), ((0, 0), (0, 0), (0, 0), (0, max_new_tokens), (0, 0)))
    caches = jax.tree.map(grown, start.past)
    if layers == "unroll":
        caches = tuple(jax.tree.map(lambda leaf: leaf[i], cache) for cache in caches for i in range(cache.k.shape[0]))
    scores = transformer.logits(config, params, start.last)[:, 0]
    rows = jnp.arange(b) if rows is None else rows
    token = pick(scores, _noise(key, rows, 0, scores, temperature), temperature, top_p, allowed)
    first = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), token[:, None], axis=-1)[:, 0]
    return Writing(
        tokens=jnp.full((b, max_new_tokens), end_id, jnp.int32).at[:, 0].set(token), count=jnp.ones(b, jnp.int32),
        ended=(token == end_id) | (max_new_tokens == 1), first=first, rows=rows, position=jnp.sum(start.mask, axis=-1),
        columns=jnp.pad(start.mask, ((0, 0), (0, max_new_tokens))), column=jnp.int32(t), caches=caches,
    )  # fmt: skip


def _noise(key, rows, position, scores, temperature):
    greedy = isinstance(temperature, (int, float)) and temperature == 0
    return None if greedy else gumbel(key, rows, position, scores.shape[-1])


def advance(
    config: ModelConfig, params: dict, state: Writing, *, end_id: int, allowed: Bool[Array, " v"], key=None,
    temperature: float | Float[Array, ""] = 0.0, top_p: float = 1.0, loras=None, until: int | Int[Array, ""] | None = None,
    most: int | None = None,
) -> Writing:
    """Writes on until all rows have ended, or `until` of them, or `most` tokens a row are written. To be called under jit.

    Args:
      params: with what `transformer.unstack` makes of the layers where rows began with layers "unroll". Others are those of `sample`.
    """
    b, m = state.tokens.shape
    dtype = transformer.dtype_of(params)
    loras = jax.tree.map(lambda leaf: leaf.astype(dtype), loras)  # once, and not for each token
    if isinstance(params["layers"], list):
        loras = transformer.unstack(loras) if jax.tree.leaves(loras) else None

    def step(state):
        """Reads each row's newest token, writes its next."""
        columns = jax.lax.dynamic_update_slice(state.columns, jnp.ones((b, 1), bool), (0, state.column))
        newest = jnp.take_along_axis(state.tokens, jnp.maximum(state.count - 1, 0)[:, None], axis=1)
        positions = (state.position + state.count - 1)[:, None]
        seen = lambda: positions_in(columns, state.column)
        context = transformer.make_context(config, positions, columns[:, None], state.column, seen)
        x = transformer.embed(config, params, newest)
        x, caches = transformer.run(config, params["layers"], x, context, loras, caches=state.caches)
        scores = transformer.logits(config, params, x)[:, 0]
        token = pick(scores, _noise(key, state.rows, state.count, scores, temperature), temperature, top_p, allowed)
        here = (jnp.arange(m) == state.count[:, None]) & ~state.ended[:, None]
        count = state.count + ~state.ended
        return state.replace(
            tokens=jnp.where(here, token[:, None], state.tokens), count=count, ended=state.ended | (token == end_id) | (count == m),
            columns=columns, column=(state.column + 1) % columns.shape[1], caches=caches,
        )  # fmt: skip

    goes_on = lambda state: jnp.sum(state.ended) < (b if until is None else until)
    if most is None:
        return jax.lax.while_loop(goes_on, step, state)
    return jax.lax.while_loop(lambda at: goes_on(at[0]) & (at[1] < most), lambda at: (step(at[0]), at[1] + 1), (state, 0))[0]


def positions_in(columns: Bool[Array, "b s"], newest: Int[Array, ""]) -> Int[Array, "b s"]:
    """Returns the position of the token that each column of rows being written holds, where the newest one's column is given."""
    turned = jnp.roll(columns, -1 - newest, axis=1)  # as the tokens stand in their rows, the newest last
    return jnp.roll(transformer.positions_of(turned), 1 + newest, axis=1)


def vacant(new: Writing, loras, b: int):
    """Returns b rows that have ended, with nothing in them, and their LoRA: what `refill` puts rows like `new` into.

    Args:
      loras: of the rows, leaves [l, r, ...], or None.
    """

    def empty(leaf, axis=0):
        return jnp.zeros((*leaf.shape[:axis], b, *leaf.shape[axis + 1 :]), leaf.dtype)

    of_rows = {name: empty(getattr(new, name)) for name in OF_ROWS}
    caches = jax.tree.map(lambda leaf: empty(leaf, leaf.ndim - 4), new.caches)
    state = Writing(**{**of_rows, "ended": jnp.ones(b, bool)}, column=new.column, caches=caches)
    return state, jax.tree.map(lambda leaf: empty(leaf, 1), loras)


def refill(state: Writing, loras, new: Writing, its_loras, places: Int[Array, " r"]):
    """Returns the rows and their LoRA with those of `new`, fresh from `begin`, in the places given; a place of b or more is none.

    What the new rows have read is put right before the column that all rows write next.
    """

    def put(old, new, axis=0):
        return old.at[(slice(None),) * axis + (places,)].set(new, mode="drop")

    turn = state.column - new.column
    its_caches = jax.tree.map(lambda leaf: jnp.roll(leaf, turn, axis=-2), new.caches)
    new = dataclasses.replace(new, columns=jnp.roll(new.columns, turn, axis=1), caches=its_caches)
    of_rows = {name: put(getattr(state, name), getattr(new, name)) for name in OF_ROWS}
    caches = jax.tree.map(lambda old, new: put(old, new, old.ndim - 4), state.caches, new.caches)
    return dataclasses.replace(state, **of_rows, caches=caches), jax.tree.map(lambda old, new: put(old, new, 1), loras, its_loras)


def sample(
    config: ModelConfig, params: dict, start: Prefill, *, max_new_tokens: int, end_id: int, allowed: Bool[Array, " v"], key=None,
    rows: Int[Array, " b"] | None = None, temperature: float | Float[Array, ""] = 0.0, top_p: float = 1.0, loras=None, layers: str = "scan",
) -> Sampled:
    """Returns at most `max_new_tokens` written after each row, until every row has ended. To be called under jit.

    Args:
      start: what `prefill` made of the rows.
      end_id: the end token; a row that wrote it has ended.
      allowed: tokens that may be written; the end token among them.
      key, rows: the noise's key and each row's number (see `gumbel`); needed where `temperature` is above 0.
      temperature: 0 is greedy.
      loras: as in `transformer.forward`, and those with which the rows were read.
      layers: "scan" compiles one layer. "unroll" takes each layer's weights out of the stack before the first token: faster, with a second
        copy of the weights and more to compile (see `fastest_layers`).
    """
    how = {"end_id": end_id, "allowed": allowed, "key": key, "temperature": temperature, "top_p": top_p}
    state = begin(config, params, start, max_new_tokens=max_new_tokens, rows=rows, layers=layers, **how)
    if layers == "unroll":
        params = {**params, "layers": transformer.unstack(params["layers"])}
    return advance(config, params, state, loras=loras, **how).sampled()
