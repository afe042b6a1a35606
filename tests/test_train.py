"""The step: compiled once, exact to resume, the same on several devices; batches, sharding rules and rollouts."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTOR, END, GENERATOR, make_setup

from experiments import plan
from metatuner_jax import checkpoint, data, files, generator, losses, product, rollout, sharding, train, transformer
from metatuner_jax.config import MeshConfig

pytestmark = pytest.mark.usefixtures("compiled")
EVERY_SECOND = {"sync_every": 2, "learning_rate": 1e-2}


def make_step(setup, traces=None):
    def loss_fn(*args):
        if traces is not None:
            traces.append(1)
        return losses.joint_loss(setup, *args)

    phase = train.phases(setup)[-1]
    return train.make_train_step(loss_fn, setup.config.train, phase, phase.parts)


def run_steps(step, state, frozen, batch, count):
    metrics = []
    for _ in range(count):
        state, found = step(state, frozen, batch, jax.random.key(0))
        metrics.append(jax.tree.map(float, found))
    return state, metrics


@pytest.mark.smoke
def test_the_step_is_traced_once_and_lowers_the_loss(networks, batch):
    setup, traces = make_setup(train={"learning_rate": 1e-2, "prompt_gradient": "straight_through", "num_steps": 30}), []
    frozen, params = networks(setup, random=False)
    _, metrics = run_steps(make_step(setup, traces), train.init_state(setup, params), frozen, batch, 20)
    assert len(traces) == 1
    assert metrics[-1]["task_loss"] < 0.8 * metrics[0]["task_loss"]
    assert metrics[-1]["prompt_loss"] < 0.8 * metrics[0]["prompt_loss"]
    assert metrics[0]["delta_norm"] == 0 and metrics[-1]["delta_norm"] > 0


def widened(batch, factor):
    """Returns a batch with columns of padding, as many times as wide in queries and answers."""
    wide = dict(batch)
    for name in ("generator", "generator_mask", "own", "query", "query_mask", "answer", "answer_mask"):
        more = (factor - 1) * batch[name].shape[1]
        wide[name] = np.pad(batch[name], ((0, 0), (0, more) if name.startswith("answer") else (more, 0)))
    return wide


def test_a_batch_is_trimmed_to_the_least_bucket_that_holds_it(batch):
    wide = widened(batch, 4)
    assert {name: leaf.shape[1] for name, leaf in wide.items() if name in ("generator", "own", "query", "answer")} == {
        "generator": 24, "own": 24, "query": 28, "answer": 16,
    }  # fmt: skip
    trimmed = data.trim(wide, 4)
    assert trimmed.keys() == batch.keys()
    for name, leaf in batch.items():
        np.testing.assert_array_equal(trimmed[name], leaf)
    wide["query_mask"][2, -8] = True  # one token more than the first bucket holds: all parts take the second
    assert {name: leaf.shape[1] for name, leaf in data.trim(wide, 4).items()} == {
        "generator": 12, "generator_mask": 12, "own": 12, "query": 14, "query_mask": 14, "answer": 8, "answer_mask": 8,
        "expert": 5, "expert_mask": 5, "initial": 5, "initial_mask": 5,
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, data.trim(wide, 1), wide)


def test_the_step_compiles_once_a_bucket_and_padding_changes_nothing(networks, batch):
    setup, traces = make_setup(), []
    frozen, params = networks(setup)
    step, wide = make_step(setup, traces), widened(batch, 4)
    fresh = lambda: train.init_state(setup, jax.tree.map(jnp.array, params))
    buckets = [data.trim(wide, count) for count in (4, 2, 1, 2, 4, 4)]
    states, metrics = zip(*(run_steps(step, fresh(), frozen, one, 1) for one in buckets))
    assert len(traces) == 3
    for state, (found,) in zip(states[1:3], metrics[1:3]):
        for name in ("task_loss", "prompt_loss", "grad_norm"):
            assert found[name] == pytest.approx(metrics[0][0][name], rel=2e-4)


@pytest.mark.parametrize(("method", "gradient"), [("metatuner_j", "straight_through"), ("sft", "none"), ("dpo", "none")])
def test_a_batch_in_parts_is_learnt_from_as_one(method, gradient, networks, batch):
    setup = make_setup(method=method, train={"prompt_gradient": gradient}, rollout={"every": 1})
    frozen, params = networks(setup)
    again = np.array([0, 1, 2, 0, 2, 1])  # of six rows, in three parts of two
    batch = {name: leaf[again] for name, leaf in batch.items()} | {name + end: batch["answer" + end][rows] for name, rows in (
        ("chosen", again), ("rejected", again[::-1])) for end in ("", "_mask")}  # fmt: skip
    found = {}
    for parts in (1, 3):
        config, phase = dataclasses.replace(setup.config.train, accumulate=parts), train.phases(setup)[-1]
        step = train.make_train_step(phase.turns[0][0], config, phase, phase.parts)
        state = train.init_state(setup, jax.tree.map(jnp.array, params))
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        found[parts] = jax.tree.map(np.asarray, (state.opt_state, metrics))
    (moments, metrics), (whole, of_whole) = found[3], found[1]
    assert metrics["tokens"] == of_whole["tokens"] and metrics.keys() == of_whole.keys()
    for name in (name for name in metrics if name.endswith("loss") or name in ("grad_norm", "initial_share", "margin")):
        assert metrics[name] == pytest.approx(of_whole[name], rel=1e-4, abs=1e-7), name
    for here, there in zip(jax.tree.leaves(moments), jax.tree.leaves(whole)):  # after a step from zero, the gradients
        # As a whole: where large terms cancel, what is left of a single number depends on how a machine's products sum them.
        assert np.linalg.norm(here - there) <= 1e-4 * np.linalg.norm(there)


@pytest.mark.parametrize(("decay", "final_rate", "rates"), [
    ("cosine", 0.1, {0: 1 / 6, 5: 1.0, 55: 0.55, 105: 0.1}), ("linear", 0.0, {0: 1 / 6, 4: 5 / 6, 5: 1.0, 55: 0.5, 80: 0.25, 105: 0.0}),
    ("constant", 0.0, {0: 1 / 6, 5: 1.0, 105: 1.0}),
])  # fmt: skip
def test_the_rate_rises_and_falls_as_the_config_says(decay, final_rate, rates):
    setup = make_setup(train={"num_steps": 105, "learning_rate": 2e-3, "warmup_steps": 5, "decay": decay, "final_rate": final_rate})
    (phase,) = train.phases(setup)
    found = {step: float(train.rate_at(setup.config.train, phase, step)) / 2e-3 for step in rates}
    assert found == pytest.approx(rates, abs=1e-6)


def lowered(setup, batch, platforms=None):
    """Returns the step as it is given to the compiler, from shapes alone."""

    def make(key):
        base, actor = (transformer.init(model, key, setup.dtype) for model in (setup.generator, setup.actor))
        base["layers"] = tuple(transformer.cut(base["layers"], *ends) for ends in ((0, 3), (3, setup.generator.num_layers)))
        state = train.init_state(setup, generator.init(setup, base, key, actor))
        return state, generator.Frozen(base, actor, jnp.ones(setup.actor.vocab_size, bool))

    state, frozen = jax.eval_shape(make, jax.random.key(0))
    return make_step(setup).trace(state, frozen, batch, jax.random.key(0)).lower(lowering_platforms=platforms)


def test_the_program_does_not_grow_with_depth(batch):
    setup = make_setup(train={"prompt_gradient": "straight_through"})
    deeper = dataclasses.replace(
        setup, generator=dataclasses.replace(GENERATOR, num_layers=9), actor=dataclasses.replace(ACTOR, num_layers=8)
    )
    lines = [lowered(one, batch).as_text().count("\n") for one in (setup, deeper)]
    assert lines[0] == lines[1] > 1000


@pytest.mark.parametrize(("platform", "backend"), [("tpu", "tpu"), ("cuda", "gpu")])
def test_the_step_is_lowered_for_accelerators(batch, forget_traces, platform, backend):
    setup = make_setup(train={"prompt_gradient": "straight_through"})
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, dtype="bfloat16"))
    for_cpu = lowered(setup, batch).as_text()
    jax.clear_caches()
    with product.written_for(backend):
        text = lowered(setup, batch, (platform,)).as_text()
    assert "ui16" in for_cpu and "bf16" in text and "ui16" not in text  # bfloat16 is moved as its bits on a CPU alone


@pytest.mark.parametrize(("at_once", "alive"), [(8, False), (64, True)])
def test_no_scores_of_all_words_for_all_tokens_are_ever_made(batch, monkeypatch, at_once, alive):
    monkeypatch.setattr(transformer, "SCORED_TOKENS", at_once)
    setup = make_setup(train={"prompt_gradient": "straight_through"}, actor={"max_answer_tokens": 40})
    long = {**batch, "answer": np.full((3, 40), 5, np.int32), "answer_mask": np.ones((3, 40), bool)}
    shapes = re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", lowered(setup, long).compile().as_text())
    dims = {tuple(map(int, shape.split(","))) for shape in shapes}
    assert any(ACTOR.vocab_size in shape for shape in dims)
    assert any(ACTOR.vocab_size in shape and math.prod(shape) >= 3 * 40 * ACTOR.vocab_size for shape in dims) == alive


def test_the_copy_follows_the_prompt_decoder_at_multiples_of_sync_every(networks, batch):
    setup = make_setup(train=EVERY_SECOND)
    frozen, params = networks(setup)
    step, state = make_step(setup), train.init_state(setup, params)
    copies, lives = [], []
    for _ in range(5):
        lives.append(np.array(state.params["prompt"]["q"]["a"]))
        state, _ = step(state, frozen, batch, jax.random.key(0))
        copies.append(np.array(state.prompt_copy["q"]["a"]))
    for i, source in enumerate((0, 0, 2, 2, 4)):
        np.testing.assert_array_equal(copies[i], lives[source])
    assert not any(np.array_equal(*pair) for pair in ((lives[0], lives[2]), (lives[2], lives[4])))


def test_saved_and_restored_steps_equal_uninterrupted_ones(networks, batch, tmp_path):
    setup = make_setup(train=EVERY_SECOND)
    frozen, params = networks(setup)
    step = make_step(setup)
    fresh = lambda: train.init_state(setup, jax.tree.map(jnp.array, params))
    straight, all_metrics = run_steps(step, fresh(), frozen, batch, 6)
    half, _ = run_steps(step, fresh(), frozen, batch, 3)
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    store.save(3, half, 0.5)
    store.close()
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    restored = store.restore(store.latest(), fresh())
    store.close()
    resumed, later = run_steps(step, restored, frozen, batch, 3)
    assert [m["loss"] for m in later] == [m["loss"] for m in all_metrics[3:]]
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_the_newest_two_and_the_best_checkpoint_stay(tmp_path):
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    for step, score in ((1, 0.2), (2, 0.7), (3, 0.7), (4, 0.1), (5, 0.3)):
        store.save(step, {"x": jnp.arange(3) * step}, score)
    assert (store.latest(), store.best()) == (5, 3)
    np.testing.assert_array_equal(store.restore(3, {"x": jnp.zeros(3, jnp.int32)})["x"], [0, 3, 6])
    store.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "4", "5"]
    assert sorted(path.name for path in (tmp_path / "checkpoint_sums").iterdir()) == ["3.json", "4.json", "5.json"]


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    store.save(1, {"hyper": {"a": jnp.zeros((2, 3))}}, 0.0)
    store.manager.wait_until_finished()
    with pytest.raises(ValueError, match=r"another architecture: hyper/a is \(2, 3\) there and \(2, 4\) in this run"):
        store.restore(1, {"hyper": {"a": jnp.zeros((2, 4))}})
    store.close()


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    def loss_fn(params, copy, frozen, batch, key, step):
        return jnp.sum(params["hyper"]["w"] * batch["x"]), {}

    setup = make_setup()
    step = train.make_train_step(loss_fn, setup.config.train, train.phases(setup)[-1], ("hyper",))
    state = train.init_state(setup, {"hyper": {"w": jnp.array([1.0, 2.0])}})
    good, bad = {"x": jnp.array([1.0, 1.0])}, {"x": jnp.array([jnp.nan, 1.0])}
    state, _ = step(state, None, good, jax.random.key(0))
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    for count in (1, 2):
        state, metrics = step(state, None, bad, jax.random.key(0))
        assert int(metrics["bad_steps"]) == count
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))
    state, metrics = step(state, None, good, jax.random.key(0))
    assert int(metrics["bad_steps"]) == 0 and int(state.step) == 4
    assert not np.array_equal(before[0]["hyper"]["w"], state.params["hyper"]["w"])


# --- the mesh ---

SHARDED = """
import io, json, sys, types
import jax, numpy as np
sys.path.insert(0, sys.argv[1])
import conftest
from metatuner_jax import passes, sharding
from metatuner_jax.config import MeshConfig
from metatuner_jax.progress import Progress

