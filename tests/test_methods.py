"""The methods by name: what each learns, their losses, their phases, and whole runs of each on a tiny model."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTOR, END, GENERATOR, make_setup, randomise, scores_of
from test_evaluate import Numbers, make_rows

from experiments import run
from metatuner_jax import config, files, generator, lora, losses, methods, preference, rollout, search, train
from metatuner_jax.methods import METHODS

CONFIGS = pathlib.Path(__file__).parents[1] / "experiments" / "configs"
FULL = ("embed", "shared", "prompt", "hyper")
PARTS = {  # what learns, by method
    "zero_shot": (), "prompt_search": (), "prompt_only": FULL[:3], "sft": ("hyper",), "dpo": ("hyper",), "hyper_only": ("embed", "shared", "hyper"),
    "unshared": (*FULL, "encoder"), "better_together": ("hyper",), "metatuner_i": FULL, "metatuner_j": FULL, "metatuner_st": FULL,
}  # fmt: skip


def loss_of(setup, **settings):
    """Returns (params, copy, frozen, batch, key) -> (loss, metrics), compiled."""
    return jax.jit(functools.partial(losses.joint_loss, setup, **settings))


# --- the table ---


def test_methods_learn_what_their_names_say(networks):
    assert set(METHODS) == set(PARTS) == set(config.METHODS)
    for name, parts in PARTS.items():
        setup = make_setup(name)
        assert METHODS[name].parts == parts
        params = networks(setup)[1]
        assert set(params) == set(parts) | ({"actor"} if name == "dpo" else set())
        phases = train.phases(setup)
        assert set().union(*(phase.parts for phase in phases)) == set(params)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_methods_differ_under_every_config_that_is_shipped(path):
    def resolved(name):
        found = methods.resolve(run.load_config(path, (("method", name),)))
        return (
            found.train.prompt_gradient,
            METHODS[name].prompt,
            METHODS[name].adapter,
            METHODS[name].shared,
            METHODS[name].alternating,
        )

    assert len({resolved(name) for name in METHODS if not METHODS[name].preference}) == len(METHODS) - 1


def test_a_name_decides_few_settings():
    base = config.make(
        train={"num_steps": 11, "prompt_gradient": "none"}, generator={"train": "full"}, warmup={"generator_steps": 3}
    )
    resolve = lambda name: methods.resolve(dataclasses.replace(base, method=name))
    assert resolve("metatuner_j") == base
    assert resolve("metatuner_st").train.prompt_gradient == "straight_through"
    assert (resolve("dpo").warmup.actor_steps, resolve("dpo").train.num_steps) == (5, 6)  # as many steps in all as the others
    assert resolve("sft").generator.train == "lora" and resolve("sft").warmup.generator_steps == 0
    assert resolve("hyper_only").generator.train == "full" and resolve("hyper_only").warmup.generator_steps == 0


# --- losses ---


def test_without_written_prompts_the_actor_reads_the_expert_prompts(networks, batch):
    hyper_only, joint = make_setup("hyper_only"), make_setup()
    frozen, params = networks(joint)
    own = {part: params[part] for part in ("embed", "shared", "hyper")}
    loss, metrics = loss_of(hyper_only)(own, {}, frozen, batch, jax.random.key(0))
    h = generator.read(joint, params, frozen, batch["generator"], batch["generator_mask"], batch["own"]).h
    loras = generator.adapt(joint, params["hyper"], h)
    expected = losses.task_loss(joint, frozen, loras, batch, batch["expert"], batch["expert_mask"])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5) and "prompt_loss" not in metrics


def test_a_static_lora_is_the_same_for_all_rows_and_starts_at_zero(networks, batch):
    setup = make_setup("sft", hyper={"scale": 1.5})
    frozen, params = networks(setup, random=False)
    bare = losses.task_loss(setup, frozen, None, batch, batch["expert"], batch["expert_mask"])
    loss, metrics = loss_of(setup)(params, {}, frozen, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(float(bare), rel=1e-6) and float(metrics["delta_norm"]) == 0
    params = {"hyper": randomise(params["hyper"], 3)}
    one = {t: lora.Lora(leaf["a"], 1.5 * leaf["b"]) for t, leaf in params["hyper"].items()}
    rows = lora.repeat(one, 3)
    loss, metrics = loss_of(setup)(params, {}, frozen, batch, jax.random.key(0))
    expected = losses.task_loss(setup, frozen, rows, batch, batch["expert"], batch["expert_mask"])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    dense = [1.5 * np.einsum("lir,lro->lio", leaf["a"], leaf["b"]) for leaf in params["hyper"].values()]
    kernels = [frozen.actor["layers"][t]["kernel"] for t in params["hyper"]]
    norm, weights = (np.sqrt(sum(np.sum(np.square(x)) for x in tree)) for tree in (dense, kernels))
    assert float(metrics["delta_norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(metrics["delta_ratio"]) == pytest.approx(norm / weights, rel=1e-4)


def term_gradients(setup, params, frozen, batch, key):
    """Returns the gradient of the task loss and that of the prompt loss, without its weight."""

    @jax.jit
    def gradients(params):
        both = lambda p: [
            losses.joint_loss(setup, p, params["prompt"], frozen, batch, key)[1][f"{term}_loss"] for term in losses.TERMS
        ]
        _, back = jax.vjp(both, params)
        return [back([a, b])[0] for a, b in ((1.0, 0.0), (0.0, 1.0))]

    return gradients(params)


def test_an_encoder_of_its_own_takes_the_task_gradient_in_the_place_of_the_shared_layers(networks, batch):
    setup = make_setup("unshared", train={"prompt_gradient": "none"})
    frozen, params = networks(setup)
    task, prompt = term_gradients(setup, params, frozen, batch, jax.random.key(0))
    norm = lambda tree: sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
    assert norm(task["encoder"]) > 0 and norm(task["shared"]) == norm(task["prompt"]) == 0
    assert norm(prompt["shared"]) > 0 and norm(prompt["encoder"]) == norm(prompt["hyper"]) == 0


def test_one_term_at_a_time_is_that_term_of_both(networks, batch):
    setup = make_setup("metatuner_i", train={"prompt_weight": 0.4})
    frozen, params = networks(setup)
    args = (params, params["prompt"], frozen, batch, jax.random.key(2))
    both = loss_of(make_setup(train={"prompt_weight": 0.4}))(*args)[1]
    task, found = loss_of(setup, terms=("task",))(*args)
    assert float(task) == pytest.approx(float(both["task_loss"]), rel=1e-5) and "prompt_loss" not in found
    prompt, found = loss_of(setup, terms=("prompt",))(*args)
    assert float(prompt) == pytest.approx(float(both["prompt_loss"]), rel=1e-5) and "task_loss" not in found


def test_prompt_only_learns_from_the_experts_alone(networks, batch):
    setup = make_setup("prompt_only")
    frozen, params = networks(make_setup())
    own = {part: params[part] for part in FULL[:3]}
    loss, metrics = loss_of(setup)(own, {}, frozen, batch, jax.random.key(0))
    joint = loss_of(make_setup())(params, params["prompt"], frozen, batch, jax.random.key(0))[1]
    assert float(loss) == pytest.approx(float(joint["prompt_loss"]), rel=1e-5) and "task_loss" not in metrics


def test_the_temperature_falls_to_its_last_value():
    settings = make_setup(generator={"temperature": 2.0, "final_temperature": 0.5}, train={"num_steps": 5}).config
    found = [float(losses.temperature_at(settings, step)) for step in range(5)]
    np.testing.assert_allclose(found, [2.0, 2**0.5, 1.0, 0.5**0.5, 0.5], rtol=1e-6)
    assert losses.temperature_at(make_setup().config, 3) == 1.0


def test_the_preference_loss_is_the_papers_formula(networks, batch):
    setup = make_setup("dpo", preference={"beta": 0.3}, hyper={"scale": 1.0})
    frozen, params = networks(setup)
    chosen, rejected = (batch["answer"], batch["answer_mask"]), (batch["answer"][:, ::-1], batch["answer_mask"][:, ::-1])
    rejected = jnp.array([[4, END, 0, 0], [9, 8, 7, END], [3, END, 0, 0]]), jnp.array([[1, 1, 0, 0], [1] * 4, [1, 1, 0, 0]], bool)
    pair = {"chosen": chosen[0], "chosen_mask": chosen[1], "rejected": rejected[0], "rejected_mask": rejected[1]}
    loss, metrics = jax.jit(functools.partial(losses.preference_loss, setup))(params, {}, frozen, {**batch, **pair}, None, 0)
    loras = generator.static(params["hyper"], 1.0)

    def total(row, answer, used):
        prompt = np.array(batch["expert"][row][batch["expert_mask"][row]])
        ids = [1, 7, *prompt[prompt != END], *np.array(batch["query"][row][batch["query_mask"][row]])]
        words = np.array(answer[0][row][answer[1][row]])
        scores = jax.nn.log_softmax(scores_of(ACTOR, frozen.actor, [*ids, *words], used)[len(ids) - 1 : -1])
        return sum(float(scores[i, t]) for i, t in enumerate(words))

    margins = [
        0.3 * (total(row, chosen, loras) - total(row, chosen, None) - total(row, rejected, loras) + total(row, rejected, None))
        for row in range(3)
    ]
    assert float(loss) == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), rel=1e-3)
    assert float(metrics["margin"]) == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-4)


def test_deltas_that_differ_between_queries_are_told_from_those_that_do_not(networks, batch):
    setup = make_setup()
    frozen, params = networks(setup)
    metrics = loss_of(setup)(params, params["prompt"], frozen, batch, jax.random.key(0))[1]
    assert 0 < metrics["delta_variance"] < 1 < metrics["delta_rank"] <= 3
    static = {**params, "hyper": {name: leaf * (not name.endswith("_up")) for name, leaf in params["hyper"].items()}}
    metrics = loss_of(setup)(static, params["prompt"], frozen, batch, jax.random.key(0))[1]
    assert float(metrics["delta_variance"]) == pytest.approx(0, abs=1e-4) and float(metrics["delta_rank"]) == pytest.approx(
        1, abs=1e-2
    )


# --- the second hypernetwork ---


def test_the_trunk_starts_at_zero_and_tells_layers_projections_and_queries_apart(networks):
    setup = make_setup(hyper={"network": "trunk"})
    _, fresh = networks(setup, random=False)
    h = jnp.array(np.random.default_rng(0).normal(size=(3, GENERATOR.width)), jnp.float32)
    assert all(np.all(x.b == 0) and np.std(x.a) > 0.01 for x in generator.adapt(setup, fresh["hyper"], h).values())
    _, params = networks(setup)
    hyper = {name: leaf * (not name.endswith("_bias")) for name, leaf in params["hyper"].items()}
    loras = generator.adapt(setup, hyper, h)
    for x, width in ((loras["q"], 40), (loras["v"], 20)):
        assert x.a.shape == (3, 3, ACTOR.width, 2) and x.b.shape == (3, 3, 2, width)
        assert len({float(jnp.sum(x.b[layer, row])) for layer in range(3) for row in range(3)}) == 9
    gram = lora.gram(loras)
    assert float(lora.effective_rank(gram)) > 1.01


def test_the_trunk_does_not_grow_with_depth_and_is_small_enough_for_a_3b_actor():
    """Qwen2.5-3B's shapes, all seven projections at rank 8; the bias of each layer is counted apart."""
    actor = config.ModelConfig(
        "qwen2", vocab_size=151936, num_layers=36, width=2048, ff_width=11008, num_heads=16, num_kv_heads=2, head_width=128
    )
    hyper = config.HyperConfig(network="trunk", rank=8, hidden=128, targets=config.PROJECTIONS)

    def count(layers):
        network = generator.Trunk(hyper, dataclasses.replace(actor, num_layers=layers))
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 3584)))["params"]
        return sum(leaf.size for name, leaf in shapes.items() if not name.endswith("_bias"))

    assert count(36) < 60e6 and count(72) - count(36) == 36 * 128  # an embedding a layer


