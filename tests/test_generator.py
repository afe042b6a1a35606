"""The packed pass, the hypernetwork, the straight-through prompt, and where the gradients go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTOR, END, GENERATOR, make_setup, randomise, scores_of

from metatuner_jax import actor, decode, evaluate, generator, losses, transformer


def jitted(function, setup):
    return jax.jit(functools.partial(function, setup))


QUERY = ("generator", "generator_mask", "own")


def prefilled(setup, params, frozen, batch):
    """Returns the batch's queries as all layers of the generator read them."""
    query = generator.read(setup, params, frozen, *(batch[name] for name in QUERY))
    return generator.start(setup, params, frozen, query)


def write(setup, params, frozen, batch, *noise):
    return generator.write(setup, params, frozen, prefilled(setup, params, frozen, batch), *noise)


@pytest.fixture(scope="module")
def sampled():
    tokens = np.array([[9, 8, 7, END, END], [5, 4, 3, 6, 8], [11, END, END, END, END]], np.int32)
    return decode.Sampled(jnp.array(tokens), jnp.array([[1, 1, 1, 1, 0], [1] * 5, [1, 1, 0, 0, 0]], bool), jnp.zeros(3))


# --- the hypernetwork ---


@pytest.mark.smoke
def test_the_fresh_hypernetwork_writes_a_delta_of_exactly_zero(networks, batch):
    setup = make_setup()
    frozen, params = networks(setup, random=False)
    loras = generator.adapt(setup, params["hyper"], jnp.ones((3, GENERATOR.width)))
    assert all(np.all(x.b == 0) and np.std(x.a) > 0.01 for x in loras.values())
    args = (batch["expert"], batch["expert_mask"], batch["query"], batch["query_mask"], batch["answer"])
    found = jitted(actor.log_likelihoods, setup)
    np.testing.assert_array_equal(found(frozen, loras, *args), found(frozen, None, *args))