jax.config.update("jax_log_compiles", True)
make = conftest.make_networks()
rows = {k: np.concatenate([v, v[::-1], v[:2]]) for k, v in conftest.make_batch().items()}  # 8 rows
out = {}
setup = conftest.make_setup(data={"buckets": 1})
for shape in ((1, 1, 1), (2, 2, 2)):
    frozen, params = make(setup)
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    frozen = sharding.place(frozen, mesh)
    leaf = frozen.actor["layers"]["q"]["kernel"]
    # More rows than are written at a time.
    does, index = passes.Passes(setup, frozen, mesh, 8, Progress(io.StringIO())), np.arange(20) % 8
    h = np.random.default_rng(0).normal(size=(20, setup.generator.width)).astype(np.float32)
    adapter = does.adapter({"hyper": conftest.randomise(params["hyper"], 3)}, h)
    prompts = rows["expert"][index], rows["expert_mask"][index]
    answered = does.answer(types.SimpleNamespace(**rows), index, *prompts, adapter, weigh=True)
    out[str(shape)] = [len(leaf.sharding.device_set), answered.tokens.tolist(), answered.likelihood.tolist()]
print(json.dumps(out))
"""


def test_several_devices_give_the_answers_of_one(tmp_path):
    """Answers by themselves, on random weights; whole runs are in test_meshes."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, os.path.dirname(__file__)], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("Finished XLA compilation of jit(_advance)") == 2  # once for each mesh
    found = json.loads(done.stdout.splitlines()[-1])
    (_, tokens_one, likely_one), (devices, tokens_many, likely_many) = found.values()
    assert devices == 8
    assert tokens_many == tokens_one
    np.testing.assert_allclose(likely_many, likely_one, rtol=1e-4)


