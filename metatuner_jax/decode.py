"""Sampling from the LLM with a cache: one function for written prompts and for answers."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from metatuner_jax import transformer
from metatuner_jax.config import ModelConfig


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


def sample(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    max_new_tokens: int,
    end_id: int,
    allowed: Bool[Array, " v"],
    key=None,
    rows: Int[Array, " b"] | None = None,
    temperature: float | Float[Array, ""] = 0.0,
    top_p: float = 1.0,
    loras=None,
) -> Sampled:
    """Returns at most `max_new_tokens` written after each row, until every row has ended. To be called under jit.

    Args:
      tokens: rows whose last column is real in every row: padding stands on the left, or in holes before the last column.
      end_id: the end token; a row that wrote it has ended.
      allowed: tokens that may be written; the end token among them.
      key, rows: the noise's key and each row's number (see `gumbel`); needed where `temperature` is above 0.
      temperature: 0 is greedy.
      loras: as in `transformer.forward`.
    """
    greedy = isinstance(temperature, (int, float)) and temperature == 0
    b, t = tokens.shape
    length = t + max_new_tokens
    transformer.check_window(config, length)
    dtype = transformer.dtype_of(params)
    stacks = params["layers"] if isinstance(params["layers"], tuple) else (params["layers"],)
    position = jnp.sum(mask, axis=-1)  # of the next token
    columns = jnp.pad(mask, ((0, 0), (0, max_new_tokens)))

    def empty(stack):
        layers = jax.tree.leaves(stack)[0].shape[0]
        zeros = jnp.zeros((layers, b, config.num_kv_heads, length, config.head_width), dtype)
        return transformer.Cache(zeros, zeros)

    def choose(logits, i):
        noise = None if greedy else gumbel(key, rows, i, logits.shape[-1])
        return pick(logits, noise, temperature, top_p, allowed)

    attend = jnp.pad(transformer.causal(mask), ((0, 0), (0, 0), (0, max_new_tokens)))
    context = transformer.make_context(config, transformer.positions_of(mask), attend, jnp.int32(0))
    x = transformer.embed(params["embed"]["embedding"], tokens, dtype)
    x, caches = transformer.run(config, params["layers"], x, context, loras, tuple(empty(stack) for stack in stacks))
    scores = transformer.logits(config, params, x[:, -1:])[:, 0]
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
        x, caches = transformer.run(config, params["layers"], x, context, loras, caches)
        token = jnp.where(ended, end_id, choose(transformer.logits(config, params, x)[:, 0], i))
        written = jax.lax.dynamic_update_slice(written, token[:, None], (0, i))
        real = jax.lax.dynamic_update_slice(real, ~ended[:, None], (0, i))
        return i + 1, token, ended | (token == end_id), written, real, columns, caches

    start = (jnp.int32(1), token, token == end_id, written, real, columns, caches)
    _, _, _, written, real, _, _ = jax.lax.while_loop(going, step, start)
    return Sampled(written, real, first)