# --- the step and the phases ---


def test_the_resting_part_is_left_alone(networks, batch):
    setup = make_setup("metatuner_i", train={"alternate_every": 2, "learning_rate": 1e-2, "num_steps": 8, "weight_decay": 0.1})
    frozen, params = networks(setup)
    (phase,) = train.phases(setup)
    assert [phase.turn_at(step) for step in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    steps = [train.make_train_step(loss, setup.config.train, phase, parts) for loss, parts in phase.turns]
    state = train.init_state(setup, params)
    for step in range(4):
        copy = jax.tree.map(np.array, (state.params, state.opt_state))
        turn = phase.turn_at(step)
        state, _ = steps[turn](state, frozen, batch, jax.random.key(0))
        resting = "prompt" if turn == 0 else "hyper"
        for before, after in zip(copy, (state.params, state.opt_state)):
            jax.tree.map(np.testing.assert_array_equal, before[resting], after[resting])
            for part in {"shared", "prompt", "hyper"} - {resting}:
                assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before[part]), jax.tree.leaves(after[part])))


def test_phases_follow_one_another_and_moments_are_kept_while_they_are_needed(networks):
    setup = make_setup(warmup={"actor_steps": 3, "generator_steps": 2}, train={"num_steps": 4})
    phases = train.phases(setup)
    assert [(p.name, p.first, p.steps) for p in phases] == [("actor", 0, 3), ("generator", 3, 2), ("joint", 5, 4)]
    assert [train.phase_at(phases, step).name for step in (0, 2, 3, 4, 5, 8, 9)] == [
        *["actor"] * 2,
        *["generator"] * 2,
        *["joint"] * 3,
    ]
    state = train.init_state(setup, networks(setup)[1])
    assert train.rest(state, phases, 2).opt_state["actor"] and not train.rest(state, phases, 3).opt_state["actor"]
    assert train.rest(state, phases, 3).opt_state["hyper"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_warmed_up_actor_is_what_was_trained(networks, batch, kind):
    setup = make_setup(warmup={"actor_steps": 3, "actor_train": kind, "targets": ("q", "down"), "rank": 2})
    frozen, params = networks(setup)
    params = {**params, "actor": randomise(params["actor"], 8, 0.1)}
    loss, _ = losses.actor_loss(setup, params, {}, frozen, batch, None, 0)
    warm = train.warmed_up(setup, frozen, params)
    after = losses.task_loss(setup, warm, None, batch, batch["initial"], batch["initial_mask"])
    assert float(loss) == pytest.approx(float(after), rel=1e-4)
    bare = losses.task_loss(setup, frozen, None, batch, batch["initial"], batch["initial_mask"])
    assert abs(float(bare) - float(loss)) > 1e-3


@pytest.mark.parametrize("method, weight", [("metatuner_j", 0.3), ("metatuner_i", 1.0)])
def test_the_gradient_share_is_that_of_the_shared_layers(method, weight, networks, batch):
    setup = make_setup(method, train={"prompt_weight": 0.3})
    frozen, params = networks(setup)
    state, key = train.init_state(setup, params), jax.random.key(1)
    found = float(train.make_gradient_share(setup, train.phases(setup)[-1])(state, frozen, batch, key))
    key = jax.random.fold_in(key, 0)  # the step's own
    gradients = [grad["shared"] for grad in term_gradients(setup, params, frozen, batch, key)]
    task, prompt = (np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grad))) for grad in gradients)
    prompt *= weight
    assert found == pytest.approx(task / (task + prompt), rel=1e-3) and 0.01 < found < 0.99