def test_every_array_of_the_state_has_a_sharding_rule_and_an_unknown_one_is_an_error(networks):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for kind in ("lora", "full"):
        setup = make_setup(generator={"train": kind})
        frozen, params = networks(setup)
        sharding.place(train.init_state(setup, params), mesh)
        sharding.place(frozen, mesh)
    with pytest.raises(ValueError, match="no sharding rule names the parameter 'extra/thing'"):
        sharding.place({"extra": {"thing": jnp.zeros(3)}}, mesh)


@pytest.mark.parametrize(("path", "shape", "spec"), [
    ("head/kernel", (64, 12), (("tensor", "fsdp"), None)),
    ("head/kernel", (62, 12), ("tensor", "fsdp")),
    ("head/kernel", (61, 12), (None, "fsdp")),
    ("layers/q/kernel", (3, 12, 64), (None, None, ("tensor", "fsdp"))),
    ("layers/q/kernel", (3, 12, 62), (None, "fsdp", "tensor")),
    ("layers/down/kernel", (3, 64, 12), (None, ("tensor", "fsdp"), None)),
    ("layers/down/kernel", (3, 62, 13), (None, "tensor", None)),
])  # fmt: skip
def test_weights_are_split_along_one_axis_where_the_mesh_divides_it(path, shape, spec):
    assert tuple(sharding.spec_at(path, shape, plan.Mesh(1, 4, 2))) == spec


