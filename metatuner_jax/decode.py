"""Rows are read once; what comes after them is sampled, or followed where it is given, from their keys and values."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from metatuner_jax import product, transformer
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


def gumbel(key, rows: Int[Array, " b"], position, num_tokens: int) -> Float[Array, "b v"]:
    """Returns Gumbel noise that depends on the key, the row's number and the position alone.

    However rows are batched or spread over devices, a row gets the same noise.
    """

    def one(row):
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), position), (num_tokens,))

    return jax.vmap(one)(rows)


def pick(logits: Float[Array, "b v"], noise, temperature, top_p, allowed: Bool[Array, " v"]) -> Int[Array, " b"]:
    """Returns the next token of each row: argmax of `logits + temperature * noise`, a sample of softmax(logits / temperature).

    Temperature 0 is greedy. Only allowed tokens are taken, and of these the smallest set whose probability reaches `top_p`.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    if top_p < 1.0:
        scaled = logits / jnp.maximum(temperature, 1e-6)
        order = -jnp.sort(-scaled, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
        least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(scaled >= least, logits, -jnp.inf)
    if noise is not None:
        logits = logits + temperature * noise
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def prefill(
    config: ModelConfig, params: dict, x: Float[Array, "b t d"], mask: Bool[Array, "b t"], loras=None, remat: str = "none"
) -> Prefill:
    """Reads rows, for `sample` or `follow`.

    Args:
      x: the tokens' embeddings (`transformer.embed`). The last column is real in every row: padding stands on the left, or in holes
        before it.
      loras: as in `transformer.forward`.
      remat: as `train.remat`.
    """
    transformer.check_window(config, x.shape[1])
    context = transformer.make_context(config, transformer.positions_of(mask), transformer.causal(mask))
    x, past = transformer.run(config, params["layers"], x, context, loras, keep=True, remat=remat)
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
    transformer.check_window(config, t + max(sizes))
    tokens = jnp.concatenate([tokens[:, :-1] for tokens, _ in segments], axis=1)
    mask = jnp.concatenate([mask[:, :-1] for _, mask in segments], axis=1)
    number = np.repeat(np.arange(len(sizes)), sizes)
    itself = transformer.causal(mask) & (number[:, None] == number)
    attend = jnp.concatenate([jnp.broadcast_to(start.mask[:, None], (b, len(number), t)), itself], axis=-1)
    positions = jnp.sum(start.mask, axis=1, keepdims=True) + np.concatenate([np.arange(size) for size in sizes])
    context = transformer.make_context(config, positions, attend)
    x = transformer.embed(params["embed"]["embedding"], tokens, transformer.dtype_of(params))
    x, _ = transformer.run(config, params["layers"], x, context, loras, past=start.past, remat=remat)
    parts = jnp.split(x, np.cumsum(sizes)[:-1], axis=1)
    return [jnp.concatenate([start.last, part], axis=1) for part in parts]


def fastest_layers() -> str:
    """Returns how `sample` is quickest where much is decoded: elsewhere than on a CPU, a second copy of the weights is not worth it."""
    return "unroll" if jax.default_backend() == "cpu" else "scan"


def sample(
    config: ModelConfig,
    params: dict,
    start: Prefill,
    *,
    max_new_tokens: int,
    end_id: int,
    allowed: Bool[Array, " v"],
    key=None,
    rows: Int[Array, " b"] | None = None,
    temperature: float | Float[Array, ""] = 0.0,
    top_p: float = 1.0,
    loras=None,
    layers: str = "scan",
) -> Sampled:
    """Returns at most `max_new_tokens` written after each row, until every row has ended. To be called under jit.

    Args:
      start: what `prefill` made of the rows.
      end_id: the end token; a row that wrote it has ended.
      allowed: tokens that may be written; the end token among them.
      key, rows: the noise's key and each row's number (see `gumbel`); needed where `temperature` is above 0.
      temperature: 0 is greedy.
      loras: as in `transformer.forward`, and those with which the rows were read.
      layers: "scan" compiles one layer. "unroll" takes each layer's weights out of the stack before the first token, where a scan copies
        them for each: faster on a CPU, with a second copy of the weights and more to compile.
    """
    greedy = isinstance(temperature, (int, float)) and temperature == 0
    b, t = start.mask.shape
    length = t + max_new_tokens
    transformer.check_window(config, length)
    dtype = transformer.dtype_of(params)
    loras = jax.tree.map(lambda leaf: leaf.astype(dtype), loras)  # once, and not for each token
    position = jnp.sum(start.mask, axis=-1)  # of the next token
    columns = jnp.pad(start.mask, ((0, 0), (0, max_new_tokens)))
    grown = lambda leaf: jnp.pad(product.pack(leaf), ((0, 0), (0, 0), (0, 0), (0, max_new_tokens), (0, 0)))
    caches = jax.tree.map(grown, start.past)
    read = functools.partial(transformer.run, config, params["layers"], loras=loras)
    if layers == "unroll":
        read = functools.partial(transformer.run_unstacked, config, transformer.unstack(params["layers"], loras))
        caches = tuple(jax.tree.map(lambda leaf: leaf[i : i + 1], cache) for cache in caches for i in range(len(jax.tree.leaves(cache)[0])))

    def choose(logits, i):
        noise = None if greedy else gumbel(key, rows, i, logits.shape[-1])
        return pick(logits, noise, temperature, top_p, allowed)

    scores = transformer.logits(config, params, start.last)[:, 0]
    token = choose(scores, 0)
    first = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), token[:, None], axis=-1)[:, 0]
    written = jnp.full((b, max_new_tokens), end_id, jnp.int32).at[:, 0].set(token)
    real = jnp.zeros((b, max_new_tokens), bool).at[:, 0].set(True)

    def going(carry):
        i, _, ended, *_ = carry
        return (i < max_new_tokens) & ~jnp.all(ended)

    def step(carry):
        """Reads token i - 1, writes token i."""
        i, token, ended, written, real, columns, caches = carry
        column = t + i - 1
        columns = jax.lax.dynamic_update_slice(columns, jnp.ones((b, 1), bool), (0, column))
        context = transformer.make_context(config, (position + i - 1)[:, None], columns[:, None], column)
        x = transformer.embed(params["embed"]["embedding"], token[:, None], dtype)
        x, caches = read(x=x, context=context, caches=caches)
        token = jnp.where(ended, end_id, choose(transformer.logits(config, params, x)[:, 0], i))
        written = jax.lax.dynamic_update_slice(written, token[:, None], (0, i))
        real = jax.lax.dynamic_update_slice(real, ~ended[:, None], (0, i))
        return i + 1, token, ended | (token == end_id), written, real, columns, caches

    first_carry = (jnp.int32(1), token, token == end_id, written, real, columns, caches)
    _, _, _, written, real, _, _ = jax.lax.while_loop(going, step, first_carry)
    return Sampled(written, real, first)