# --- prompts for a whole task, and pairs ---


class Actor:
    """Stands in for `Passes`: an answer is right where the prompt's first token is as high as the query asks."""

    def __init__(self, setup, proposals):
        self.setup, self.proposals, self.calls = setup, list(proposals), 0

    def adapter(self, params, h):
        return None

    def write(self, params, rows, index, key, temperature, copies=1):
        from metatuner_jax import data
        from metatuner_jax.passes import Written

        ids = [self.proposals.pop(0) for _ in range(len(index) * copies)]
        return Written(None, *data.pad(ids, rows.initial.shape[1], "right"))

    def answer(self, rows, index, prompt, mask, adapter=None, what="", weigh=False, key=None, temperature=0.0):
        from metatuner_jax.passes import Answered

        self.calls += len(index)
        tokens = np.stack([prompt[:, 0], np.full(len(index), END)], axis=1)
        return Answered(tokens, np.ones_like(tokens, bool), None, -np.arange(len(index), dtype=np.float32))


def high(text, example):
    from metatuner_jax import tasks

    right = float(int(text.split()[0]) >= 10 + int(example.query))
    return tasks.Score(right, right)


def make_experts(folder, rows, keeps=False):
    return rollout.Experts(folder / "experts.jsonl", [e.id for e in rows.examples], rows.initial, rows.initial_mask, keeps)


