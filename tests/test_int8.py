"""Frozen weights in 8 bits compute what the same weights made dense do, in whole runs and out of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ACTOR, END, forward, make_setup, scores_of
from small_runs import STRONG, assert_same, command, own_logits, read_lines, start

import metatuner_jax as mt
from experiments import export, plan, predict, run
from metatuner_jax import config as config_lib
from metatuner_jax import decode, int8, job, lora, losses, pretrained, sharding, transformer
from metatuner_jax import networks as networks_lib
from metatuner_jax.config import PROJECTIONS, projection_widths

SETTINGS = (*STRONG, "weights=int8")


@pytest.fixture(scope="module")
def params():
    """A model with weights in 8 bits; its biases are not zero."""
    full = transformer.init(ACTOR, jax.random.key(0))
    for name in ("q", "k", "v"):
        full["layers"][name]["bias"] = 0.1 * jax.random.normal(jax.random.key(1), full["layers"][name]["bias"].shape)
    return {**full, "layers": int8.quantise_layers(full["layers"])}


def dense(params):
    """Returns a model's parameters with the products of its whole numbers and scales in their place."""
    if isinstance(params["layers"], tuple):
        return {**params, "layers": tuple(dense({"layers": stack})["layers"] for stack in params["layers"])}
    parts = lambda leaves: {"kernel": int8.dense(leaves), **{name: leaves[name] for name in leaves if name == "bias"}}
    return {**params, "layers": {name: parts(leaves) if "kernel" in leaves else leaves for name, leaves in params["layers"].items()}}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, ACTOR.vocab_size, (3, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def loras():
    """A LoRA of each of three rows on every projection."""
    rng, found = np.random.default_rng(2), {}
    for target in PROJECTIONS:
        i, o = projection_widths(ACTOR, target)
        draw = lambda *shape: jnp.array(0.3 * rng.normal(size=(ACTOR.num_layers, 3, *shape)), jnp.float32)
        found[target] = lora.Lora(draw(i, 2), draw(2, o))
    return found


# --- whole numbers and scales ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_weight_is_within_half_its_outputs_scale(dtype):
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(2, 31, 5)) * 10.0 ** rng.integers(-6, 6, (2, 1, 5))).astype(jnp.dtype(dtype))
    kernel[1, :, 3] = 0
    whole, scale = int8.quantise(kernel)
    assert whole.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (2, 5)
    kernel = kernel.astype(np.float32)
    assert np.all(np.abs(kernel - int8.dense({"kernel": whole, "scale": scale})) <= 0.5001 * scale[:, None])
    largest = np.abs(whole.astype(int)).max(axis=1)
    assert largest[1, 3] == 0 and set(largest.flatten()) == {0, 127}
    for theirs, ours in zip(jax.jit(int8.quantise)(kernel), (whole, scale)):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=theirs.dtype == np.int8)
    np.testing.assert_array_equal(int8.quantise(whole * scale[:, None])[0], whole)


# --- the model ---


def test_logits_are_those_of_the_dense_weights(params, tokens, loras):
    for given in (None, loras):
        np.testing.assert_allclose(forward(ACTOR, params, tokens, None, given), forward(ACTOR, dense(params), tokens, None, given), atol=1e-5)
    full = transformer.init(ACTOR, jax.random.key(0))
    for name in ("q", "k", "v"):
        full["layers"][name]["bias"] = params["layers"][name]["bias"]
    off = np.abs(forward(ACTOR, params, tokens, None, None) - forward(ACTOR, full, tokens, None, None)).max()
    assert 1e-4 < off < 0.1


