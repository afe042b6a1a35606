"""Attention, of long rows a block of tokens at a time.

All scores of a long row are more than a cache or a chip holds, and half of them are of tokens that come later, at which nobody may look. So
the scores of a block of tokens are made at once, forward and, again, backward; and not those of columns after the block's span, a quarter
of the row. This is exact: a token's scores are all there when their softmax is taken.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from metatuner_jax import product
from metatuner_jax.config import ModelConfig

WHOLE = 256  # tokens that are no long row: so many take as long in blocks on two CPU cores, and by the estimate of TPUs' compiler a little longer
BLOCK = 128  # tokens of a long row that are worked out at once, at most
SPANS = 4  # of equally many blocks; each is a loop of its own, which takes time to compile


def attention(
    config: ModelConfig, q: Float[Array, "b n t h"], k: Float[Array, "b m s h"], v: Float[Array, "b m s h"], attend: Bool[Array, "b t s"]
) -> Float[Array, "b n t h"]:
    """Returns softmax(q k / sqrt(h)) v; the n query heads share the m KV heads in groups.

    A token that may look at nothing (padding) gets a mean of values: finite, and nobody looks at it.

    Args:
      k, v: of columns of which the last t are the tokens' own.
      attend: whether token t may look at column s, False for those after its own.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; in blocks, forward and backward, as Rabe and Staats 2021 (arXiv 2112.05682), with whole rows of scores.
    """
    return (whole if q.shape[2] <= WHOLE else blockwise)(config, q, k, v, attend)


def at_once(tokens: int) -> int:
    """Returns how many tokens of a row have their scores made at once."""
    return tokens if tokens <= WHOLE else _block(tokens)


def _block(tokens):
    return math.ceil(tokens / math.ceil(tokens / BLOCK))


def whole(config, q, k, v, attend):
    """Returns what `attention` does, of all tokens at once."""
    b, n, t, h = q.shape
    m = k.shape[1]
    q = q.reshape(b, m, n // m, t, h)
    scores = product.einsum("bmgth,bmsh->bmgts", q, k, jnp.float32) * (config.query_scale or h) ** -0.5
    scores = jnp.where(attend[:, None, None], capped(scores, config.attention_cap), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return product.einsum("bmgts,bmsh->bmgth", weights, v).reshape(b, n, t, h)


def capped(x, cap: float | None):
    """Returns cap * tanh(x / cap), or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise(config, q, k, v, attend):
    """Returns what `attention` does, a block of tokens at a time; of what it makes on its way, the backward pass keeps nothing."""
    made = []
    for blocks, seen, (at_q, at_attend) in _spans(k.shape[2], q, attend[:, None]):
        seen_k, seen_v = k[:, :, :seen], v[:, :, :seen]
        of_block = lambda i: whole(config, at_q(i), seen_k, seen_v, at_attend(i)[:, 0, :, :seen])
        made.append(_joined(jax.lax.map(of_block, jnp.arange(*blocks))))
    return jnp.concatenate(made, axis=2)[:, :, : q.shape[2]]


def _forward(config, *arrays):
    return blockwise(config, *arrays), arrays


def _backward(config, arrays, gradient):
    q, k, v, attend = arrays
    columns, for_q, for_k, for_v = k.shape[2], [], [], []
    for blocks, seen, (at_q, at_attend, at_gradient) in _spans(columns, q, attend[:, None], gradient):
        seen_k, seen_v = k[:, :, :seen], v[:, :, :seen]

        def of_block(sums, i):
            _, pull = jax.vjp(lambda q, k, v: whole(config, q, k, v, at_attend(i)[:, 0, :, :seen]), at_q(i), seen_k, seen_v)
            for_q, *more = pull(at_gradient(i))
            return [total + one.astype(jnp.float32) for total, one in zip(sums, more)], for_q

        sums, of_q = jax.lax.scan(of_block, [jnp.zeros(seen_k.shape, jnp.float32)] * 2, jnp.arange(*blocks))
        of_k, of_v = (jnp.pad(total, ((0, 0), (0, 0), (0, columns - seen), (0, 0))) for total in sums)
        for found, one in ((for_q, _joined(of_q)), (for_k, of_k), (for_v, of_v)):
            found.append(one)
    return jnp.concatenate(for_q, axis=2)[:, :, : q.shape[2]], sum(for_k).astype(k.dtype), sum(for_v).astype(v.dtype), None


blockwise.defvjp(_forward, _backward)


def _spans(columns, *arrays):
    """Yields, for each span: its first block and the one after its last, how many columns these may look at, and, for each array, part(block).

    Args:
      columns: how many there are in all.
      arrays: [b, n, t, ...]; the last block is filled up with zeros.
    """
    t = arrays[0].shape[2]
    size = _block(t)
    count = math.ceil(t / size)
    arrays = [jnp.pad(x, ((0, 0), (0, 0), (0, count * size - t), (0, 0))) for x in arrays]
    parts = [lambda i, x=x: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2) for x in arrays]
    per_span = math.ceil(count / SPANS)
    for start in range(0, count, per_span):
        stop = min(start + per_span, count)
        yield (start, stop), min(columns - t + stop * size, columns), parts


def _joined(blocks):
    """Returns [b, n, blocks * size, h] of [blocks, b, n, size, h]."""
    blocks = jnp.moveaxis(blocks, 0, 2)
    return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[-1])