class Words(Numbers):
    def generator_ids(self, prompt, query):
        return [int(i) for i in prompt.split()] + [3 + int(query)], [False] * len(prompt.split()) + [True]


def test_a_search_takes_the_prompt_that_is_right_most_often(tmp_path):
    setup = make_setup("prompt_search", rollout={"num_queries": 6, "search_prompts": 2, "search_rounds": 2})
    rows = make_rows(6)
    experts = make_experts(tmp_path, rows)
    passes = Actor(setup, [[11, END], [9, END], [13, 4, END], [12, END]])
    found = search.search(passes, {}, jax.random.key(0), rows, experts, Words(), high, 0, 0)
    assert experts.for_all() == [13, 4, END] and found["rollout_changed"] == 1
    assert found["rollout_score"] == pytest.approx(4 / 6)  # queries 0 to 3 ask for no more than 13
    assert found["rollout_attempts"] == passes.calls == 5 * 6  # the initial prompt and four proposals
    lines = files.read_lines(tmp_path / "experts.jsonl")
    assert len(lines) == 31 and [line["prompt"] for line in lines if line["id"] is None] == ["13 4"]
    assert list(experts.tokens_of(2)[0][:3]) == [13, 4, END]
    again = make_experts(tmp_path, rows)
    again.restore(1)
    assert again.for_all() == [13, 4, END] and again.for_all(0) is None and again.calls == 30