def constraints(jaxpr):
    """Returns the (shape, spec) of all that a program places, and the shapes of what its scans stack."""
    placed, stacked = [], []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            placed.append((eqn.outvars[0].aval.shape, eqn.params["sharding"].spec))
        if eqn.primitive.name == "scan":
            stacked += [out.aval.shape[1:] for out in eqn.outvars[eqn.params["num_carry"] :]]
            inner = constraints(eqn.params["jaxpr"].jaxpr)
            placed, stacked = placed + inner[0], stacked + inner[1]
    return placed, stacked


def test_gradients_are_placed_as_their_weights_are_and_no_scan_copies_these():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    shape = lambda size, spec: jax.ShapeDtypeStruct(size, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, ("tensor", "fsdp"))
    of_stack = jax.sharding.PartitionSpec(None, *split)
    rows, stack = shape((8, 64, 16), jax.sharding.PartitionSpec(("data", "fsdp"))), shape((3, 16, 24), of_stack)

    def loss(stack, x):
        """Of layers without remat: [8, 64, 16] by [16, 24], which is more than the kernel to send."""
        multiply = lambda x, kernel: product.einsum("bti,io->bto", x, kernel)
        return jnp.sum(jax.lax.scan(lambda x, kernel: (sharding.multiplied(multiply, x, kernel, "up/kernel")[..., :16], None), x, stack)[0])

    placed, stacked = constraints(jax.jit(jax.grad(loss)).trace(stack, rows).jaxpr.jaxpr)
    assert ((16, 24), split) in placed and (8, 64, 16) in stacked
    assert stacked.count((16, 24)) == 1  # the gradient: the kernels themselves are there already
    placed, _ = constraints(jax.jit(sharding.placed_in_jit).trace({"shared": {"up": {"kernel": shape((3, 16, 24), whole)}}}).jaxpr.jaxpr)
    assert placed == [((3, 16, 24), of_stack)]


