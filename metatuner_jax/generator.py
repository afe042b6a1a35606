"""The network that learns: shared bottom layers (meta encoder), prompt decoder and hypernetwork (parameter decoder)."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from metatuner_jax import config as config_lib
from metatuner_jax import decode, methods, product, sharding, transformer
from metatuner_jax.config import ModelConfig, projection_widths
from metatuner_jax.lora import Lora
from metatuner_jax.methods import Method


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all passes of a run need besides arrays."""

    config: config_lib.Config  # as `methods.resolve` returns it
    generator: ModelConfig
    actor: ModelConfig
    end_id: int
    prefix: tuple[int, ...]  # the actor's template before the prompt

    @property
    def num_shared(self) -> int:
        return config_lib.num_shared(self.config, self.generator)

    @property
    def method(self) -> Method:
        return methods.METHODS[self.config.method]

    @property
    def dtype(self):
        return jnp.dtype(self.config.dtype)


@flax.struct.dataclass
class Frozen:
    """Weights that do not learn. The generator's and the actor's are the same arrays where the checkpoint is the same."""

    generator: Any  # parameters of the LLM, its layers a tuple of two stacks cut at k; None in train="full"
    actor: Any  # likewise, its layers one stack or two
    allowed: Any  # bool [v]: ids that may be sampled


@flax.struct.dataclass
class Query:
    """What the shared layers yield."""

    h: Any  # float32 [b, d]: the query's state, from which its LoRA is written
    mask: Any  # bool [b, t]
    x: Any  # [b, t, d]: the residual stream at layer k, from which the private layers go on
    past: Any  # a tuple of one `transformer.Cache`: keys and values of the shared layers


