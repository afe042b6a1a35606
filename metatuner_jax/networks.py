"""The networks of a run: loaded, or by their shapes alone."""

import jax
import jax.numpy as jnp

from metatuner_jax import generator, int8, pretrained, sharding, train, transformer


def load(setup, tokens, key, mesh):
    """Returns (generator.Frozen, the tree that learns), on the mesh. Weights of one checkpoint are held once."""
    frozen = load_frozen(setup, tokens, mesh)
    base = frozen.generator or {}
    if _has_generator(setup) and setup.config.generator.train == "full":
        base = _load_model(setup, "generator", "float32", "dtype", mesh, cut=True)
    return frozen, generator.init(setup, base, key, frozen.actor)


def load_frozen(setup, tokens, mesh) -> generator.Frozen:
    """Returns the weights that do not learn, as their checkpoints have them: before any warm-up of the actor."""
    config = setup.config
    held = _has_generator(setup) and config.generator.train == "lora"
    same = config.generator.model == config.actor.model
    actor = _load_model(setup, "actor", config.dtype, config.weights, mesh, cut=held and same)
    writer = None if not held else actor if same else _load_model(setup, "generator", config.dtype, config.weights, mesh, cut=True)
    return generator.Frozen(writer, actor, sharding.place({"allowed": jnp.array(tokens.allowed)}, mesh)["allowed"])


def _has_generator(setup):
    """Returns whether the method uses a generator at all."""
    return setup.method.prompt != "initial" or setup.method.learns_generator


def _load_model(setup, role, dtype, weights, mesh, cut):
    """Returns a model's weights, each put to where it shall live as soon as it is read; its layers cut at k where asked."""
    k = setup.num_shared

    def put(path, array):
        if path.startswith(("embed/", "head/")):
            array = array[: setup.actor.vocab_size]
        parts = (array[:k], array[k:]) if cut and path.startswith("layers/") else (array,)
        placed = tuple(sharding.place_one(path, part, mesh) for part in parts)
        return placed if len(parts) > 1 else placed[0]

    _, params = pretrained.load(getattr(setup.config, role).model, dtype, put, weights)
    if cut:
        half = lambda i: jax.tree.map(lambda halves: halves[i], params["layers"], is_leaf=lambda leaf: isinstance(leaf, tuple))
        params["layers"] = (half(0), half(1))
    return params


def shapes(setup):
    """Returns (TrainState, generator.Frozen) of arrays that are not there: their shapes and types, as a run loads them."""
    config, k, total = setup.config, setup.num_shared, setup.generator.num_layers
    same = config.generator.model == config.actor.model

    def halves(params):
        layers = params["layers"]
        return {**params, "layers": (transformer.cut(layers, 0, k), transformer.cut(layers, k, total))}

    def frozen(model, key):
        params = transformer.init(model, key, config.dtype)
        return {**params, "layers": int8.quantise_layers(params["layers"])} if config.weights == "int8" else params

    def make(key):
        full = config.generator.train == "full"
        base = None if not _has_generator(setup) else halves(transformer.init(setup.generator, key) if full else frozen(setup.generator, key))
        held = None if full else base
        actor = held if same and held is not None else frozen(setup.actor, key)
        state = train.init_state(setup, generator.init(setup, base or {}, key, actor))
        return state, generator.Frozen(held, actor, jnp.ones(setup.actor.vocab_size, bool))

    return jax.eval_shape(make, jax.random.key(0))