@pytest.mark.parametrize("remat", ["none", "products"])
def test_gradients_through_it_are_those_of_the_dense_weights(params, tokens, loras, remat):
    def loss(loras, params):
        return jnp.sum(jnp.square(transformer.forward(ACTOR, params, tokens, loras=loras, remat=remat)))

    found, wanted = (jax.jit(jax.value_and_grad(loss))(loras, given) for given in (params, dense(params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found[1]))


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_cached_greedy_decoding_equals_the_full_forward(params, tokens, loras, layers):
    mask = np.ones(tokens.shape, bool)
    mask[1, :4] = False

    @jax.jit
    def written(params):
        x = transformer.embed(ACTOR, params, jnp.array(tokens))
        read = decode.prefill(ACTOR, params, x, jnp.array(mask), loras)
        allowed = jnp.arange(ACTOR.vocab_size) != END
        return decode.sample(ACTOR, params, read, max_new_tokens=4, end_id=END, allowed=allowed, loras=loras, layers=layers).tokens

    for row, found in enumerate(np.array(written(params))):
        ids, mine = list(tokens[row, mask[row]]), jax.tree.map(lambda leaf: leaf[:, row : row + 1], loras)
        for token in found:
            scores = scores_of(ACTOR, params, ids, mine)[-1]
            scores[END] = -np.inf
            assert int(np.argmax(scores)) == token
            ids.append(int(token))


def test_no_dense_copy_of_the_layers_is_alive(tokens):
    """Of a program with its backward pass: beside weights in 8 bits it takes hardly more than beside dense ones."""
    model = dataclasses.replace(ACTOR, num_layers=16, width=64, ff_width=256, num_heads=4, num_kv_heads=4, head_width=16)
    full = lambda: transformer.init(model, jax.random.key(0))
    small = lambda: {**full(), "layers": int8.quantise_layers(full()["layers"])}
    layer = sum(int(np.prod(projection_widths(model, name))) for name in PROJECTIONS)
    adapter = {"q": lora.Lora(jnp.ones((16, 64, 2)), jnp.ones((16, 2, 64)))}

    def loss(loras, params):
        return jnp.sum(transformer.forward(model, params, tokens[:1], loras=loras))

    options = mt.train.product.compiler_options()
    taken = {}
    for name, make in (("dense", full), ("small", small)):
        shapes = jax.eval_shape(make)
        sizes = jax.jit(jax.value_and_grad(loss), compiler_options=options).lower(adapter, shapes).compile().memory_analysis()
        taken[name] = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    saved, more = taken["dense"][0] - taken["small"][0], taken["small"][1] - taken["dense"][1]
    assert saved > 0.7 * 4 * 16 * layer and more < 2 * 4 * layer


def test_a_step_learns_what_it_does_beside_dense_weights(networks, batch):
    setup = make_setup("hyper_only")
    frozen, learning = networks(setup)
    in_8_bits = lambda tree: {**tree, "layers": jax.tree.map(int8.quantise_layers, tree["layers"], is_leaf=lambda node: isinstance(node, dict))}
    frozen = frozen.replace(generator=in_8_bits(frozen.generator), actor=in_8_bits(frozen.actor))
    assert {leaf.dtype.name for leaf in jax.tree.leaves((frozen.generator, frozen.actor))} == {"int8", "float32"}

    @jax.jit
    def step(learning, frozen):
        loss = lambda learning: losses.joint_loss(setup, learning, {}, frozen, batch, jax.random.key(0))
        return jax.value_and_grad(loss, has_aux=True)(learning)

    (loss, metrics), gradients = step(learning, frozen)
    (dense_loss, dense_metrics), dense_gradients = step(learning, frozen.replace(generator=dense(frozen.generator), actor=dense(frozen.actor)))
    np.testing.assert_allclose(loss, dense_loss, rtol=1e-5)
    for name in ("delta_ratio", "delta_norm", "tokens"):
        np.testing.assert_allclose(metrics[name], dense_metrics[name], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max() + 1e-7), gradients, dense_gradients)


# --- loading ---


def test_a_checkpoint_is_quantised_as_it_is_read(tiny_model):
    seen = {}
    config, params = pretrained.load(tiny_model, "bfloat16", lambda path, array: seen.setdefault(path, array), "int8")
    _, full = pretrained.load(tiny_model, "float32")
    for name in PROJECTIONS:
        whole, scale = int8.quantise(np.asarray(full["layers"][name]["kernel"]))  # of the file's numbers, not of bfloat16's
        np.testing.assert_array_equal(params["layers"][name]["kernel"], whole)
        np.testing.assert_array_equal(params["layers"][name]["scale"], scale)
        assert seen[f"layers/{name}/scale"] is params["layers"][name]["scale"]
    assert {path: array.dtype.name for path, array in seen.items() if "/kernel" not in path and "layers/" not in path} == {
        "embed/embedding": "bfloat16", "norm/scale": "bfloat16",
    }  # fmt: skip
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    sizes = [int(np.prod(projection_widths(config, name))) for name in PROJECTIONS]
    outputs = sum(projection_widths(config, name)[1] for name in PROJECTIONS)
    assert bytes_of(full["layers"]) - bytes_of(params["layers"]) == config.num_layers * (3 * sum(sizes) - 4 * outputs + 2 * 2 * config.width)