@pytest.mark.parametrize("standardize", [False, True])
def test_the_delta_is_the_papers_formula(networks, standardize):
    setup = make_setup(hyper={"scale": 1.7, "standardize": standardize})
    _, params = networks(setup)
    h = jnp.array(np.random.default_rng(0).normal(size=(3, GENERATOR.width)), jnp.float32)
    out, p = generator.adapt(setup, params["hyper"], h)["v"], params["hyper"]
    layer, row = 2, 1
    read = np.array((h[row] - p["shift"]) * p["gain"] if standardize else h[row])

    def factor(name):
        return np.maximum(read @ p[f"v_{name}_down"][layer], 0) @ p[f"v_{name}_up"][layer] + p[f"v_{name}_bias"][layer]

    np.testing.assert_allclose(out.a[layer, row], factor("a").reshape(ACTOR.width, 2), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(out.b[layer, row], 1.7 * factor("b").reshape(2, 20), rtol=2e-5, atol=1e-5)


def test_zero_weights_leave_a_static_lora(networks):
    setup = make_setup()
    _, params = networks(setup)
    hyper = {name: leaf * (0 if name.endswith("_up") else 1) for name, leaf in params["hyper"].items()}
    loras = generator.adapt(setup, hyper, jnp.array(np.random.default_rng(0).normal(size=(3, GENERATOR.width)), jnp.float32))
    for x in loras.values():
        np.testing.assert_array_equal(x.a[:, 0], x.a[:, 2])
        assert np.abs(x.b).max() > 0


@pytest.mark.parametrize("network", ["two_layer", "trunk"])
def test_states_that_are_nearly_alike_are_told_apart_once_standardised(networks, network):
    """States as queries of one task have them: a common part with all but 1% of their square, and a feature that never changes."""
    setup = make_setup(hyper={"network": network, "standardize": True})
    frozen, params = networks(setup)
    rng = np.random.default_rng(0)
    h = jnp.array(rng.normal(size=GENERATOR.width) + 0.1 * rng.normal(size=(64, GENERATOR.width)), jnp.float32).at[:, 3].set(5.0)
    plain = {**params["hyper"], "shift": jnp.zeros(GENERATOR.width), "gain": jnp.ones(GENERATOR.width)}
    hyper = generator.standardise(plain, h)
    read = (h - hyper["shift"]) * hyper["gain"]
    np.testing.assert_allclose(jnp.mean(read, axis=0), 0, atol=1e-3)
    spread = np.array(jnp.std(read, axis=0))
    assert spread[3] == 0 and np.all(np.abs(np.delete(spread, 3) - 1) < 0.02)

    def variance(hyper):
        return losses.delta_metrics(setup, frozen, generator.adapt(setup, hyper, h))["delta_variance"]

    assert variance(plain) < 0.1 and variance(hyper) > 0.3


@pytest.mark.parametrize("network", ["two_layer", "trunk"])
def test_a_fresh_hypernetwork_of_standardised_states_is_a_fresh_static_lora(networks, network):
    setup = make_setup(hyper={"network": network, "standardize": True, "rank": 8})
    _, params = networks(setup, random=False)
    h = jnp.array(np.random.default_rng(0).normal(size=(3, GENERATOR.width)), jnp.float32)
    static = generator.init_static(setup.config.hyper, ACTOR, ACTOR.num_layers, jax.random.key(0))
    for target, lora in generator.adapt(setup, params["hyper"], h).items():
        np.testing.assert_array_equal(lora.a, np.broadcast_to(lora.a[:, :1], lora.a.shape))
        np.testing.assert_allclose(np.std(lora.a), np.std(static[target]["a"]), rtol=0.15)
        assert not np.any(lora.b)


def test_half_of_a_fresh_factor_comes_from_the_query_where_states_are_read_as_they_are(networks):
    setup = make_setup(hyper={"hidden": 64, "rank": 8})
    _, params = networks(setup, random=False)
    h = jnp.array(np.random.default_rng(0).normal(size=(64, GENERATOR.width)), jnp.float32)
    static = generator.init_static(setup.config.hyper, ACTOR, ACTOR.num_layers, jax.random.key(0))
    no_bias = {name: leaf * (not name.endswith("_bias")) for name, leaf in params["hyper"].items()}
    for target, lora in generator.adapt(setup, params["hyper"], h).items():
        np.testing.assert_allclose(np.std(lora.a), np.std(static[target]["a"]), rtol=0.1)
        of_query = generator.adapt(setup, no_bias, h)[target].a
        np.testing.assert_allclose(np.mean(of_query**2) / np.mean(lora.a**2), 0.5, atol=0.1)


# --- the packed pass ---


SLIDING = {"sliding_window": 3, "sliding_layers": (False, True, True, False), "sliding_rope_theta": 50.0}


@pytest.mark.parametrize("train, pool, sliding", [("lora", "last", {}), ("lora", "mean", {}), ("full", "last", {}), ("full", "mean", {}), ("lora", "last", SLIDING)])
def test_the_packed_pass_equals_separate_passes(networks, batch, sampled, train, pool, sliding):
    model = dataclasses.replace(GENERATOR, **sliding)
    setup = dataclasses.replace(make_setup(generator={"train": train}, hyper={"pool": pool}), generator=model)
    frozen, params = networks(setup)
    prompts = [(sampled.tokens, sampled.mask), (batch["expert"], batch["expert_mask"])]

    @jax.jit
    def run(params, frozen, batch, prompts):
        query = generator.read(setup, params, frozen, *(batch[name] for name in QUERY))
        return query.h, generator.packed(setup, params, frozen, generator.start(setup, params, frozen, query), prompts)

    h, packed = run(params, frozen, batch, prompts)
    weights, loras = generator.language_model(setup, params, frozen)
    for row in range(3):
        query = batch["generator"][row, batch["generator_mask"][row]]
        for states, (ids, mask) in zip(packed, prompts):
            ids = np.array(ids[row])[np.array(mask[row])]
            alone = scores_of(model, weights, np.concatenate([query, ids]), loras)[len(query) - 1 : -1]
            together = transformer.logits(model, weights, states[row : row + 1])[0, : len(ids)]
            np.testing.assert_allclose(together, alone, atol=3e-5)
        own = jnp.array(batch["own"][row, batch["generator_mask"][row]])[None]
        alone = state_at_layer_k(setup, params, frozen, query)
        np.testing.assert_allclose(h[row], generator.pool(setup, alone, own)[0], atol=1e-5)


def state_at_layer_k(setup, params, frozen, ids):
    """Returns the residual stream [1, t, d] of one query, without padding, after the shared layers alone."""
    weights, loras = generator.language_model(setup, params, frozen)
    mask = jnp.ones((1, len(ids)), bool)
    context = transformer.make_context(setup.generator, transformer.positions_of(mask), transformer.causal(mask))
    x = transformer.embed(setup.generator, weights, jnp.array(ids)[None])
    return transformer.run(setup.generator, weights["layers"][0], x, context, loras and loras[0])[0]


def test_the_query_state_is_normalised_and_the_mean_is_over_its_own_tokens(networks, batch):
    setup = make_setup(hyper={"pool": "mean"})
    x = jnp.array(np.random.default_rng(0).normal(size=(3, 6, 24)) * 50, jnp.float32)
    own = batch["own"]
    expected = [
        np.mean([v / np.sqrt(np.mean(v**2)) for v in np.array(x[row])[own[row]]], axis=0) for row in range(3)
    ]
    np.testing.assert_allclose(generator.pool(setup, x, own), expected, atol=1e-4)
    last = generator.pool(make_setup(), x, own)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(last), axis=-1)), 1, atol=1e-4)