def test_a_search_whose_proposals_are_no_better_keeps_the_initial_prompts(tmp_path):
    setup = make_setup("prompt_search", rollout={"num_queries": 4, "search_prompts": 2, "search_rounds": 1})
    rows = make_rows(6)
    experts = make_experts(tmp_path, rows)
    found = search.search(Actor(setup, [[4, END], [3, END]]), {}, jax.random.key(0), rows, experts, Words(), high, 0, 0)
    assert experts.for_all() is None and found["rollout_changed"] == 0 and found["prompt"] is None


def test_a_search_does_not_score_a_proposal_that_is_the_initial_prompt_again(tmp_path):
    setup = make_setup("prompt_search", rollout={"num_queries": 4, "search_prompts": 3, "search_rounds": 1})
    rows = make_rows(6)
    same = {name: np.tile(getattr(rows, name)[:1], (6, 1)) for name in ("initial", "initial_mask")}
    rows = dataclasses.replace(rows, **same)
    initial = [int(i) for i in rows.initial[0][rows.initial_mask[0]]]
    experts = make_experts(tmp_path, rows)
    passes = Actor(setup, [initial, [4, END], [4, END]])
    found = search.search(passes, {}, jax.random.key(0), rows, experts, Words(), high, 0, 0)
    assert found["rollout_attempts"] == passes.calls == experts.calls == 2 * 4


def test_a_search_from_an_earlier_prompt_settles_on_what_it_found_itself(tmp_path):
    """The best checkpoint may be older than the newest search, whose prompt was chosen under another adapter."""
    setup = make_setup("better_together", rollout={"num_queries": 4, "search_prompts": 1, "search_rounds": 1})
    rows = make_rows(6)
    experts = make_experts(tmp_path, rows)
    line = {"id": None, "prompt": "", "answer": None, "score": 0.5, "log_likelihood": -1.0, "best": True}
    experts.add([{**line, "step": 0, "tokens": [12, END]}, {**line, "step": 2, "tokens": [13, END]}])
    assert experts.for_all(2) == [12, END] and experts.for_all() == [13, END]
    found = search.search(Actor(setup, [[4, END]]), {}, jax.random.key(0), rows, experts, Words(), high, 4, 4, experts.for_all(2))
    assert found["prompt"] == experts.for_all() == [12, END] and found["rollout_attempts"] == 8