def standardised(module: nn.Module, h: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Returns the states less a learned shift, times a learned gain, where the module's config asks for it; see `standardise`."""
    h = h.astype(jnp.float32)
    if not module.config.standardize:
        return h
    shift = module.param("shift", nn.initializers.zeros, h.shape[-1:])
    return (h - shift) * module.param("gain", nn.initializers.ones, h.shape[-1:])


def standardise(hyper: dict, h: Float[Array, "n d"]) -> dict:
    """Returns a hypernetwork's parameters with the shift and gain at which these states have mean 0 and variance 1 in each feature.

    The states of queries are alike: what tells one from another is some 5% of their square in a mixture of tasks and below 1% within
    a task. Read as they are, they give all queries nearly one LoRA. The variance has a floor of 1e-4, of states with mean square 1.

    Source: not in the paper; data-dependent initialisation, Salimans and Kingma 2016 (arXiv 1602.07868), section 3.
    """
    return {**hyper, "shift": jnp.mean(h, axis=0), "gain": (jnp.var(h, axis=0) + 1e-4) ** -0.5}


def output_layer(module: nn.Module, name: str, shape: tuple[int, ...], layers: int, deviation: float):
    """Returns the weights [..., hidden, features] and the biases [layers, features] of a factor's last layer.

    Of the factor's variance at first, half comes from the query and half from the bias: from states that are nearly alike, both make one
    LoRA. From standardised ones the query's half would be another one for each query, noise to what the bias learns: it is zero, and
    the hypernetwork starts as a static LoRA does.

    Args:
      shape: of the weights.
      deviation: the factor's standard deviation at first, of inputs with mean square 1/2, as those of a ReLU are.
    """
    hidden, features = shape[-2:]
    of_query = 0.0 if module.config.standardize else 0.5
    up = module.param(f"{name}_up", nn.initializers.normal(deviation * (2 * of_query / hidden) ** 0.5), shape)
    bias = module.param(f"{name}_bias", nn.initializers.normal(deviation * (1 - of_query) ** 0.5), (layers, features))
    return up, bias


class TwoLayer(nn.Module):
    """The paper's parameter decoder: a two-layer perceptron for each projection of each actor layer and each LoRA factor.

    Source: MetaTuner (arXiv 2509.24245), parameter decoder: b = relu(h Wd_b) Wu_b, a = relu(h Wd_a) Wu_a. The second layers
    have a bias, so that a static LoRA is the special case of zero weights. Of these, b's start at zero and a's do not: the delta
    is exactly zero at first, and alive.
    """

    config: config_lib.HyperConfig
    actor: ModelConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b d"]) -> dict[str, Lora]:
        layers, rank, hidden = self.actor.num_layers, self.config.rank, self.config.hidden
        h = standardised(self, h)

        def factor(name, features, deviation):
            down = self.param(f"{name}_down", nn.initializers.normal(h.shape[-1] ** -0.5), (layers, h.shape[-1], hidden))
            up, bias = output_layer(self, name, (layers, hidden, features), layers, deviation)
            make = lambda h: jnp.einsum("lbm,lmf->lbf", jax.nn.relu(jnp.einsum("bd,ldm->lbm", h, down)), up) + bias[:, None]
            return sharding.with_features_in_place(make, h, features, "fsdp")

        loras = {}
        for target in self.config.targets:
            width_in, width_out = projection_widths(self.actor, target)
            a = factor(f"{target}_a", width_in * rank, width_in**-0.5).reshape(layers, -1, width_in, rank)
            b = factor(f"{target}_b", rank * width_out, 0.0).reshape(layers, -1, rank, width_out)
            loras[target] = Lora(a, self.config.scale * b)
        return loras


class Trunk(nn.Module):
    """A parameter decoder whose size does not grow with the actor's depth, but for a bias.

    One perceptron reads the query's state with a learned embedding of the layer and one of the projection; one output layer a
    projection and LoRA factor, the same for all layers, turns what it makes into the factor. The bias of each layer, which makes a
    static LoRA the special case of zero weights, and the starting values are those of `TwoLayer`.

    Source: text-to-LoRA, Charakorn et al. 2025 (arXiv 2506.06105), its form L, with a bias a layer.
    """

    config: config_lib.HyperConfig
    actor: ModelConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b d"]) -> dict[str, Lora]:
        layers, rank, hidden, targets = self.actor.num_layers, self.config.rank, self.config.hidden, self.config.targets
        normal = nn.initializers.normal
        layer = self.param("layer_embedding", normal(1.0), (layers, hidden))
        projection = self.param("projection_embedding", normal(1.0), (len(targets), hidden))
        state = standardised(self, h) @ self.param("trunk_in", normal(h.shape[-1] ** -0.5), (h.shape[-1], hidden))
        x = jax.nn.relu(state[None, None] + layer[:, None, None] + projection[None, :, None])  # [l, p, b, hidden]
        mixed = jnp.einsum("lpbm,mk->lpbk", x, self.param("trunk_mid", normal((2 / hidden) ** 0.5), (hidden, hidden)))
        x = jax.nn.relu(mixed + self.param("trunk_shift", nn.initializers.zeros, (hidden,)))

        def factor(i, name, features, deviation):
            up, bias = output_layer(self, name, (hidden, features), layers, deviation)
            make = lambda x: jnp.einsum("lbm,mf->lbf", x, up) + bias[:, None]
            return sharding.with_features_in_place(make, x[:, i], features)

        loras = {}
        for i, target in enumerate(targets):
            width_in, width_out = projection_widths(self.actor, target)
            a = factor(i, f"{target}_a", width_in * rank, width_in**-0.5).reshape(layers, -1, width_in, rank)
            b = factor(i, f"{target}_b", rank * width_out, 0.0).reshape(layers, -1, rank, width_out)
            loras[target] = Lora(a, self.config.scale * b)
        return loras


NETWORKS = {"two_layer": TwoLayer, "trunk": Trunk}


def hypernetwork(setup: Setup) -> nn.Module:
    """Returns the parameter decoder that the config names."""
    return NETWORKS[setup.config.hyper.network](setup.config.hyper, setup.actor)


def init(setup: Setup, base: dict, key, actor: dict | None = None) -> dict:
    """Returns the tree that learns, float32: of {"embed", "shared", "prompt", "hyper"} what the method has, and what it has besides.

    That is "encoder", layers of the hypernetwork's own where it shares none, and "actor" where the actor is warmed up.

    Args:
      base: the generator LLM's own weights, its layers a tuple of two stacks cut at k.
      actor: the actor's own weights, for a warm-up in full.
    """
    method, config, warmup = setup.method, setup.config.generator, setup.config.warmup
    k, layers = setup.num_shared, setup.generator.num_layers
    key_shared, key_prompt, key_hyper, key_encoder, key_actor = (jax.random.fold_in(key, i) for i in range(5))
    copy = functools.partial(jax.tree.map, lambda leaf: jnp.array(leaf, jnp.float32, copy=True))

    def bottom(key):
        if config.train == "lora":
            return {"embed": {}, "shared": init_static(config, setup.generator, k, key)}
        return {"embed": copy(base["embed"]), "shared": copy(base["layers"][0])}

    def top():
        if config.train == "lora":
            return init_static(config, setup.generator, layers - k, key_prompt)
        head = base["head"]["kernel"] if "head" in base else base["embed"]["embedding"]
        return copy({"layers": base["layers"][1], "norm": base["norm"], "head": {"kernel": head}})

    params: dict[str, Any] = {}
    if method.learns_generator:
        params |= bottom(key_shared)
    if method.prompt == "written":
        params["prompt"] = top()
    if method.adapter == "generated":
        params["hyper"] = jax.jit(hypernetwork(setup).init)(key_hyper, jnp.zeros((1, setup.generator.width)))["params"]
    elif method.adapter == "static":
        params["hyper"] = init_static(setup.config.hyper, setup.actor, setup.actor.num_layers, key_hyper)
    if not method.shared:
        params["encoder"] = bottom(key_encoder)
    if warmup.actor_steps:
        full = warmup.actor_train == "full"
        params["actor"] = copy(actor) if full else init_static(warmup, setup.actor, setup.actor.num_layers, key_actor)
    return params


def init_static(config, model, layers, key):
    """Returns a static LoRA: a random, b zero, as Hu et al. 2021 (arXiv 2106.09685) start it.

    Args:
      config: has `rank` and `targets`.
    """
    static = {}
    for target, own_key in zip(config.targets, jax.random.split(key, len(config.targets))):
        width_in, width_out = projection_widths(model, target)
        a = jax.random.normal(own_key, (layers, width_in, config.rank)) * width_in**-0.5
        static[target] = {"a": a, "b": jnp.zeros((layers, config.rank, width_out))}
    return static


def static(tree: dict, scale: float) -> dict[str, Lora]:
    """Returns what `init_static` made, trained or not, as the LoRA of all rows."""
    return {target: Lora(leaf["a"], scale * leaf["b"]) for target, leaf in tree.items()}


def language_model(setup: Setup, params: dict, frozen: Frozen):
    """Returns the generator as `transformer` takes it: (parameters with two stacks cut at k, LoRA of the two or None).

    The second stack and the head are left out where the method has no prompt decoder to learn.
    """
    config = setup.config.generator
    if config.train == "lora":
        return frozen.generator, tuple(static(params.get(part, {}), config.scale) for part in ("shared", "prompt"))
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(setup.dtype))
    weights = {"embed": cast(params["embed"]), "layers": (cast(params["shared"]),)}
    if "prompt" in params:
        prompt = params["prompt"]
        weights["layers"] += (cast(prompt["layers"]),)
        weights |= {"norm": prompt["norm"], "head": cast(prompt["head"])}
    return weights, None


