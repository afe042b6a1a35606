"""Attention of long rows, a block at a time, comes to what it comes to at once: values, gradients, and the whole step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTOR, make_setup

from metatuner_jax import attention, losses, train, transformer

CAPPED = dataclasses.replace(ACTOR, attention_cap=0.8, query_scale=2.0)


def arrays(tokens, past, dtype="float32"):
    """Returns q, k, v of rows that come after some columns, and what each token may look at: padding on the left, and a hole."""
    rng, shape = np.random.default_rng(5), (2, ACTOR.num_kv_heads, past + tokens, ACTOR.head_width)
    q = rng.normal(size=(2, ACTOR.num_heads, tokens, ACTOR.head_width))
    q, k, v = (jnp.array(x, dtype) for x in (q, rng.normal(size=shape), rng.normal(size=shape)))
    real = np.arange(past + tokens) >= np.array([[0], [2]])
    real[1, 5] = False
    return q, k, v, jnp.array(np.tril(np.ones((tokens, past + tokens), bool), past) & real[:, None])


@pytest.mark.parametrize(("tokens", "block", "past", "model"), [
    (24, 3, 0, ACTOR), (23, 3, 0, ACTOR), (23, 4, 7, ACTOR), (7, 3, 2, CAPPED), (9, 9, 0, ACTOR), (9, 8, 4, CAPPED), (17, 1, 0, ACTOR),
])  # fmt: skip
def test_blocks_come_to_what_the_whole_comes_to(tokens, block, past, model, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    *given, attend = arrays(tokens, past)
    weights = jnp.array(np.random.default_rng(6).normal(size=given[0].shape), jnp.float32) * jnp.any(attend, axis=2)[:, None, :, None]

    def loss(of, *given):
        made = of(model, *given, attend)
        return jnp.sum(weights * made), made

    found, expected = (jax.jit(jax.value_and_grad(lambda *given, of=of: loss(of, *given), (0, 1, 2), has_aux=True))(*given) for of in (
        attention.blockwise, attention.whole))  # fmt: skip
    (_, made), gradients = found
    (_, at_once), wanted = expected
    seen = np.array(jnp.any(attend, axis=2))
    np.testing.assert_allclose(made.swapaxes(1, 2)[seen], at_once.swapaxes(1, 2)[seen], rtol=1e-5, atol=1e-6)
    assert np.isfinite(made).all()
    for one, other in zip(gradients, wanted):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_of_blocks_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    *given, attend = arrays(64, 0, "bfloat16")
    grad = lambda of, given: jax.jit(jax.grad(lambda k: jnp.sum(of(ACTOR, given[0], k, given[2], attend).astype(jnp.float32))))(given[1])
    exact = grad(attention.whole, [x.astype(jnp.float32) for x in given])
    errors = [float(jnp.linalg.norm(grad(of, given).astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) for of in (attention.blockwise, attention.whole)]
    assert errors[0] < 1.5 * errors[1] < 0.1


def test_only_long_rows_are_cut_and_their_scores_are_never_all_there():
    def text(tokens):
        params = jax.eval_shape(lambda: transformer.init(ACTOR, jax.random.key(0)))
        loss = lambda params, tokens: jnp.sum(transformer.forward(ACTOR, params, tokens, remat="products"))
        return jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((2, tokens), jnp.int32)).as_text()

    heads = f"2x{ACTOR.num_kv_heads}x{ACTOR.num_heads // ACTOR.num_kv_heads}"
    assert f"{heads}x256x256xf32" in text(256)
    long = text(600)  # five blocks of 120 tokens, a span of two, of two and of one
    assert "600x600xf32" not in long
    for columns in (240, 480, 600):
        assert f"{heads}x120x{columns}xf32" in long


@pytest.mark.usefixtures("compiled")
def test_the_step_on_long_rows_is_the_step(networks, batch, monkeypatch, forget_traces):
    """The generator's two halves, the packed prompts after the queries, the actor: all in blocks of three tokens, and at once."""
    setup = make_setup(train={"remat": "products"})
    frozen, params = networks(setup)
    phase, found = train.phases(setup)[-1], []
    for longest in (256, 0):
        monkeypatch.setattr(attention, "WHOLE", longest)
        monkeypatch.setattr(attention, "BLOCK", 3)
        jax.clear_caches()
        step = train.make_train_step(lambda *args: losses.joint_loss(setup, *args), setup.config.train, phase, phase.parts)
        state, metrics = step(train.init_state(setup, jax.tree.map(jnp.array, params)), frozen, batch, jax.random.key(0))
        found.append(jax.tree.map(np.asarray, (state.opt_state, metrics)))
    (moments, metrics), (of_blocks, metrics_of_blocks) = found
    for name in ("task_loss", "prompt_loss", "grad_norm"):
        assert metrics_of_blocks[name] == pytest.approx(metrics[name], rel=1e-4)
    for here, there in zip(jax.tree.leaves(of_blocks), jax.tree.leaves(moments)):  # after a step from zero, the gradients
        assert np.linalg.norm(here - there) <= 1e-4 * np.linalg.norm(there)