def test_numbers_that_are_not_finite_are_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = dict(safetensors.numpy.load_file(folder / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.inf
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.up_proj.weight holds a number that is not finite"):
        pretrained.load(folder, weights="int8")
    pretrained.load(folder)
    with pytest.raises(ValueError, match="weights='int4' is not one of dtype, int8; did you mean 'int8'"):
        pretrained.load(folder, weights="int4")


@pytest.mark.parametrize("learns", ["lora", "full"])
def test_shapes_are_those_of_what_is_loaded(learns, root):
    arguments = command(root, "none", "weights=int8", f"generator.train={learns}", f"generator.model={root}/larger", "dtype=bfloat16")
    path, _, assignments, _ = run.parse(arguments)
    work = job.prepare(run.load_config(path, assignments))
    frozen, learning = networks_lib.load(work.setup, work.tokens, jax.random.key(0), work.mesh)
    state, shapes = networks_lib.shapes(work.setup)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)
    assert kinds(frozen) == kinds(shapes) and kinds(learning) == kinds(state.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(learning)} == {"float32"}  # the generator that learns is in full
    assert (frozen.generator is None) == (learns == "full") and frozen.actor["layers"]["q"]["kernel"].dtype == jnp.int8


def test_a_plan_counts_the_bits(root):
    path, _, assignments, _ = run.parse(command(root, "none"))
    setups = {weights: job.prepare(run.load_config(path, [*assignments, ("weights", weights)])).setup for weights in config_lib.WEIGHTS}
    held = {name: plan.held(setup, plan.Mesh(1, 1, 1))["generator and actor, frozen, one checkpoint"] for name, setup in setups.items()}
    for weights in config_lib.WEIGHTS:
        loaded = pretrained.load(root / "model", weights=weights)[1]
        assert held[weights] == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert "weights=int8" in [name for name, *_ in plan.changes(setups["dtype"], plan.Mesh(1, 1, 1))]
    assert "weights=int8" not in [name for name, *_ in plan.changes(setups["int8"], plan.Mesh(1, 1, 1))]


def test_no_scale_is_away_from_its_output():
    mesh = plan.Mesh(1, 2, 2)
    for name in PROJECTIONS:
        kernel, scale = (sharding.spec_at(f"layers/{name}/{leaf}", shape, mesh) for leaf, shape in (("kernel", (3, 8, 4)), ("scale", (3, 4))))
        assert (kernel[2], *scale) == ((None,) if name in ("o", "down") else (("tensor", "fsdp"), None, "tensor"))


REFUSED = {
    "an unknown kind": (("weights=int4",), "weights='int4' is not one of dtype, int8; did you mean 'int8'?"),
    "a warm-up": (("weights=int8", "warmup.actor_steps=3"), "weights=int8 cannot go with warmup.actor_steps=3"),
    "a warm-up in full": (("weights=int8", "warmup.actor_steps=3", "warmup.actor_train=full"), "weights=int8 cannot go with warmup.actor_steps=3"),
    "pairs": (("weights=int8", "method=dpo"), "weights=int8 cannot go with method=dpo"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_in_8_bits_is_refused_in_one_line(case, root, tmp_path, capsys, no_weights):
    settings, text = REFUSED[case]
    assert run.main(command(root, tmp_path / "run", *settings)) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_what_learns_nothing_needs_no_warm_up():
    config_lib.check(config_lib.make(method="zero_shot", weights="int8", warmup={"actor_steps": 3}))


# --- whole runs ---


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory, compiled):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("int8") / "run"
    code, output = start(command(root, folder, *SETTINGS))
    assert code == 0 and "float32, frozen layers in int8, mesh" in output
    return folder


def test_a_run_goes_on_and_comes_to_the_same(folder, root, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    for name in ("results.json", "predictions.jsonl", "checkpoint_sums/4.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    code, output = start(command(root, tmp_path / "run", *SETTINGS))
    assert code == 0 and "resuming at step 2 of 4" in output
    assert_same(tmp_path / "run", folder)
    assert run.main(command(root, folder, *STRONG)) == 2  # other weights are another run


def test_the_tuner_answers_as_the_run_did(folder):
    tuner, predictions = mt.Tuner.load(folder), read_lines(folder / "predictions.jsonl")
    wanted = [mt.Answer(line["query"], line["prompt"], line["answer"]) for line in predictions]
    assert tuner.answer([line["query"] for line in predictions]) == wanted
    assert tuner.frozen.actor is tuner.frozen.generator and tuner.frozen.actor["layers"][0]["q"]["kernel"].dtype == jnp.int8


def test_a_run_in_full_answers_in_8_bits_and_the_other_way_round(folder, root, tmp_path, capfd):
    """Of two runs that came to the same, one has forgotten that its weights were in 8 bits, as one does that is older than the setting."""
    full = tmp_path / "run"
    shutil.copytree(folder, full)
    content = json.loads((full / "config.json").read_text())
    for part in ("config", "resolved"):
        assert content[part].pop("weights") == "int8"
    (full / "config.json").write_text(json.dumps(content))
    assert run.main(command(root, full, *STRONG)) == 0 and run.main(command(root, full, *SETTINGS)) == 2
    found = {name: mt.Tuner.load(*given) for name, given in {"small": (full, None, {"weights": "int8"}), "full": (full,), "run": (folder,)}.items()}
    kinds = {name: tuner.frozen.actor["layers"][0]["q"]["kernel"].dtype.name for name, tuner in found.items()}
    assert kinds == {"small": "int8", "full": "float32", "run": "int8"}
    tokens = np.arange(14).reshape(2, 7)
    logits = {name: own_logits(tuner, tokens, tuner.mean_lora()) for name, tuner in found.items()}
    np.testing.assert_array_equal(logits["small"], logits["run"])
    assert 1e-3 < np.abs(logits["full"] - logits["run"]).max() < 1
    assert mt.Tuner.load(folder, settings={"weights": "dtype"}).setup == found["full"].setup
    one = read_lines(folder / "predictions.jsonl")[0]
    capfd.readouterr()
    assert predict.main(["--workdir", str(full), "--query", one["query"], "--json", "--config.weights=int8"]) == 0
    assert json.loads(capfd.readouterr().out)["answer"] == one["answer"]


def test_merged_weights_are_those_that_answered(folder, tmp_path, capfd):
    assert export.main(["--workdir", str(folder), "--to", "merged", "--out", str(tmp_path / "merged")]) == 0
    tuner, tokens = mt.Tuner.load(folder), np.arange(14).reshape(2, 7)
    ours = own_logits(tuner, tokens, tuner.mean_lora())
    assert np.abs(np.asarray(transformer.forward(*pretrained.load(tmp_path / "merged"), tokens)) - ours).max() < 1e-4


SPREAD = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from experiments import run
from metatuner_jax import job, lora, networks, sharding, transformer

def loss_and_gradient(mesh):
    path, _, assignments, _ = run.parse(json.loads(sys.argv[1]))
    work = job.prepare(run.load_config(path, [*assignments, *((f"mesh.{axis}", str(size)) for axis, size in mesh.items())]))
    actor = networks.load_frozen(work.setup, work.tokens, work.mesh).actor
    adapter = {"q": lora.Lora(jnp.ones((3, 24, 2)), jnp.ones((3, 2, 24)))}
    def loss(adapter, actor, tokens):
        return jnp.mean(jnp.square(transformer.forward(work.setup.actor, actor, tokens, loras=adapter)))
    tokens = sharding.place_rows(np.arange(16).reshape(4, 4) * 7, work.mesh)
    return actor, jax.device_get(jax.jit(jax.value_and_grad(loss))(adapter, actor, tokens))

actor, here = loss_and_gradient({"fsdp": 2, "tensor": 2})
for path, leaf in jax.tree_util.tree_leaves_with_path(actor):
    assert leaf.sharding.spec == sharding.spec_at(sharding.path_text(path), leaf.shape, leaf.sharding.mesh), path
assert actor["layers"][0]["q"]["scale"].addressable_shards[0].data.shape == (2, 12)
_, there = loss_and_gradient({"data": 4})
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), here, there)
"""


def test_weights_are_split_over_devices_with_their_scales(root, tmp_path):
    environment = {**os.environ, "NPROC": "16", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    words = json.dumps(command(root, tmp_path / "run", *SETTINGS))
    done = subprocess.run([sys.executable, "-c", SPREAD, words], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