def read(setup: Setup, params: dict, frozen: Frozen, tokens, mask, own) -> Query:
    """Returns what the shared layers make of the templated queries.

    Args:
      tokens, mask, own: int and bool [b, t], left-padded; `own` marks the query's own tokens.
    """
    weights, loras = language_model(setup, params, frozen)
    x = transformer.embed(setup.generator, weights, tokens)
    x, past = _run_half(setup, weights, loras, 0, x, mask)
    return Query(pool(setup, x, own), mask, x, past)


def start(setup: Setup, params: dict, frozen: Frozen, query: Query) -> decode.Prefill:
    """Returns the queries as all layers read them: what a prompt begins from."""
    weights, loras = language_model(setup, params, frozen)
    x, past = _run_half(setup, weights, loras, 1, query.x, query.mask)
    return decode.Prefill(query.mask, x[:, -1:], query.past + past)


def _run_half(setup, weights, loras, half, x, mask):
    """Returns the residual stream after the shared (0) or the private (1) layers, and their keys and values."""
    context = transformer.make_context(setup.generator, transformer.positions_of(mask), transformer.causal(mask))
    loras = None if loras is None else loras[half]
    how = {"keep": True, "remat": setup.config.train.remat, "first": half * setup.num_shared}
    return transformer.run(setup.generator, weights["layers"][half], x, context, loras, **how)


def packed(setup: Setup, params: dict, frozen: Frozen, prefill: decode.Prefill, prompts) -> list:
    """Returns, for each of several prompts a query, the last states [b, m, d] from which its tokens are predicted.

    They go through the generator in one pass; each sees the query and none of the others.

    Args:
      prefill: what `start` made of the queries.
      prompts: pairs (tokens, mask), int and bool [b, m], with their end token.
    """
    weights, loras = language_model(setup, params, frozen)
    return decode.follow(setup.generator, weights, prefill, prompts, loras, setup.config.train.remat)


def pool(setup: Setup, x: Float[Array, "b t d"], own: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """Returns the query's state from the residual stream at layer k, normalised (raw, one token's can be 25,000), float32."""
    if setup.config.hyper.pool == "last":
        return transformer.rms_normalise(x[:, -1], setup.generator.norm_eps)
    weights = own[..., None].astype(jnp.float32)
    total = jnp.sum(weights * transformer.rms_normalise(x, setup.generator.norm_eps), axis=1)
    return total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)


