"""The LLM: a decoder-only Flax transformer with stacked layers, cached decoding, and LoRA as an input."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from metatuner_jax import lora as lora_lib
from metatuner_jax import product, sharding
from metatuner_jax.attention import attention, capped
from metatuner_jax.config import ModelConfig, projection_widths


@flax.struct.dataclass
class Context:
    """What every layer of one pass shares."""

    cos: Any  # [b, t, h / 2]
    sin: Any  # [b, t, h / 2]
    attend: Any  # bool [b, t, s]: whether t may look at s
    start: Any = None  # int32 []: with a cache, its column of the first of these tokens
    sliding: Any = None  # a Context of what is other in sliding layers than in the rest, None where it is not; None: all layers are alike

    def of_layer(self, slides) -> "Context":
        """Returns what one layer takes; `slides`: bool [], or None where all layers are alike."""
        if slides is None:
            return self
        names = ("cos", "sin", "attend")
        pairs = {name: (getattr(self.sliding, name), getattr(self, name)) for name in names}
        own = {name: jnp.where(slides, a, b) for name, (a, b) in pairs.items() if a is not None}
        return dataclasses.replace(self, **own, sliding=None)


@flax.struct.dataclass
class Cache:
    """Keys and values of some columns, in every layer of a stack or, without the axis l, in one layer."""

    k: Any  # [l, b, n, s, h], n KV heads
    v: Any  # [l, b, n, s, h]


# --- modules ---


class RMSNorm(nn.Module):
    """x / rms(x) * (scale + offset), over the last axis, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.constant(1 - self.config.norm_offset), (x.shape[-1],), jnp.float32)
        return normalise(self.config, x, scale).astype(x.dtype)