def test_a_search_without_budget_says_so(tmp_path):
    setup = make_setup("prompt_search", rollout={"num_queries": 4, "search_prompts": 2, "budget": 7})
    rows = make_rows(6)
    found = search.search(
        Actor(setup, []), {}, jax.random.key(0), rows, make_experts(tmp_path, rows), Words(), high, 0, 0, [9, END]
    )
    assert (
        found["rollout_attempts"] == 0 and found["prompt"] == [9, END] and "rollout.budget=7 actor calls are spent" in found["what"]
    )


def test_a_budget_ends_rollouts_and_an_actor_that_does_not_change_is_not_asked_twice(tmp_path):
    settings = {"num_queries": 3, "num_prompts": 2, "every": 2, "budget": 20}
    setup = make_setup("prompt_only", rollout=settings, train={"batch_size": 3})
    rows = make_rows(3)
    experts = make_experts(tmp_path, rows, keeps=True)
    proposals = [[11, END], [12, END]] * 3
    passes = Actor(setup, proposals * 3)
    refresh = lambda step: rollout.refresh(passes, {}, jax.random.key(0), rows, experts, Words(), high, step, step, 9)
    first = refresh(0)
    assert first["rollout_attempts"] == 9 == passes.calls == experts.calls and first["rollout_initial_share"] == 0
    assert refresh(2)["rollout_attempts"] == 0 and passes.calls == 9  # the same prompts: their answers are known
    assert [bool(line.get("known")) for line in files.read_lines(tmp_path / "experts.jsonl")] == [False] * 9 + [True] * 6
    assert experts.summary() == {"expert_size": 3, "expert_score": 1.0}
    experts.calls = 18  # two answers are left, and a query takes three
    found = refresh(4)
    assert found["rollout_attempts"] == 0 and "rollout.budget=20 actor calls are spent" in found["what"]


def test_pairs_are_a_right_and_a_wrong_answer(tmp_path):
    setup = make_setup("dpo", rollout={"num_queries": 3, "every": 2}, preference={"num_samples": 2}, train={"batch_size": 3})
    rows = make_rows(3)
    experts = make_experts(tmp_path, rows)
    pairs = preference.Pairs(tmp_path / "pairs.jsonl", [e.id for e in rows.examples], 4)

    class Sampler(Actor):
        def answer(self, rows, index, prompt, mask, *rest, **settings):
            prompt = np.array(
                [{0: [20], 1: [3]}[i % 2] if rows.examples[row].query != "2" else [30] for i, row in enumerate(index)]
            )
            return super().answer(rows, index, prompt, mask, *rest, **settings)

    found = preference.refresh(Sampler(setup, []), {}, jax.random.key(0), rows, experts, pairs, Words(), high, 0, 0, 4)
    assert found["rollout_attempts"] == pairs.calls == 6 and found["rollout_changed"] == 2  # query 2 was always right
    again = preference.Pairs(tmp_path / "pairs.jsonl", [e.id for e in rows.examples], 4)
    again.restore(1)
    assert again.found == pairs.found and again.calls == 6
    assert [[s["score"] for s in line["samples"]] for line in files.read_lines(tmp_path / "pairs.jsonl")].count([1.0, 0.0]) == 2
    batch = again.batch_at(0, rows, experts, 2, 0)
    assert batch["chosen"].tolist() == [[20, END, 0, 0]] * 2 and batch["rejected"].tolist() == [[3, END, 0, 0]] * 2
    assert {int(np.argmax(np.all(rows.query == query, axis=1))) for query in batch["query"]} == {0, 1}
    with pytest.raises(RuntimeError, match="no pair of a right and a wrong answer"):
        preference.Pairs(tmp_path / "none.jsonl", [], 4).batch_at(0, rows, experts, 2, 0)