def encode(setup: Setup, params: dict, frozen: Frozen, tokens, mask, own) -> Float[Array, "b d"]:
    """Returns the states from which the queries' LoRA is written, by the shared layers or by the hypernetwork's own.

    Args:
      tokens, mask, own: as in `read`.
    """
    return read(setup, params.get("encoder", params), frozen, tokens, mask, own).h


def state(setup: Setup, params: dict, frozen: Frozen, query: Query, tokens, mask, own) -> Float[Array, "b d"]:
    """Returns what `encode` does, where the shared layers have read the queries already."""
    return encode(setup, params, frozen, tokens, mask, own) if "encoder" in params else query.h


def adapt(setup: Setup, hyper: dict, h: Float[Array, "b d"]) -> dict[str, Lora]:
    """Returns the LoRA that the hypernetwork writes for each row, float32."""
    loras: Any = hypernetwork(setup).apply({"params": hyper}, h)  # typed as a pair too, which it is where a collection is mutable
    return loras


def write(
    setup: Setup, params: dict, frozen: Frozen, prefill: decode.Prefill, key=None, rows=None,
    temperature: float | Float[Array, ""] = 0.0, layers: str = "scan",
) -> decode.Sampled:
    """Returns a prompt for each query, greedy at temperature 0. All that is given is constant here: no gradient is kept.

    Args:
      prefill: what `start` made of the queries.
      layers: as in `decode.sample`.
    """
    params, prefill = jax.lax.stop_gradient((params, prefill))
    weights, loras = language_model(setup, params, frozen)
    return decode.sample(
        setup.generator, weights, prefill, max_new_tokens=setup.config.generator.max_prompt_tokens, end_id=setup.end_id,
        allowed=frozen.allowed, key=key, rows=rows, temperature=temperature, loras=loras, layers=layers,
    )  # fmt: skip


def relaxed_prompt(
    setup: Setup, weights: dict, states: Float[Array, "b m d"], sampled: decode.Sampled, frozen: Frozen, key, rows,
    temperature: float | Float[Array, ""],
) -> Float[Array, "b m o"]:
    """Returns the sampled prompt as the actor reads it: the value of its tokens, the gradient of their softmax.

    `E[s] + soft - stop_gradient(soft)` with `soft = softmax((logits + noise) / temperature) E`, E as the actor's first layer reads it, and the noise with which `decode.pick`
    took s, temperature times a Gumbel. The end token and padding are zero and have no gradient. The softmax is made in the backward
    pass alone, for a few tokens at a time.

    Args:
      weights: the generator's parameters as `transformer` takes them.
      states: the packed pass's last states for the sampled prompt.

    Source: straight-through Gumbel-softmax, Jang et al. 2017 (arXiv 1611.01144), section 2.2.
    """
    embedding = frozen.actor["embed"]["embedding"]
    places = jnp.broadcast_to(jnp.arange(states.shape[1]), states.shape[:2])

    def soft(states, weights):
        def of_chunk(states, places):
            noise = jax.vmap(lambda i: decode.gumbel(key, rows, i, embedding.shape[0]), out_axes=1)(places[0])
            logits = jnp.where(frozen.allowed, transformer.logits(setup.generator, weights, states), -1e30)
            chosen = jax.nn.softmax(logits / temperature + noise, axis=-1).astype(embedding.dtype)
            return transformer.scaled(setup.actor, product.einsum("bmv,vd->bmd", chosen, embedding, jnp.float32), embedding.dtype)

        return transformer.in_chunks(jax.checkpoint(of_chunk), states, places)

    words = sampled.mask & (sampled.tokens != setup.end_id)
    hard = transformer.scaled(setup.actor, embedding[sampled.tokens], embedding.dtype).astype(jnp.float32)
    head = "head" if "head" in weights else "embed"
    moved = _gradient_of(soft, states, {"norm": weights["norm"], head: weights[head]})
    return jnp.where(words[..., None], hard + moved, 0.0).astype(embedding.dtype)


def _gradient_of(function, *args):
    """Returns zero, with the gradient of function(*args), which is worked out in the backward pass alone."""

    @jax.custom_vjp
    def zero(*args):
        return jnp.zeros_like(jax.eval_shape(function, *args))

    def forward(*args):
        return zero(*args), args

    def backward(args, gradient):
        return jax.vjp(function, *args)[1](gradient)

    zero.defvjp(forward, backward)
    return zero(*args)