class Projection(nn.Module):
    """x @ kernel, times the scale that a kernel in 8 bits has beside it (see `int8`), and what the LoRA adds."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, lora, together=None):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        scale = self.get_variable("params", "scale")

        def multiply(x, kernel):
            if scale is None:
                return product.einsum("bti,io->bto", x, kernel.astype(x.dtype))
            return (product.einsum("bti,io->bto", x, kernel, jnp.float32) * scale).astype(x.dtype)

        y = sharding.multiplied(multiply, x, kernel, f"{self.name}/kernel", together)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32).astype(x.dtype)
        return y if lora is None else y + lora_lib.delta(x, lora)


class Block(nn.Module):
    """One layer: attention and gated feed-forward, each on the normalised residual stream."""

    config: ModelConfig
    keep: bool = False

    @nn.compact
    def __call__(self, carry, per_layer, context):
        c = self.config
        x, cache, layer = carry
        loras, past, slides = per_layer
        loras, context = loras or {}, context.of_layer(slides)

        def project(name, y, together=None, use_bias=False):
            return Projection(projection_widths(c, name)[1], use_bias, name=name)(y, loras.get(name), together)

        def added(name, y):
            """Returns the residual stream with what a projection yields."""
            return x + (RMSNorm(c, name=name)(y) if c.post_norms else y)

        y = RMSNorm(c, name="attn_norm")(x)
        together = sharding.rows_together(y)
        q, k, v = (
            project(name, y, together, c.qkv_bias).reshape(*y.shape[:2], -1, c.head_width).swapaxes(1, 2) for name in ("q", "k", "v")
        )
        v = kept(v)
        if c.qk_norm:
            q, k = (rotate(RMSNorm(c, name=f"{name}_norm")(kept(x)), context) for name, x in (("q", q), ("k", k)))
        else:
            q, k = kept(rotate(q, context)), kept(rotate(k, context))
        own = Cache(k, v) if self.keep else None
        if past is not None:
            k, v = jnp.concatenate([past.k, k], axis=2), jnp.concatenate([past.v, v], axis=2)
        if cache is not None:
            cache, k, v = written(cache, layer, context.start, k, v)
        y = attention(c, q, k, v, context.attend)
        x = added("attn_post_norm", kept(project("o", y.swapaxes(1, 2).reshape(*x.shape[:2], -1))))
        y = RMSNorm(c, name="mlp_norm")(x)
        together = sharding.rows_together(y)
        gate, up = (kept(project(name, y, together)).astype(jnp.float32) for name in ("gate", "up"))
        y = project("down", (ACTIVATIONS[c.activation](gate) * up).astype(x.dtype))
        x = added("mlp_post_norm", kept(y) if c.post_norms else y)
        return (x, cache, None if layer is None else layer + 1), own


def written(cache: Cache, layer, start, k, v):
    """Returns (the cache with k and v at its columns from `start` on, the layer's keys, its values); a cache without layers is the layer's."""

    def write(old, new):
        new = product.pack(new)
        if layer is None:
            new = jax.lax.dynamic_update_slice(old, new, (0, 0, start, 0))
            return new, product.unpack(new)
        new = jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, start, 0))
        return new, product.unpack(new[layer])

    (all_k, k), (all_v, v) = write(cache.k, k), write(cache.v, v)
    return Cache(all_k, all_v), k, v


def kept(x):
    """Returns x, which a backward pass with `remat="products"` finds kept; what else it needs, it makes again."""
    return product.named(x, "kept")


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
REMAT = {"products": jax.checkpoint_policies.save_only_these_names("kept"), "all": jax.checkpoint_policies.nothing_saveable}


@functools.partial(jax.jit, static_argnames=("config", "keep", "remat"))
def _layer(weights, carry, per_layer, context, *, config, keep=False, remat="none"):
    """Returns what `Block` does with these weights; traced once for all passes, of all programs, whose arrays have these shapes."""

    def apply(weights, *args):
        return Block(config, keep).apply({"params": weights}, *args)

    if remat != "none":
        apply = jax.checkpoint(apply, prevent_cse=False, policy=REMAT[remat])
    return apply(weights, carry, per_layer, context)


# --- parts of a layer ---


def rms_normalise(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Returns x over the root of its mean square along the last axis, in float32, without a learned scale."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def normalise(config: ModelConfig, x: Float[Array, "*b d"], scale: Float[Array, " d"]) -> Float[Array, "*b d"]:
    """Returns x normalised with a learned scale, in float32."""
    scale = scale.astype(jnp.float32)
    return rms_normalise(x, config.norm_eps) * (scale + config.norm_offset if config.norm_offset else scale)


def rotary(config: ModelConfig, positions: Int[Array, "b t"], sliding: bool = False):
    """Returns cosine and sine of the rotary angles, float32 [b, t, h / 2], of the layers that slide where they have their own.

    Source: Su et al. 2021 (arXiv 2104.09864), eq. 34; the stretch of low frequencies is Llama 3's (its released code).
    """
    half = config.head_width // 2
    theta = config.sliding_rope_theta if sliding else None
    own = theta is not None
    frequency = (config.rope_theta if theta is None else theta) ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_stretch != 1 and not own:
        frequency = frequency / config.rope_stretch
    if config.rope_scaling is not None and not own:
        factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * jnp.pi)  # over the positions that the model was first trained on
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "b n t h"], context: Context) -> Float[Array, "b n t h"]:
    """Returns x with each pair (i, i + h / 2) turned by its token's angle."""
    cos, sin = context.cos[:, None], context.sin[:, None]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


# --- whole passes ---


def cut(layers: dict, start: int, stop: int) -> dict:
    """Returns layers start..stop of a stack."""
    return jax.tree.map(lambda leaf: leaf[start:stop], layers)


def cut_vocabulary(params: dict, size: int) -> dict:
    """Returns a model's parameters with only the first `size` tokens: models of one tokenizer may pad their vocabularies differently."""
    tables = {"embed": "embedding", "head": "kernel"}
    return {**params, **{name: {leaf: params[name][leaf][:size]} for name, leaf in tables.items() if name in params}}


def positions_of(mask: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns each token's position: how many real tokens stand before it in its row."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


def causal(mask: Bool[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Returns whether token t may look at token s: s is real and not after t."""
    t = mask.shape[-1]
    return jnp.tril(jnp.ones((t, t), bool)) & mask[:, None, :]


def make_context(config: ModelConfig, positions, attend, start=None, positions_seen=None) -> Context:
    """Returns what the layers of one pass share.

    Args:
      positions: int [b, t].
      attend: bool [b, t, s], of layers that do not slide.
      start: as in `Context`.
      positions_seen: returns those of what may be looked at, int [b, s]; called where rows may be longer than a window. None: `positions`.
    """
    near = None
    if config.sliding_window is not None and attend.shape[-1] > config.sliding_window:  # else all layers see the same
        seen = positions if positions_seen is None else positions_seen()
        near = attend & (positions[:, :, None] - seen[:, None] < config.sliding_window)
    cos, sin = rotary(config, positions)
    if config.sliding_layers is None:
        return Context(cos, sin, attend if near is None else near, start)
    own_cos, own_sin = rotary(config, positions, sliding=True) if config.sliding_rope_theta is not None else (None, None)
    is_one = near is None and own_cos is None
    return Context(cos, sin, attend, start, sliding=None if is_one else Context(own_cos, own_sin, near))


def embed(config: ModelConfig, params: dict, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns the tokens' rows of the embedding as the first layer reads them, in the type that the model computes in."""
    embedding = params["embed"]["embedding"]
    return scaled(config, sharding.looked_up(embedding, tokens), embedding.dtype)


def scaled(config: ModelConfig, x, dtype):
    """Returns rows of the embedding, or means of them, as the first layer reads them; `dtype`: of the embedding, to which the factor is rounded."""
    return x * jnp.asarray(config.width**0.5, dtype).astype(x.dtype) if config.scaled_embedding else x


def run(config, layers, x, context, loras=None, caches=None, past=None, keep=False, remat="none", first=0):
    """Returns the residual stream after all layers, and a tuple of caches, one a stack or listed layer: those written, or with `keep` the tokens' own.

    Args:
      layers: a stack, or a tuple of stacks to be run in turn (such as the two halves of a cut one); with caches, also what `unstack`
        made of these, with loras that it made too and a cache a layer, without a layer axis.
      loras: None, or for each projection a Lora with as many layers as all stacks together, or a tuple of these, one a stack.
      caches: None, or a tuple of caches as `product.pack` makes them, to be written in place at column `context.start`: what decoding
        takes.
      past: None, or a tuple of caches whose columns stand before the tokens' own: what a differentiable pass takes.
      keep: return the keys and values of the tokens themselves, as `past` takes them.
      remat: as `train.remat`.
      first: the number in the whole model of the first of these layers.
    """
    if isinstance(layers, list):  # nothing is sliced here: in a loop that would be done again for each token
        return _run_unstacked(config, layers, x, context, loras, caches)
    stacks, sizes, loras = by_stack(layers, loras)
    layer, made = functools.partial(_layer, config=config, keep=keep, remat=remat), []
    sliding = None if context.sliding is None else jnp.array(config.sliding_layers)
    for i, (stack, size) in enumerate(zip(stacks, sizes)):
        cache, before = (None if given is None else given[i] for given in (caches, past))
        slide = None if sliding is None else jax.lax.dynamic_slice_in_dim(sliding, first + sum(sizes[:i]), size)
        # The cache is part of the carry, so that its columns are updated in place.
        (x, cache, _), own = jax.lax.scan(
            lambda carry, given: layer(given[0], carry, given[1:], context), (x, cache, jnp.int32(0)), (stack, loras[i], before, slide), length=size
        )
        made.append(own if keep else cache)
    return x, tuple(made)


def by_stack(layers, loras):
    """Returns (stacks, their numbers of layers, their LoRA or None), a tuple each, of what `run` takes."""
    stacks = layers if isinstance(layers, tuple) else (layers,)
    sizes = tuple(jax.tree.leaves(stack)[0].shape[0] for stack in stacks)
    if not isinstance(loras, tuple):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        loras = tuple(None if loras is None else cut(loras, start, start + size) for start, size in zip(starts, sizes))
    return stacks, sizes, loras


def unstack(layers) -> list:
    """Returns what each layer has by itself, of the weights or LoRA of a stack or of a tuple of them."""
    stacks, sizes, _ = by_stack(layers, None)
    return [jax.tree.map(lambda leaf: leaf[i], stack) for stack, size in zip(stacks, sizes) for i in range(size)]


def _run_unstacked(config, layers, x, context, loras, caches):
    made, nothing = [], [None] * len(layers)
    sliding = nothing if context.sliding is None else [jnp.bool(slides) for slides in config.sliding_layers]
    for weights, lora, cache, slides in zip(layers, loras or nothing, caches, sliding):
        (x, cache, _), _ = _layer(weights, (x, cache, None), (lora, None, slides), context, config=config)
        made.append(cache)
    return x, tuple(made)


def logits(config: ModelConfig, params: dict, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
    """Returns the scores of the next token, float32. `x` is the residual stream after the last layer."""
    x, head = _to_score(config, params, x)
    return _scores(x, head, config.logit_cap)


def _scores(x, head, cap):
    x = sharding.for_words(x, head.shape[0])
    return capped(sharding.split_words(product.einsum("btd,vd->btv", x, head, jnp.float32)), cap)


def _to_score(config, params, x):
    """Returns the two arrays, [b, t, d] and [v, d], whose product is the scores, but for their cap."""
    x = normalise(config, x, params["norm"]["scale"])
    head = params["embed"]["embedding"] if "head" not in params else params["head"]["kernel"]
    return x.astype(head.dtype), head


SCORED_TOKENS = 16  # of each row, whose scores are alive at once


def in_chunks(function, *arrays):
    """Returns `function(*arrays)` of arrays [b, t, ...], worked out for a few tokens of each row at a time, alike in number.

    What `function` makes on its way, such as scores [b, t, v], is alive for these tokens alone, if its backward pass makes it again.
    It must treat every token by itself.
    """
    t = arrays[0].shape[1]
    count = -(-t // SCORED_TOKENS)
    size = -(-t // count)
    if count == 1:
        return function(*arrays)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - t)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]

    return jax.tree.map(join, jax.lax.map(lambda chunk: function(*chunk), tuple(split(x) for x in arrays)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _likelihoods_of(x: Float[Array, "b t d"], head: Float[Array, "v d"], targets: Int[Array, "b t"], cap: float | None):
    """Returns the log-probability of each target, float32: its score less the logarithm of the sum of e to all scores.

    The backward pass makes the scores again, and knows the sum: the gradient by them is that of the target's less their softmax. That of
    a score s by what was capped, cap * tanh(.), is 1 - (s / cap)^2.
    """
    return _likelihoods_forward(x, head, targets, cap)[0]


def _likelihoods_forward(x, head, targets, cap):
    scores = _scores(x, head, cap)
    total = jax.nn.logsumexp(scores, axis=-1)
    return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0] - total, (x, head, targets, total)


def _likelihoods_backward(cap, saved, gradient):
    x, head, targets, total = saved
    scores = _scores(x, head, cap)
    is_target = targets[..., None] == jnp.arange(head.shape[0])
    of_scores = gradient[..., None] * (is_target - jnp.exp(scores - total[..., None]))
    of_scores = sharding.split_words((of_scores if cap is None else of_scores * (1 - jnp.square(scores / cap))).astype(x.dtype))
    return sharding.split_rows(product.einsum("btv,vd->btd", of_scores, head)), product.einsum("btd,btv->vd", x, of_scores, head.dtype), None


_likelihoods_of.defvjp(_likelihoods_forward, _likelihoods_backward)


def log_likelihoods(config: ModelConfig, params: dict, x: Float[Array, "b t d"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Returns the log-probability of each target, float32, in nats, without keeping the scores of all words.

    Args:
      x: the residual stream after the last layer: x[:, i] is what targets[:, i] is predicted from.
    """
    x, head = _to_score(config, params, x)
    return in_chunks(lambda x, targets: _likelihoods_of(sharding.split_rows(x), head, targets, config.logit_cap), x, targets)


def forward(
    config: ModelConfig, params: dict, tokens: Int[Array | np.ndarray, "b t"], mask: Shaped[Array | np.ndarray, "b t"] | None = None,
    loras: dict[str, lora_lib.Lora] | tuple[dict[str, lora_lib.Lora], ...] | None = None, remat: str = "none",
) -> Float[Array, "b t v"]:
    """Returns the scores of each next token, float32 [b, t, v]; what stands on padding is finite and means nothing.

    Args:
      tokens: int [b, t], numpy or jax.
      mask: bool or 0/1 [b, t], True on real tokens, holes anywhere; positions count real tokens. None: all real.
      loras: None, or for each adapted projection a Lora: leaves [l, b, ...], one a row, or [l, ...], one for all; or a tuple of these, one a stack.
    """
    tokens = jnp.asarray(tokens)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    context = make_context(config, positions_of(mask), causal(mask))
    x, _ = run(config, params["layers"], embed(config, params, tokens), context, loras, remat=remat)
    return logits(config, params, x)


def dtype_of(params: dict):
    """Returns the type that the model computes in: that of its embedding."""
    return params["embed"]["embedding"].dtype


def init(config: ModelConfig, key, dtype=jnp.float32) -> dict:
    """Returns random parameters, for tests and timings; kernels as `Projection` draws them, embeddings of deviation 0.02."""
    key_embed, key_layers, key_head = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.width), dtype)
    context = make_context(config, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool))
    one = lambda key: Block(config).init(key, (x, None, None), (None, None, None), context)["params"]
    layers = jax.jit(jax.vmap(one))(jax.random.split(key_layers, config.num_layers))
    shape = (config.vocab_size, config.width)
    params = {
        "embed": {"embedding": 0.02 * jax.random.normal(key_embed, shape)},
        "layers": layers,
        "norm": {"scale": jnp.full(config.width, 1 - config.norm_offset)},
    }
    if not config.tied:
        params["head"] = {"kernel": 0.02 * jax.random.normal(key_head, shape)}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)
