"""The LLM's identities; its numbers are held to torch's in test_parity_golden.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTOR, END, forward, scores_of

from metatuner_jax import decode, lora, transformer
from metatuner_jax.config import projection_widths

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# The same weights in a model some of whose layers look no further back than four tokens, and turn by a base of their own.
WINDOWED = dataclasses.replace(ACTOR, sliding_window=4, sliding_layers=(True, False, True), sliding_rope_theta=50.0)
models = pytest.mark.parametrize("model", [ACTOR, WINDOWED], ids=["full", "sliding"])


@pytest.fixture(scope="module")
def params():
    return transformer.init(ACTOR, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, ACTOR.vocab_size, (3, 9)).astype(np.int32)


def loras_for(rows, zero=False):
    rng, loras = np.random.default_rng(2), {}
    for target in TARGETS:
        i, o = projection_widths(ACTOR, target)
        shape = (ACTOR.num_layers, rows) if rows else (ACTOR.num_layers,)
        b = np.zeros((*shape, 2, o)) if zero else rng.normal(size=(*shape, 2, o)) * 0.2
        loras[target] = lora.Lora(jnp.array(rng.normal(size=(*shape, i, 2)), jnp.float32), jnp.array(b, jnp.float32))
    return loras


@pytest.mark.smoke
def test_zero_delta_leaves_the_model_unchanged(params, tokens):
    plain = forward(ACTOR, params, tokens, None, None)
    np.testing.assert_array_equal(plain, forward(ACTOR, params, tokens, None, loras_for(3, zero=True)))


@pytest.mark.smoke
def test_each_row_equals_the_model_with_its_own_delta_merged(params, tokens):
    loras = loras_for(3)
    together = forward(ACTOR, params, tokens, None, loras)
    for row in range(3):
        merged = {**params, "layers": lora.merge(params["layers"], lora.row(loras, row))}
        alone = forward(ACTOR, merged, tokens[row : row + 1], None, None)
        np.testing.assert_allclose(together[row : row + 1], alone, atol=2e-5)
    assert np.abs(together - forward(ACTOR, params, tokens, None, None)).max() > 0.01


def test_one_lora_for_all_rows_equals_the_same_lora_for_each(params, tokens):
    shared = loras_for(0)
    each = lora.repeat(shared, 3)
    one, many = (forward(ACTOR, params, tokens, None, loras) for loras in (shared, each))
    np.testing.assert_allclose(one, many, atol=1e-5)


@models
def test_cut_stack_composes_to_the_whole(params, tokens, model):
    layers = params["layers"]
    halves = {**params, "layers": (transformer.cut(layers, 0, 1), transformer.cut(layers, 1, 3))}
    loras = loras_for(3)
    whole = forward(model, params, tokens, None, loras)
    np.testing.assert_allclose(whole, forward(model, halves, tokens, None, loras), atol=1e-6)
    mask = jnp.ones(tokens.shape, bool)
    context, x = transformer.make_context(model, transformer.positions_of(mask), transformer.causal(mask)), transformer.embed(model, params, jnp.array(tokens))
    for half, ends in zip(halves["layers"], ((0, 1), (1, 3))):
        x, _ = transformer.run(model, half, x, context, transformer.cut(loras, *ends), first=ends[0])
    np.testing.assert_allclose(whole, transformer.logits(model, params, x), atol=1e-6)


def test_remat_changes_neither_scores_nor_gradients(params, tokens):
    def loss(loras, remat):
        return jnp.sum(jnp.square(transformer.forward(ACTOR, params, tokens, loras=loras, remat=remat)))

    plain, *others = (transformer.forward(ACTOR, params, tokens, remat=remat) for remat in ("none", "products", "all"))
    for other in others:
        np.testing.assert_allclose(plain, other, atol=1e-6)
    found = [jax.jit(jax.value_and_grad(loss), static_argnums=1)(loras_for(len(tokens)), remat) for remat in ("none", "products", "all")]
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[0], other)


@pytest.mark.parametrize("at_once, cap", [(3, None), (7, None), (32, None), (3, 0.5)])
def test_log_likelihoods_and_their_gradients_are_those_of_all_scores_at_once(params, monkeypatch, at_once, cap):
    monkeypatch.setattr(transformer, "SCORED_TOKENS", at_once)
    model = dataclasses.replace(ACTOR, logit_cap=cap)
    params = {**params, "head": {"kernel": 10 * params["head"]["kernel"]}}
    rng = np.random.default_rng(3)
    x, targets = jnp.array(rng.normal(size=(2, 7, ACTOR.width)), jnp.float32), jnp.array(rng.integers(0, ACTOR.vocab_size, (2, 7)))
    weights = jnp.array(rng.normal(size=(2, 7)), jnp.float32)

    def expected(x, params):
        plain = transformer.logits(ACTOR, params, x)
        scores = jax.nn.log_softmax(plain if cap is None else cap * jnp.tanh(plain / cap), axis=-1)
        return jnp.sum(weights * jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0])

    found = lambda x, params: jnp.sum(weights * transformer.log_likelihoods(model, params, x, targets))
    pairs = (jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(x, params) for function in (found, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *pairs)


@pytest.mark.parametrize("holes", [(0, 1), (7, 8), (3, 5)], ids=["left", "right", "middle"])
def test_padding_anywhere_changes_no_real_token(params, tokens, holes):
    mask = np.ones(9, bool)
    mask[list(holes)] = False
    padded = forward(ACTOR, params, tokens[:1], mask[None], None)
    short = forward(ACTOR, params, tokens[:1, mask], None, None)
    np.testing.assert_allclose(padded[:, mask], short, atol=1e-5)


@pytest.mark.parametrize("holes", [(), (2, 5)], ids=["dense", "holes"])
def test_sliding_layers_see_the_newest_tokens_of_a_row(params, tokens, holes):
    """Three layers that see two tokens before their own carry what a token says six positions on, and no further."""
    windowed, mask = dataclasses.replace(ACTOR, sliding_window=3), np.ones((1, 9), bool)
    mask[:, list(holes)] = False
    other = np.where(np.arange(9) == 0, (tokens[:1] + 1) % ACTOR.vocab_size, tokens[:1])
    change = np.abs(np.array(forward(windowed, params, tokens[:1], mask, None)) - forward(windowed, params, other, mask, None)).max(axis=-1)[mask]
    assert (change[:7] > 1e-6).all() and (change[7:] == 0).all() and len(change) == 9 - len(holes)


def test_a_window_that_no_row_reaches_changes_nothing(params, tokens):
    near = dataclasses.replace(ACTOR, sliding_window=9, sliding_layers=(True, False, True))
    programs = [str(jax.make_jaxpr(lambda tokens, model=model: transformer.forward(model, params, tokens))(tokens)) for model in (near, ACTOR)]
    assert programs[0] == programs[1]


def test_the_embeddings_scale_is_rounded_to_the_type_of_the_weights():
    model = dataclasses.replace(ACTOR, width=3072, scaled_embedding=True)
    table = jnp.array(np.random.default_rng(0).normal(size=(5, 3072)), jnp.bfloat16)
    found = transformer.embed(model, {"embed": {"embedding": table}}, jnp.array([[3]]))
    np.testing.assert_array_equal(found[0, 0], table[3] * jnp.bfloat16(55.5))  # not 55.4256
    assert found.dtype == jnp.bfloat16


def test_parameter_tree_is_as_written_here(params):
    assert jax.tree.map(np.shape, params) == {
        "embed": {"embedding": (61, 20)},
        "layers": {
            "attn_norm": {"scale": (3, 20)},
            "q": {"kernel": (3, 20, 40), "bias": (3, 40)},
            "k": {"kernel": (3, 20, 20), "bias": (3, 20)},
            "v": {"kernel": (3, 20, 20), "bias": (3, 20)},
            "q_norm": {"scale": (3, 10)},
            "k_norm": {"scale": (3, 10)},
            "o": {"kernel": (3, 40, 20)},
            "mlp_norm": {"scale": (3, 20)},
            "gate": {"kernel": (3, 20, 44)},
            "up": {"kernel": (3, 20, 44)},
            "down": {"kernel": (3, 44, 20)},
        },
        "norm": {"scale": (20,)},
        "head": {"kernel": (61, 20)},
    }


# --- lora ---


def test_gram_and_norm_are_those_of_the_dense_deltas():
    loras = loras_for(3)
    dense = [np.einsum("lbir,lbro->blio", x.a, x.b).reshape(3, -1) for x in loras.values()]
    dense = np.concatenate(dense, axis=1)
    np.testing.assert_allclose(lora.gram(loras), dense @ dense.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lora.norm(lora.row(loras, 1)), np.linalg.norm(dense[1]), rtol=1e-5)


def test_norms_are_those_of_each_dense_delta_alone():
    loras = loras_for(3)
    for which in (loras, lora.row(loras, 1)):
        found = lora.norms(which)
        for target, one in which.items():
            np.testing.assert_allclose(found[target], np.linalg.norm(np.asarray(one.a) @ np.asarray(one.b), axis=(-2, -1)), rtol=1e-5)


def test_the_effective_rank_counts_directions():
    rows = np.array([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    for vectors, expected in ((rows, 3), (rows[:1] * [[1], [2], [-1]], 1), (rows[[0, 0, 1]] * [[1], [1], [2**0.5]], 2), (0 * rows, 0)):
        assert float(lora.effective_rank(jnp.array(vectors @ vectors.T, jnp.float32))) == pytest.approx(expected, abs=1e-3)


def test_mean_delta_at_full_rank_is_the_mean_of_the_dense_deltas():
    loras = loras_for(3)
    halves = [jax.tree.map(lambda leaf: leaf[:, :2], loras), jax.tree.map(lambda leaf: leaf[:, 2:], loras)]
    whole, energy = lora.mean(halves, 6)
    assert energy == pytest.approx(1.0, abs=1e-6)
    for target, x in loras.items():
        dense = np.einsum("lbir,lbro->lio", x.a, x.b) / 3
        np.testing.assert_allclose(np.einsum("lir,lro->lio", whole[target].a, whole[target].b), dense, atol=1e-5)
    cut, energy = lora.mean(halves, 2)
    dense = np.einsum("lbir,lbro->lio", loras["q"].a, loras["q"].b) / 3
    u, s, vt = np.linalg.svd(dense)
    best = np.einsum("lir,lr,lro->lio", u[..., :2], s[:, :2], vt[:, :2])
    np.testing.assert_allclose(np.einsum("lir,lro->lio", cut["q"].a, cut["q"].b), best, atol=1e-5)
    assert 0.3 < energy < 1


# --- decoding ---


def run_sample(params, tokens, mask, **settings):
    allowed = settings.pop("allowed", np.ones(ACTOR.vocab_size, bool))
    settings = {"max_new_tokens": 6, "end_id": END, **settings}
    loras, model = settings.pop("loras", None), settings.pop("model", ACTOR)

    @jax.jit
    def run(params, tokens, mask):
        prefill = read(model, params, tokens, mask, loras)
        return decode.sample(model, params, prefill, allowed=jnp.array(allowed), loras=loras, **settings)

    return run(params, tokens, mask)


def read(config, params, tokens, mask, loras=None):
    return decode.prefill(config, params, transformer.embed(config, params, jnp.array(tokens)), jnp.array(mask), loras)


@pytest.fixture(scope="module")
def left_padded(tokens):
    mask = np.ones(tokens.shape, bool)
    mask[1, :4], mask[2, :1] = False, False
    return tokens, mask


@pytest.mark.smoke
@models
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_cached_greedy_decoding_equals_the_full_forward(params, left_padded, layers, model):
    tokens, mask = left_padded
    loras = loras_for(3)
    out = run_sample(params, tokens, mask, loras=loras, layers=layers, model=model)
    for row in range(3):
        ids, mine = list(tokens[row, mask[row]]), jax.tree.map(lambda leaf: leaf[:, row : row + 1], loras)
        for step in range(6):
            token = int(np.argmax(scores_of(model, params, ids, mine)[-1]))
            assert int(out.tokens[row, step]) == token
            ids.append(token)
            if token == END:
                break
        assert int(out.mask[row].sum()) == len(ids) - mask[row].sum()


@pytest.mark.parametrize("adapted", [True, False])
def test_a_cut_stack_decodes_unrolled_as_scanned(params, left_padded, adapted):
    layers = params["layers"]
    halves = {**params, "layers": (transformer.cut(layers, 0, 1), transformer.cut(layers, 1, 3))}
    loras = tuple(transformer.cut(loras_for(3), *ends) for ends in ((0, 1), (1, 3))) if adapted else ({}, {})
    scanned, unrolled = (run_sample(halves, *left_padded, loras=loras, layers=how) for how in ("scan", "unroll"))
    np.testing.assert_array_equal(scanned.tokens, unrolled.tokens)
    np.testing.assert_allclose(scanned.first, unrolled.first, atol=1e-6)


def test_copies_of_rows_that_were_read_once_are_as_if_read_one_by_one(params, left_padded):
    noise = {"max_new_tokens": 6, "end_id": END, "allowed": jnp.ones(ACTOR.vocab_size, bool), "key": jax.random.key(5)}
    noise |= {"rows": jnp.arange(6), "temperature": 2.0}
    tokens, mask = left_padded
    once = jax.jit(lambda p: decode.sample(ACTOR, p, read(ACTOR, p, tokens, mask).repeat(2), **noise))(params)
    each = jax.jit(lambda p: decode.sample(ACTOR, p, read(ACTOR, p, tokens.repeat(2, 0), mask.repeat(2, 0)), **noise))(params)
    np.testing.assert_array_equal(once.tokens, each.tokens)
    assert not np.array_equal(once.tokens[0], once.tokens[1])


@pytest.mark.parametrize("model", [ACTOR, WINDOWED, dataclasses.replace(WINDOWED, sliding_window=13)], ids=["plain", "sliding", "sliding over one segment"])
def test_segments_that_follow_see_the_rows_and_not_each_other(params, left_padded, model):
    tokens, mask = left_padded
    rng = np.random.default_rng(8)
    segments = [(jnp.array(rng.integers(3, 61, (3, m))), jnp.ones((3, m), bool)) for m in (4, 3)]
    loras = loras_for(3)
    states = jax.jit(lambda p: decode.follow(model, p, read(model, p, tokens, mask, loras), segments, loras))(params)
    for row in range(3):
        ids, mine = tokens[row, mask[row]], jax.tree.map(lambda leaf: leaf[:, row : row + 1], loras)
        for found, (segment, _) in zip(states, segments):
            alone = scores_of(model, params, [*ids, *segment[row]], mine)[len(ids) - 1 : -1]
            np.testing.assert_allclose(transformer.logits(model, params, found[row : row + 1])[0], alone, atol=3e-5)


def test_a_row_that_ended_writes_only_end_tokens(params, left_padded):
    tokens, mask = left_padded
    greedy = np.array(run_sample(params, tokens, mask).tokens)
    end = int(greedy[0, 2])  # make a token that row 0 writes the end token
    first = int(np.flatnonzero(greedy[0] == end)[0])
    out = run_sample(params, tokens, mask, end_id=end)
    np.testing.assert_array_equal(out.mask[0], np.arange(6) <= first)
    assert np.all(np.array(out.tokens[0, first:]) == end)


@pytest.mark.parametrize("layers, model", [("scan", ACTOR), ("unroll", ACTOR), ("scan", WINDOWED)], ids=["scan", "unroll", "sliding"])
def test_rows_that_take_the_places_of_others_write_what_they_write_alone(params, layers, model):
    count, slots, rng = 24, 2, np.random.default_rng(3)
    tokens = rng.integers(3, ACTOR.vocab_size, (count, 5)).astype(np.int32)
    mask = np.arange(5) >= rng.integers(0, 3, (count, 1))
    allowed = np.isin(np.arange(ACTOR.vocab_size), [END, 10, 20, 30, 40])
    how = {"end_id": END, "allowed": jnp.array(allowed), "key": jax.random.key(4), "temperature": 2.0}
    loras = loras_for(count)
    alone = run_sample(params, tokens, mask, loras=loras, rows=jnp.arange(count), max_new_tokens=7, model=model, **how)
    lengths = np.array(alone.mask).sum(axis=1)
    assert lengths.min() < 3 and lengths.max() == 7

    written_by = {**params, "layers": transformer.unstack(params["layers"])} if layers == "unroll" else params

    @jax.jit
    def begin(row, tokens, mask, mine):
        return decode.begin(model, params, read(model, params, tokens, mask, mine), max_new_tokens=7, rows=row, layers=layers, **how)

    def fresh(row):
        mine = jax.tree.map(lambda leaf: leaf[:, row : row + 1], loras)
        return begin(jnp.array([row]), tokens[row : row + 1], mask[row : row + 1], mine), mine

    advance = jax.jit(lambda state, loras, until: decode.advance(model, written_by, state, loras=loras, until=until, **how))
    refill, steps = jax.jit(decode.refill), 0
    state, its = decode.vacant(*fresh(0), slots)
    waiting, holds = list(range(count)), {}  # slot -> row
    while waiting or holds:
        for slot in range(slots):
            if slot not in holds and waiting:
                holds[slot] = waiting.pop(0)
                state, its = refill(state, its, *fresh(holds[slot]), jnp.array([slot]))
        before = int(state.column)
        state = advance(state, its, slots - len(holds) + 1)
        steps += (int(state.column) - before) % state.columns.shape[1]
        for slot in [slot for slot in holds if state.ended[slot]]:
            row = holds.pop(slot)
            np.testing.assert_array_equal(state.tokens[slot], alone.tokens[row])
            np.testing.assert_allclose(state.first[slot], alone.first[row], atol=1e-5)
            assert state.count[slot] == lengths[row]
    # The columns went round more than once, and nobody waited for the longest of a batch.
    assert state.columns.shape[1] < steps < sum(max(lengths[i : i + slots]) - 1 for i in range(0, count, slots))


def test_forbidden_tokens_are_never_written(params, left_padded):
    allowed = np.zeros(ACTOR.vocab_size, bool)
    allowed[[END, 11, 12]] = True
    out = run_sample(params, *left_padded, allowed=allowed, key=jax.random.key(0), rows=jnp.arange(3), temperature=5.0)
    assert set(np.unique(out.tokens)) <= {END, 11, 12}


def test_samples_depend_on_the_row_number_and_not_on_the_batch(params, left_padded):
    tokens, mask = left_padded
    draw = lambda rows: np.array(
        run_sample(params, tokens[rows], mask[rows], key=jax.random.key(7), rows=jnp.array(rows), temperature=2.0).tokens
    )
    np.testing.assert_array_equal(draw([0, 1, 2])[2], draw([2])[0])
    same_text = run_sample(
        params, tokens[[0, 0]], mask[[0, 0]], key=jax.random.key(7), rows=jnp.array([0, 1]), temperature=2.0
    ).tokens
    assert not np.array_equal(same_text[0], same_text[1])


def test_sampled_frequencies_follow_the_softmax_at_the_temperature():
    logits = jnp.array([1.0, 0.0, -1.0, 3.0])
    allowed = jnp.array([True, True, True, False])
    rows = jnp.arange(4000)
    noise = decode.gumbel(jax.random.key(3), rows, 0, 4)
    picks = decode.pick(jnp.tile(logits, (4000, 1)), noise, 2.0, 1.0, allowed)
    expected = np.exp([0.5, 0, -0.5]) / np.exp([0.5, 0, -0.5]).sum()
    np.testing.assert_allclose(np.bincount(picks, minlength=4)[:3] / 4000, expected, atol=0.03)


def test_the_first_of_the_largest_scores_is_taken():
    logits = jnp.round(jax.random.normal(jax.random.key(0), (200, 30)))  # with many ties
    allowed = jnp.arange(30) != 4
    np.testing.assert_array_equal(decode.pick(logits, None, 0.0, 1.0, allowed), np.argmax(np.where(allowed, logits, -np.inf), axis=-1))
    assert 0 <= int(decode.pick(jnp.full((1, 30), jnp.nan), None, 0.0, 1.0, allowed)[0]) < 30  # of scores that are none, some token


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    noise = decode.gumbel(jax.random.key(0), jnp.arange(2000), 0, 4)
    draw = lambda p: set(np.unique(decode.pick(jnp.tile(logits, (2000, 1)), noise, 1.0, p, jnp.ones(4, bool))))
    assert draw(0.4) == {0}
    assert draw(0.7) == {0, 1}
    assert draw(0.9) == {0, 1, 2}
    assert draw(1.0) == {0, 1, 2, 3}