def test_a_mesh_that_splits_a_side_of_a_torus_is_made(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1 of size 8")

    whole = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(jax, "make_mesh", refuse)
    assert sharding.make_mesh(MeshConfig(), jax.devices()[:1]) == whole


def test_a_mesh_that_does_not_match_the_devices_is_refused():
    with pytest.raises(ValueError, match="mesh.fsdp=3.* need 3 devices and there are 1"):
        sharding.make_mesh(MeshConfig(fsdp=3), jax.devices()[:1])


# --- batches ---


def test_batches_are_a_function_of_the_step_and_cover_each_epoch():
    seen = np.concatenate([data.order_at(step, 10, 4, seed=3) for step in range(5)])
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    np.testing.assert_array_equal(data.order_at(2, 10, 4, seed=3), seen[8:12])
    assert not np.array_equal(seen, np.concatenate([data.order_at(step, 10, 4, seed=4) for step in range(5)]))


# --- rollouts ---


def attempt(score, log_likelihood):
    return {"score": score, "log_likelihood": log_likelihood}


@pytest.mark.parametrize(
    ("attempts", "winner"),
    [
        ([attempt(0, -3.0), attempt(1, -9.0)], 1),  # the score decides
        ([attempt(1, -3.0), attempt(1, -2.0), attempt(0, -1.0)], 1),  # then the likelihood
        ([attempt(1, -2.0), attempt(1, -2.0)], 0),  # a full tie keeps the incumbent
        ([attempt(0, -2.0), attempt(0, -2.5)], 0),
    ],
)
def test_best_of_n_follows_the_tie_rules(attempts, winner):
    assert rollout.best(attempts) == winner


def record(step, row, tokens, best):
    return {"step": step, "id": row, "prompt": "p", "answer": "a", "score": 1.0, "log_likelihood": -1.0, "best": best, "tokens": tokens}


def test_the_expert_store_survives_a_restart_and_drops_what_came_later(tmp_path):
    initial, initial_mask = data.pad([[5, END]] * 3, 4, "right")
    make = lambda: rollout.Experts(tmp_path / "experts.jsonl", ["x", "y", "z"], initial, initial_mask)
    experts = make()
    experts.add([record(0, "x", [9, 8, END], True), record(0, "x", [7, END], False), record(0, "y", [5, END], True)])
    experts.add([record(4, "x", [3, END], True)])
    tokens, mask = experts.tokens_of(np.array([0, 1, 2]))
    assert [list(t[m]) for t, m in zip(tokens, mask)] == [[3, END], [5, END], [5, END]]

    again = make()
    again.restore(step=4)  # a checkpoint of 4 updates was made before the refresh at step 4
    tokens, mask = again.tokens_of(np.array([0, 1, 2]))
    assert [list(t[m]) for t, m in zip(tokens, mask)] == [[9, 8, END], [5, END], [5, END]]
    assert [line["step"] for line in files.read_lines(tmp_path / "experts.jsonl")] == [0, 0, 0]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "experts.jsonl"
    path.write_text(json.dumps(record(0, "x", [9, END], True)) + "\n" + '{"step": 0, "id": "y", "pro')
    assert [line["id"] for line in files.read_lines(path)] == ["x"]


def test_refreshes_take_queries_of_the_coming_steps():
    settings = make_setup(rollout={"every": 5, "num_queries": 8}, train={"num_steps": 20, "batch_size": 4}).config
    coming = np.concatenate([data.order_at(step, 50, 4, settings.seed) for step in range(5, 10)])
    first, second = rollout.queries_at(0, 50, settings, 20), rollout.queries_at(5, 50, settings, 20)
    assert len(set(second)) == 8 and set(second) <= set(coming) and set(first) != set(second)
    np.testing.assert_array_equal(second, rollout.queries_at(5, 50, settings, 20))
    late = rollout.queries_at(19, 50, settings, 20)  # one step is left, with fewer rows than are asked for
    assert len(set(late)) == 8 and set(data.order_at(19, 50, 4, settings.seed)) <= set(late)


@pytest.mark.parametrize(("method", "rates"), [
    ("hyper_only", {"hyper/q_b_bias": 1e-2, "hyper/q_b_up": 3e-4, "hyper/gain": 3e-4, "shared/q/a": 5e-4}),
    ("sft", {"hyper/q/a": 1e-2, "hyper/q/b": 1e-2}),
    ("prompt_only", {"shared/q/a": 1e-2, "prompt/q/b": 1e-2}),
])  # fmt: skip
def test_biases_learn_as_a_static_lora_does_and_weights_at_a_rate_of_their_own(method, rates):
    def loss_fn(params, copy, frozen, batch, key, step):
        return sum(jnp.sum(leaf * batch) for leaf in jax.tree.leaves(params)), {}

    setup = make_setup(method=method, train={"learning_rate": 1e-2, "hyper_rate": 0.03, "generator_rate": 0.05, "warmup_steps": 0})
    tree = flax.traverse_util.unflatten_dict({path: jnp.ones(3) for path in rates}, sep="/")
    step = train.make_train_step(loss_fn, setup.config.train, train.phases(setup)[-1], tuple(tree))
    state, _ = step(train.init_state(setup, tree), None, jnp.array([1e-3, -2e-3, 3e-3]), jax.random.key(0))
    moved = flax.traverse_util.flatten_dict(state.params, sep="/")
    assert {path: float(np.abs(leaf - 1).max()) for path, leaf in moved.items()} == pytest.approx(rates, rel=1e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_actor_is_neither_learnt_nor_given_away_where_it_is_the_generators_checkpoint(networks, batch, kind):
    """The step takes its state as its own; what it shares with the frozen weights would be gone or changed after it."""
    setup = make_setup(generator={"train": kind})
    base = networks(make_setup())[0].generator
    setup = generator.Setup(setup.config, GENERATOR, GENERATOR, END, (1, 7))
    frozen = generator.Frozen(None if kind == "full" else base, base, networks(make_setup())[0].allowed)
    before = jax.tree.map(np.array, base)
    state = train.init_state(setup, generator.init(setup, base, jax.random.key(0)))
    learning = jax.tree.structure(state.params)
    state, _ = run_steps(make_step(setup), state, frozen, batch, 2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, base))
    assert jax.tree.structure(state.params) == learning
    assert {part: jax.tree.structure(moments[0].mu) for part, moments in state.opt_state.items()} == {
        part: jax.tree.structure(tree) for part, tree in state.params.items()
    }
    assert set(state.params) == {"embed", "shared", "prompt", "hyper"}