def test_written_prompts_are_the_same_whether_shared_layers_are_cut_or_not(networks, batch):
    setup = make_setup()
    frozen, params = networks(setup)
    out = jitted(write, setup)(params, frozen, batch)
    weights, loras = generator.language_model(setup, params, frozen)
    ids = list(batch["generator"][1, batch["generator_mask"][1]])
    for step in range(int(out.mask[1].sum())):
        scores = np.where(frozen.allowed, scores_of(GENERATOR, weights, ids, loras)[-1], -np.inf)
        assert int(out.tokens[1, step]) == int(np.argmax(scores))
        ids.append(int(np.argmax(scores)))


# --- the straight-through prompt ---


@pytest.mark.parametrize("at_once, scaled", [(2, False), (32, False), (32, True)])
def test_the_relaxed_prompt_has_the_value_of_its_tokens_and_the_gradient_of_the_softmax(sampled, monkeypatch, at_once, scaled):
    monkeypatch.setattr(transformer, "SCORED_TOKENS", at_once)
    setup = dataclasses.replace(make_setup(), actor=dataclasses.replace(ACTOR, scaled_embedding=scaled))
    scale = ACTOR.width**0.5 if scaled else 1.0
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
    embedding, weight, states = draw(61, ACTOR.width), draw(3, 5, ACTOR.width), draw(3, 5, GENERATOR.width)
    weights = {"norm": {"scale": draw(GENERATOR.width)}, "head": {"kernel": draw(61, GENERATOR.width)}}
    frozen = generator.Frozen(None, {"embed": {"embedding": embedding}}, jnp.arange(61) != 4)
    key, rows = jax.random.key(3), jnp.arange(3)

    def relaxed(states, weights):
        return generator.relaxed_prompt(setup, weights, states, sampled, frozen, key, rows, 0.7)

    words = np.array(sampled.mask & (sampled.tokens != END))
    np.testing.assert_allclose(relaxed(states, weights), np.where(words[..., None], scale * embedding[sampled.tokens], 0), rtol=1e-6, atol=1e-6)

    found = jax.jit(jax.grad(lambda *args: jnp.sum(relaxed(*args) * weight), argnums=(0, 1)))(states, weights)
    logits, of_logits = jax.vjp(lambda *args: transformer.logits(GENERATOR, args[1], args[0]), states, weights)
    noise = np.stack([np.array(decode.gumbel(key, rows, i, 61)) for i in range(5)], axis=1)
    z = np.where(np.array(frozen.allowed), np.array(logits) / 0.7 + noise, -np.inf)
    soft = np.exp(z - z.max(-1, keepdims=True))
    soft /= soft.sum(-1, keepdims=True)
    back = scale * np.array(weight) @ np.array(embedding).T  # d loss / d soft
    expected = soft * (back - np.sum(soft * back, -1, keepdims=True)) / 0.7
    expected = of_logits(jnp.array(np.where(words[..., None], expected, 0), jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_the_relaxation_uses_the_noise_that_picked_the_tokens(networks, batch, monkeypatch):
    """Where the packed pass gives the sampler's scores, softmax's peak with the noise is the token that was sampled."""
    setup = make_setup(train={"prompt_gradient": "straight_through"}, generator={"temperature": 2.0})
    frozen, params = networks(setup)
    seen = {}

    def write(setup, params, frozen, prefill, key, rows, temperature, layers, plain=generator.write):
        seen["write"] = (jax.random.key_data(key), np.array(rows), temperature)
        seen["sampled"] = plain(setup, params, frozen, prefill, key, rows, temperature, layers)
        return seen["sampled"]

    def relaxed(setup, weights, states, sampled, frozen, key, rows, temperature, plain=generator.relaxed_prompt):
        seen["relaxed"] = (jax.random.key_data(key), np.array(rows), temperature)
        seen["logits"] = np.where(frozen.allowed, transformer.logits(GENERATOR, weights, states), -np.inf)
        return plain(setup, weights, states, sampled, frozen, key, rows, temperature)

    monkeypatch.setattr(generator, "write", write)
    monkeypatch.setattr(generator, "relaxed_prompt", relaxed)
    losses.joint_loss(setup, params, {}, frozen, batch, jax.random.key(11))
    for one, other in zip(seen["write"], seen["relaxed"]):
        np.testing.assert_array_equal(one, other)
    key, rows = jax.random.wrap_key_data(seen["relaxed"][0]), jnp.array(seen["relaxed"][1])
    noise = np.stack([np.array(decode.gumbel(key, rows, i, GENERATOR.vocab_size)) for i in range(5)], axis=1)
    real = np.array(seen["sampled"].mask)
    peaks = np.argmax(seen["logits"] / 2.0 + noise, axis=-1)
    np.testing.assert_array_equal(peaks[real], np.array(seen["sampled"].tokens)[real])
    assert real.sum() > 5 and not np.array_equal(peaks[real], np.argmax(seen["logits"], axis=-1)[real])


# --- losses and gradients ---


def test_token_loss_is_one_mean_over_all_weighted_tokens():
    likelihoods = jnp.log(jnp.array([[0.5, 0.9], [0.8, 0.5]]))
    loss = losses.token_loss(likelihoods, jnp.array([[1.0, 1.0], [1.0, 0.0]]))
    assert float(loss) == pytest.approx(-(np.log(0.5) + np.log(0.9) + np.log(0.8)) / 3, rel=1e-6)


def gradients(setup, frozen, params, batch, term):
    def loss(params):
        return losses.joint_loss(setup, params, copy, frozen, batch, jax.random.key(0))[1][term]

    copy = jax.lax.stop_gradient(params["prompt"])
    return jax.jit(jax.grad(loss))(params)


def norms(tree):
    return {jax.tree_util.keystr(path): float(jnp.linalg.norm(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("kind", ["none", "straight_through"])
def test_the_task_loss_reaches_what_the_method_says(networks, batch, kind, train):
    setup = make_setup(generator={"train": train}, train={"prompt_gradient": kind})
    frozen, params = networks(setup)
    found = gradients(setup, frozen, params, batch, "task_loss")
    assert all(norm > 0 for norm in norms({part: found[part] for part in ("embed", "shared", "hyper")}).values())
    private = norms(found["prompt"])
    if kind == "none":
        assert set(private.values()) == {0.0}
    else:
        assert all(norm > 0 for norm in private.values())


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_prompt_loss_reaches_shared_and_prompt_and_not_the_hypernetwork(networks, batch, train):
    setup = make_setup(generator={"train": train})
    frozen, params = networks(setup)
    found = gradients(setup, frozen, params, batch, "prompt_loss")
    assert set(norms(found["hyper"]).values()) == {0.0}
    learning = {k: found[k] for k in ("embed", "shared", "prompt")}
    assert all(norm > 0 for norm in norms(learning).values())


def test_at_step_0_only_the_last_layer_of_b_gets_a_task_gradient(networks, batch):
    setup = make_setup()
    frozen, params = networks(setup, random=False)
    found = norms(gradients(setup, frozen, params, batch, "task_loss"))
    alive = {name for name, norm in found.items() if norm > 0}
    assert alive == {f"['hyper']['{t}_b_{part}']" for t in ("q", "v", "down") for part in ("up", "bias")}


@pytest.mark.parametrize("kind", ["none", "straight_through"])
def test_the_joint_loss_is_the_weighted_sum(networks, batch, kind):
    setup = make_setup(train={"prompt_weight": 0.3, "prompt_gradient": kind})
    frozen, params = networks(setup)
    loss, metrics = jitted(losses.joint_loss, setup)(params, params["prompt"], frozen, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(float(metrics["task_loss"] + 0.3 * metrics["prompt_loss"]), rel=1e-6)


def test_the_frozen_copy_writes_the_prompts_where_they_are_constants(networks, batch):
    setup = make_setup(train={"prompt_gradient": "none"})
    frozen, params = networks(setup)
    other = {**params, "prompt": randomise(params["prompt"], 99, 3.0)}
    key, rows = jax.random.key(0), jnp.arange(3)
    by_copy = jitted(write, setup)(other, frozen, batch, key, rows, 1.0)
    joint = jitted(losses.joint_loss, setup)
    _, metrics = joint(params, other["prompt"], frozen, batch, key)
    h = jitted(generator.read, setup)(params, frozen, *(batch[name] for name in QUERY)).h
    loras = generator.adapt(setup, params["hyper"], h)
    task = jitted(losses.task_loss, setup)(frozen, loras, batch, by_copy.tokens, by_copy.mask)
    assert float(metrics["task_loss"]) == pytest.approx(float(task), rel=1e-5)
    _, live = joint(params, params["prompt"], frozen, batch, key)
    assert float(live["task_loss"]) != pytest.approx(float(task), rel=1e-5)


def test_task_gradients_are_those_of_finite_differences(networks, batch):
    setup = make_setup()
    frozen, params = networks(setup)
    fixed = (batch["expert"], batch["expert_mask"])

    def loss(params):  # the task term at fixed prompts, which are constants anyway
        h = generator.read(setup, params, frozen, *(batch[name] for name in QUERY)).h
        return losses.task_loss(setup, frozen, generator.adapt(setup, params["hyper"], h), batch, *fixed)

    check_directions(
        loss, params, [("hyper", "q_a_down"), ("hyper", "v_b_up"), ("hyper", "down_a_bias"), ("shared", "q", "a"), ("shared", "v", "b")]
    )


def test_prompt_gradients_are_those_of_finite_differences(networks, batch):
    setup = make_setup()
    frozen, params = networks(setup)

    def loss(params):
        prefill = prefilled(setup, params, frozen, batch)
        (states,) = generator.packed(setup, params, frozen, prefill, [(batch["expert"], batch["expert_mask"])])
        return losses.prompt_loss(setup, generator.language_model(setup, params, frozen)[0], states, batch)

    check_directions(loss, params, [("shared", "q", "b"), ("prompt", "v", "a")])


def check_directions(loss, params, leaves):
    """Compares, for each leaf, the slope along its gradient's signs with central differences."""
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    gradient = value_and_grad(params)[1]
    for leaf in leaves:
        found = gradient
        for key in leaf:
            found = found[key]
        direction = jnp.sign(found) / np.sqrt(found.size)

        def moved(step):
            def change(path, x):
                return x + step * direction if tuple(k.key for k in path) == leaf else x

            return float(value_and_grad(jax.tree_util.tree_map_with_path(change, params))[0])

        step = 1e-3
        slope = (moved(step) - moved(-step)) / (2 * step)
        assert slope == pytest.approx(float(jnp.sum(found * direction)), rel=0.03), leaf
        assert slope > 1e-4, leaf


# --- evaluation's own arithmetic ---


def test_a_derangement_moves_every_query():
    for count in (2, 3, 7, 50):
        order = evaluate.derangement(count, 0)
        assert sorted(order) == list(range(count)) and np.all(order != np.arange(count))


def test_the_interval_is_that_of_the_mean():
    scores = np.array([1.0] * 80 + [0.0] * 20)
    found = evaluate.interval(scores, 4000)
    assert found["mean"] == pytest.approx(0.8) and found["n"] == 100
    assert found["ci95"] == pytest.approx([0.72, 0.88], abs=0.015)  # 1.96 standard errors are 0.078


def test_log_likelihood_is_the_mean_over_each_rows_own_answer(networks, batch):
    setup = make_setup()
    frozen, _ = networks(setup)
    names = ("expert", "expert_mask", "query", "query_mask", "answer", "answer_mask")
    found = jitted(actor.log_likelihood, setup)(frozen, None, *(batch[k] for k in names))
    for row in range(3):
        prompt = batch["expert"][row, batch["expert_mask"][row]]
        ids = [1, 7, *prompt[prompt != END], *batch["query"][row, batch["query_mask"][row]]]
        answer = batch["answer"][row, batch["answer_mask"][row]]
        scores = jax.nn.log_softmax(scores_of(ACTOR, frozen.actor, [*ids, *answer])[len(ids) - 1 : -1])
        assert float(found[row]) == pytest.approx(float(np.mean([scores[i, t] for i, t in enumerate(answer)])), abs=1e-5)
