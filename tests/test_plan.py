"""The plan of a run: held against the compiler, against memory as measured, and against counts by hand."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from conftest import save_model, write_rows
from small_runs import SOAK

from experiments import compiled as compiled_lib
from experiments import plan, run
from experiments import topology as topology_lib
from metatuner_jax import config as config_lib
from metatuner_jax import data, generator, methods, networks, sharding

LENGTHS = data.Lengths(119, 77, 24)
MODEL = config_lib.ModelConfig("llama", vocab_size=8192, num_layers=8, width=256, ff_width=1024, num_heads=8, num_kv_heads=4, head_width=32, tied=True)


def make_setup(dtype="float32", learns="lora", model=MODEL, actor=None, same=False, **sections):
    defaults = {"generator": {"train": learns, "model": "ours", "max_prompt_tokens": 16}, "actor": {"model": "ours" if same else "theirs"}}
    defaults |= {"train": {"batch_size": 16}, "eval": {"batch_size": 16}}
    config = config_lib.make(dtype=dtype, **{name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}})
    return generator.Setup(methods.resolve(config), model, actor or model, 2, (3, 4, 5))


def by_method(setup, method):
    return dataclasses.replace(setup, config=methods.resolve(dataclasses.replace(setup.config, method=method)))


def with_layers(shared, private, actor):
    model = dataclasses.replace(MODEL, num_layers=shared + private)
    return make_setup(model=model, actor=dataclasses.replace(MODEL, num_layers=actor), generator={"num_shared": shared})


def test_a_step_is_read_back_as_it_was_written_and_few_layers_slide_in_turns_as_all_do():
    model = dataclasses.replace(MODEL, sliding_window=5, sliding_layers=(True, False, True) * 2 + (True, False), rope_scaling=(4.0, 1.0, 4.0, 24.0))
    setup = make_setup(model=model)
    again, lengths, mesh = compiled_lib.from_json(json.loads(json.dumps(compiled_lib.as_json(setup, LENGTHS, plan.Mesh(2, 1, 1)))))
    assert (again.generator, again.actor, lengths, mesh.data) == (model, model, LENGTHS, 2)
    assert compiled_lib.with_depths(setup, 1, 1, 9).generator.sliding_layers == (True, False)
    assert compiled_lib.with_depths(setup, 1, 1, 9).actor.sliding_layers == (*model.sliding_layers, True)


PROGRAM = """
HloModule step

%added (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inside (p: bf16[4]) -> bf16[4] {
  ROOT %product = bf16[4] multiply(%p, %p), backend_config={"estimated_cycles":"1000000"}
}

%all-reduce-scatter.1 (p: bf16[16]) -> bf16[4] {
  %sums = bf16[16] all-reduce(%p), to_apply=%added
  ROOT %own = bf16[4] dynamic-slice(%sums, %place), dynamic_slice_sizes={4}
}

%first_piece (p: bf16[4]) -> bf16[16] {
  %begun = bf16[16]{0} all-gather(%p), metadata={op_name="jit(_layer)"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

%last_piece (p: bf16[4]) -> bf16[16] {
  %ended = bf16[16]{0} all-gather(%p), metadata={op_name="jit(_layer)"}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"24"}}
}

%layer (state: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %weights = bf16[8]{0} all-gather(%part), metadata={op_name="jit(step)/jvp()/while/body/jit(_layer)/up/dot_general"}
  %read = bf16[4] fusion(%weights), kind=kLoop, calls=%inside, metadata={op_name="jit(step)/jvp()/while/body"}, backend_config={"estimated_cycles":"100"}
}

%more_layers (state: (s32[], bf16[8])) -> pred[] {
  %count = u32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %count), direction=LT
}

%token (state: (s32[], pred[2])) -> (s32[], pred[2]) {
  %layers = (s32[], bf16[8]) while(%tuple), condition=%more_layers, body=%layer
  %picked = s32[2] fusion(%scores), kind=kLoop, calls=%inside, backend_config={"estimated_cycles":"10"}
}

%some_go_on (state: (s32[], pred[2])) -> pred[] {
  %rows = s32[]{:T(128)} constant(64)
  %ended = s32[] reduce(%flags, %zero), dimensions={0}, to_apply=%added, backend_config={"estimated_cycles":"1"}
  ROOT %less = pred[] compare(%ended, %rows), direction=LT
}

ENTRY %main (arguments: f32[8]) -> f32[8] {
  %sampled = (s32[], pred[2]) while(%tuple), condition=%some_go_on, body=%token
  %forward = (s32[], bf16[8]) while(%tuple), condition=%noted, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  %start = bf16[16] fusion(%x), kind=kCustom, calls=%first_piece
  %done = bf16[16] fusion(%x), kind=kCustom, calls=%last_piece
  %gradient = bf16[4]{0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(_layer)"}
  %back = bf16[4] fusion(%x), kind=kOutput, calls=%inside, metadata={op_name="jit(step)/transpose(jvp())/dot_general"}, backend_config={"estimated_cycles":"5000"}
  %norm = f32[]{:T(128)} all-reduce(%squares), to_apply=%added, backend_config={"estimated_cycles":"7"}
}

%noted (state: (s32[], bf16[8])) -> pred[] {
  %anything = s32[] constant(99)
}
"""


def test_loops_of_a_compiled_program_count_as_often_as_they_are_gone_through():
    setup = make_setup("bfloat16")  # prompts of 16 tokens: 15 are read
    lines = compiled_lib.run_lines(PROGRAM, setup)
    assert compiled_lib.read_cycles(lines) == {"sampling": 15 * (7 * 100 + 10 + 1), "forward": 3 * 100, "backward": 5000, "update and the rest": 7}
    found = compiled_lib.read_collectives(lines, setup)
    assert found["all-gather"] == {"count": 15 * 7 + 3 + 1, "bytes": (15 * 7 + 3) * 8 * 2 + 16 * 2}
    assert found["all-reduce"] == {"count": 1, "bytes": 4} and found["reduce-scatter"] == {"count": 1, "bytes": 4 * 2}


# --- against the compiler, for eight devices ---

CASES = [("float32", "full", (8, 1, 1), 8192), ("float32", "lora", (1, 8, 1), 8192), ("bfloat16", "lora", (2, 2, 2), 8192)]
if SOAK:  # no mesh divides 8191 words
    where = [((8, 1, 1), 8192), ((1, 8, 1), 8192), ((2, 2, 2), 8192), ((1, 8, 1), 8191), ((1, 4, 2), 8191)]
    CASES = [(dtype, kind, *pair) for dtype in ("float32", "bfloat16") for kind in ("lora", "full") for pair in where]


def setup_of(dtype, kind, shape, words):
    return make_setup(dtype, kind, dataclasses.replace(MODEL, vocab_size=words))


@pytest.fixture(scope="module")
def compiled():
    """What the compiler says of each case, in one process with eight pretended devices."""
    jobs = [(setup_of(*case), LENGTHS, plan.Mesh(*case[2])) for case in CASES]
    return dict(zip(CASES, compiled_lib.in_child(jobs)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_is_what_the_compiler_says_of_eight_devices(compiled, case):
    setup, mesh = setup_of(*case), plan.Mesh(*case[2])
    found, held = compiled[case], sum(plan.held(setup, mesh).values())
    assert held == pytest.approx(found["arguments"], rel=0.01)  # but for the batch
    planned = plan.make_plan(setup, LENGTHS, mesh)["memory"]["totals"]["step"]
    print(f"{case}: {planned / 2**20:.1f} MiB planned, {found['bytes'] / 2**20:.1f} compiled, {100 * (planned / found['bytes'] - 1):+.1f}%")
    assert planned == pytest.approx(found["bytes"], rel=0.15)


def test_data_alone_sums_the_gradients(compiled):
    found = compiled["float32", "full", (8, 1, 1), 8192]["by_kind"]
    state, _ = networks.shapes(make_setup(learns="full"))
    layers = plan.count(state.params["shared"]) + plan.count(state.params["prompt"]["layers"])
    # The gradients of the layers are summed for the query and again for the expert prompt; so are those of the embedding.
    numbers = 2 * layers + 2 * plan.count(state.params["embed"]) + plan.count(state.params["prompt"]["head"]) + plan.count(state.params["hyper"])
    assert found["all-reduce"]["bytes"] == pytest.approx(4 * numbers, rel=0.02)
    assert sum(sizes["bytes"] for kind, sizes in found.items() if kind != "all-reduce") < 0.05 * 4 * numbers


def test_fsdp_brings_weights_together_for_many_tokens_and_rows_for_few(compiled):
    found = compiled["float32", "lora", (1, 8, 1), 8192]["by_kind"]
    d, f, kv = MODEL.width, MODEL.ff_width, MODEL.num_kv_heads * MODEL.head_width
    attention, gated = 4 * (2 * d * d + 2 * d * kv), 4 * 3 * d * f
    # Weights: the generator's layers for the query, there and back, and the private ones of the copy; the actor's, there and back. Of the
    # expert prompt, which is 15 tokens of 16 rows, those of attention, whose kernels are the smaller ones.
    weights = (8 + 2 + 8 + 2 * 8) * (attention + gated) + (8 + 8) * attention
    # Rows, a token of all 16 at a time: of each that is sampled but the last, in each layer for q, k, v and again for gate and up; of the
    # expert prompt for gate and up, and back for down. For the head: each sampled, and the expert's and the answer's, there and back.
    tokens = 15 * 8 * 2 + 15 * (8 + 8) + 16 + 2 * (16 + 24)
    token, setup = 4 * 16 * d, make_setup()
    assert found["all-gather"]["bytes"] == pytest.approx(weights + tokens * token + 16 * plan.lora_bytes(setup), rel=0.01)
    # Sums: of each token that is sampled what the kernels of o and down make in place, of the expert prompt that of down, and back for gate and up;
    # of the head, back; of each token that is sampled and each of the expert prompt, the row of the table that one device has. The generator's
    # LoRA, which all devices have.
    tokens = 15 * 8 * 2 + 15 * 8 * 3 + (16 + 24) + 15 + 15
    learning = plan.count({name: networks.shapes(setup)[0].params[name] for name in ("shared", "prompt")})
    assert found["all-reduce"]["bytes"] == pytest.approx(tokens * token + 4 * learning, rel=0.05)


@pytest.mark.parametrize("method", ["metatuner_j", "hyper_only"] if SOAK else ["hyper_only"])
def test_what_two_layers_send_is_scaled_to_what_six_do(method):
    mesh = plan.Mesh(1, 8, 1)
    setup = by_method(with_layers(4, 2, 6), method)
    scaled = compiled_lib.of_step(setup, LENGTHS, mesh)["by_kind"]
    (deep,) = compiled_lib.in_child([(setup, LENGTHS, mesh)])
    assert scaled == {kind: sizes for kind, sizes in deep["by_kind"].items() if sizes["count"]}
    assert scaled["all-gather"]["count"] > (4 + 6) * 7


OTHERS = [("metatuner_i", {}), ("metatuner_st", {}), ("unshared", {}), ("dpo", {}), ("metatuner_j", {"remat": "none"}), ("metatuner_j", {"remat": "all"}), ("metatuner_j", {"accumulate": 2}), ("sft", {})]


@pytest.mark.parametrize(("method", "section"), OTHERS if SOAK else OTHERS[-1:])
def test_memory_is_what_the_compiler_says_of_other_methods(method, section):
    setup, mesh = by_method(make_setup(train=section), method), plan.Mesh(1, 1, 1)
    (found,) = compiled_lib.in_child([(setup, LENGTHS, mesh)])
    planned = plan.make_plan(setup, LENGTHS, mesh)["memory"]["totals"]["step"]
    if method == "metatuner_i":  # what is compiled is the first turn
        planned = sum(plan.held(setup, mesh).values()) + sum(plan._turn_memory(setup, LENGTHS, mesh, ("task",)).values())
    print(f"{method}, {section}: {planned / 2**20:.1f} MiB planned, {found['bytes'] / 2**20:.1f} compiled, {100 * (planned / found['bytes'] - 1):+.1f}%")
    assert planned == pytest.approx(found["bytes"], rel=0.15)


# --- against one device, as measured ---

MEASURE = """
import ctypes, gc, json, sys
import jax, jax.numpy as jnp
from experiments import bench
from experiments import compiled as compiled_lib
from metatuner_jax import config, networks, sharding
setup, lengths, _ = compiled_lib.from_json(json.load(sys.stdin))
program = compiled_lib.lower_step(setup, lengths, sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])).compile()
make = lambda tree: jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1 if leaf.dtype == bool else 0.01 if leaf.dtype != int else 3, leaf.dtype), tree)
state, frozen = networks.shapes(setup)
batch, key = make(compiled_lib.batch_shapes(setup, lengths)), jax.random.key(0)
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
with bench.Peak() as peak:
    state, actor = make(state), make(frozen.actor)
    frozen = frozen.replace(generator=actor if setup.config.generator.model == setup.config.actor.model else make(frozen.generator), actor=actor, allowed=make(frozen.allowed))
    for _ in range(2):
        state, metrics = program(state, frozen, batch, key)
        jax.block_until_ready(metrics)
print(json.dumps(peak.bytes))
"""
SMOLLM2 = config_lib.ModelConfig("llama", 49152, 30, 576, 1536, 9, 3, 64, rope_theta=1e5, tied=True, max_positions=8192)
MIDDLE = dataclasses.replace(MODEL, num_layers=12, width=384, num_heads=12, num_kv_heads=4, vocab_size=16384)


@pytest.mark.parametrize(("model", "kind"), [(MIDDLE, "lora"), *([(SMOLLM2, "lora"), (SMOLLM2, "full")] if SOAK else [])])
def test_memory_is_what_one_device_takes(model, kind):
    setup = make_setup("float32", kind, model, same=kind == "lora", train={"batch_size": 8})
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    given = json.dumps(compiled_lib.as_json(setup, LENGTHS, plan.Mesh(1, 1, 1)))
    done = subprocess.run([sys.executable, "-c", MEASURE], input=given, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    planned = plan.make_plan(setup, LENGTHS, plan.Mesh(1, 1, 1))["memory"]["totals"]["step"]
    print(f"{model.num_layers} layers of {model.width}, {kind}: {planned / 2**20:.0f} MiB planned, {measured / 2**20:.0f} measured, {100 * (planned / measured - 1):+.1f}%")
    assert planned == pytest.approx(measured, rel=0.15)


# --- FLOPs ---


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("remat", ["products", "all", "none"])
def test_flops_are_what_the_compiler_counts_of_one_layer_of_each(kind, remat):
    """The compiler counts a loop once: with a layer in each stack, prompts of two tokens and short answers each loop has one turn."""
    model = dataclasses.replace(MODEL, num_layers=2, width=512, ff_width=1536, num_heads=8, num_kv_heads=4, head_width=64, vocab_size=4096)
    lengths = data.Lengths(96, 64, 12)
    setup = make_setup(
        "float32", kind, model, dataclasses.replace(model, num_layers=1), generator={"max_prompt_tokens": 2, "num_shared": 1}, train={"remat": remat, "batch_size": 4},
        hyper={"hidden": 16},
    )  # fmt: skip
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    counted = compiled_lib.lower_step(setup, lengths, mesh).cost_analysis()["flops"]
    planned = plan.step_flops(setup, lengths)
    print(f"{kind}, {remat}: {planned['all'] / 1e9:.2f} planned, {counted / 1e9:.2f} counted, {100 * (planned['all'] / counted - 1):+.1f}%")
    assert planned["all"] == pytest.approx(counted, rel=0.15)


def test_flops_by_hand():
    """The actor's forward pass of one row: each weight twice a token read, attention, and the scores of the answer."""
    setup = make_setup(train={"batch_size": 1})
    read = 3 + 16 + 77 + 23
    weights = 8 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    by_hand = read * 2 * weights + 8 * read * read * 4 * 8 * 32 + 24 * 2 * 8192 * 256
    assert plan.step_flops(setup, LENGTHS)["actor, forward"] == by_hand


# --- parts ---


def test_weights_of_one_checkpoint_are_counted_once():
    apart, together = (plan.make_plan(make_setup(same=same), LENGTHS, plan.Mesh(1, 1, 1)) for same in (False, True))
    weights = 8 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024 + 2 * 256) + 8192 * 256 + 256
    assert (together["parameters"]["frozen"], apart["parameters"]["frozen"]) == (weights, 2 * weights)
    difference = apart["memory"]["totals"]["step"] - together["memory"]["totals"]["step"]
    assert difference == 4 * weights


def test_a_mesh_of_any_size_is_planned_without_its_devices():
    setup = make_setup(train={"batch_size": 4096}, eval={"batch_size": 4096})
    one, many = (plan.make_plan(setup, LENGTHS, mesh)["memory"] for mesh in (plan.Mesh(1, 8, 1), plan.Mesh(512, 8, 1)))
    for part in ("generator, frozen", "moments of the optimiser"):
        assert one["phases"]["step"][part] == many["phases"]["step"][part]
    for part in ("kept activations of the actor", "scores of words"):
        assert one["phases"]["step"][part] == 512 * many["phases"]["step"][part]


@pytest.mark.parametrize(("sections", "part", "less"), [
    ({"train": {"remat": "all"}}, "kept activations of the actor", 1 / 12),
    ({"train": {"batch_size": 8}}, "kept activations of the actor", 0.5),
    ({"train": {"accumulate": 4}}, "kept activations of the actor", 0.25),
    ({"eval": {"batch_size": 8}}, "KV cache of the answers", 0.5),
])  # fmt: skip
def test_options_lower_the_part_that_they_are_for(sections, part, less):
    phase = "evaluation" if "eval" in sections else "step"
    before, after = (plan.make_plan(make_setup(**given), LENGTHS, plan.Mesh(1, 1, 1))["memory"]["phases"][phase][part] for given in ({}, sections))
    assert after == pytest.approx(less * before, rel=0.1)


# --- the command line ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with rows, a config file, and a model of which no weights are there."""
    folder = tmp_path_factory.mktemp("plan")
    save_model(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text((folder / "model" / "config.json").read_text())
    for name, start in (("train", 0), ("validation", 20), ("test", 30)):
        write_rows(folder / f"{name}.jsonl", [{"question": f"reverse the list: alpha beta {i}", "answer": f"{i} beta alpha"} for i in range(start, start + 10)])
    (folder / "config.py").write_text("from metatuner_jax import config\n\n\ndef get_config():\n    return config.to_tree(config.Config())\n")
    return folder


def start(folder, *arguments, model="model"):
    settings = (
        "dtype=float32", "task.name=jsonl", f"task.train={folder}/train.jsonl", f"task.validation={folder}/validation.jsonl",
        f"task.test={folder}/test.jsonl", "task.num_validation=8", "task.initial_prompt=reverse the list", f"generator.model={folder}/{model}",
        f"actor.model={folder}/{model}", "generator.max_prompt_tokens=8", "actor.max_answer_tokens=24", "train.batch_size=4", "eval.batch_size=8",
    )  # fmt: skip
    if model == "shape":
        settings += ("generator.max_query_tokens=60",)
    given = [argument for argument in arguments if argument.startswith("--config.")]
    rest = [argument for argument in arguments if argument not in given]
    return run.main(["--plan", "--config", str(folder / "config.py"), *(f"--config.{one}" for one in settings), *given, *rest])


def test_a_plan_needs_no_weights_and_writes_only_what_it_is_asked_to(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start(folder, "--devices=1", "--memory=1", f"--json={tmp_path}/plan.json") == 0
    text = capsys.readouterr().out
    assert "fits" in text and "KV cache of the answers" in text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["memory"]["peak"] == max(found["memory"]["totals"].values()) and found["refusal"] is None
    assert found["lengths"]["from"] == "the rows"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_step_that_cannot_be_compiled_leaves_the_rest_of_the_plan(folder, capsys, monkeypatch):
    said = json.dumps("out of\nmemory").encode()
    monkeypatch.setattr(compiled_lib.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout=said))
    assert start(folder, "--devices=2", "--memory=1") == 0
    text = capsys.readouterr().out
    assert "not compiled: out of memory" in text and "moments of the optimiser" in text


def answer(monkeypatch, found):
    """Has the compiler of a topology answer with what is found, an error or a list."""

    def child(jobs, devices=1):
        if isinstance(found, Exception):
            raise found
        return [{"devices": 4, "kind": found[0]}] if isinstance(jobs[0], str) else found[1]

    monkeypatch.setattr(compiled_lib, "child", child)


NOTHING_SENT = {kind: {"count": 0, "bytes": 0} for kind in compiled_lib.KINDS}


def test_the_compiler_of_tpus_says_memory_and_work(folder, tmp_path, capsys, monkeypatch):
    sent = NOTHING_SENT | {"all-reduce": {"count": 3, "bytes": 3 * 2**20}}
    cycles = {"sampling": 3_000_000, "forward": 6_000_000, "backward": 9_000_000, "update and the rest": 0}
    step = {"arguments": 2**30, "temporary": 2**31, "bytes": 3 * 2**30, "cycles": cycles, "by_kind": sent, "lower_s": 1.0, "compile_s": 2.0}
    answer(monkeypatch, ("TPU v5 lite", [step]))
    assert start(folder, "--topology=v5e:2x2", f"--json={tmp_path}/plan.json") == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {"on 4 devices: data=4, fsdp=1, tensor=1"} <= {line.split("metatuner_j, float32, ")[-1] for line in lines}
    assert {"sampling 3.0 2.0", "forward 6.0 4.0", "all 18.0 12.0", "temporary 2.000", "all-reduce 3 3.0"} <= lines  # 1.5 GHz
    assert found["memory"]["fits"] and found["memory"]["limit"] == 16 * 2**30 and found["topology"]["cycles"] == cycles and found["topology"]["name"] == "v5e:2x2"
    assert found["collectives"]["by_kind"] == {"all-reduce": {"count": 3, "bytes": 3 * 2**20}}


def of_gpu(size):
    """Returns what the compiler of a GPU says of a step that takes so many bytes."""
    seconds = {"sampling": 0.004, "forward": 0.01, "backward": 0.02, "update and the rest": 0.006}
    return {"arguments": 2**30, "temporary": size - 2**30, "bytes": size, "seconds": seconds, "by_kind": NOTHING_SENT, "lower_s": 1.0, "compile_s": 2.0}


@pytest.fixture
def no_share(monkeypatch):
    """Has the environment say nothing of the share of a GPU's memory that jax takes."""
    for name in topology_lib.SHARES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("arguments", "share", "limit"), [
    (("--topology=h100:4",), {}, 0.75 * 79.1), (("--topology=h100:4",), {"XLA_CLIENT_MEM_FRACTION": "0.9"}, 0.9 * 79.1),
    (("--topology=h100:4",), {"XLA_CLIENT_MEM_FRACTION": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, 0.5 * 79.1), (("--topology=h100:2x2", "--memory=60"), {}, 60),
], ids=["by default", "as the environment says", "as it said of old", "as is said"])  # fmt: skip
def test_a_gpu_has_the_memory_that_jax_takes(folder, tmp_path, capsys, monkeypatch, no_share, arguments, share, limit):
    for name, value in share.items():
        monkeypatch.setenv(name, value)
    answer(monkeypatch, ("NVIDIA H100 80GB HBM3", [of_gpu(3 * 2**30)]))
    assert start(folder, *arguments, "--config.dtype=auto", f"--json={tmp_path}/plan.json") == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert found["memory"]["limit"] == int(limit * 2**30) and found["memory"]["fits"] and found["dtype"] == "bfloat16"
    assert "  temporary" in text and "cycles" not in text and ("that jax takes" in text) == (limit != 60)
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {"NVIDIA H100 80GB HBM3 ms", "sampling 4.0", "backward 20.0", "all 40.0"} <= lines


def test_of_a_gpu_more_may_be_taken(folder, capsys, monkeypatch, no_share):
    for size, helps in ((70 * 2**30, True), (78 * 2**30, False)):
        answer(monkeypatch, ("NVIDIA H100 80GB HBM3", [of_gpu(size)]))
        assert start(folder, "--topology=h100:4") == 1
        line = capsys.readouterr().err.strip()
        assert f"the step takes {size / 2**30:.2f} GiB of each device's 59.32 GiB, by the compiler of h100:4: set train.remat=all" in line
        assert line.endswith("; or set XLA_CLIENT_MEM_FRACTION=0.95: jax takes 75% of a GPU's memory") == helps and "\n" not in line
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.00001")
    answer(monkeypatch, ("NVIDIA H100 80GB HBM3", [of_gpu(2**30)]))
    assert start(folder, "--topology=h100:4") == 1
    line = capsys.readouterr().err.strip()
    assert "take more devices (--topology)" in line and line.endswith("; or set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: jax takes 0% of a GPU's memory")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "75%")
    assert start(folder, "--topology=h100:4") == 2
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=75% in the environment must be above 0 and at most 1" in capsys.readouterr().err


def test_of_what_the_compiler_of_a_gpu_refuses_nothing_more_is_promised(folder, capsys, monkeypatch, no_share):
    answer(monkeypatch, ("NVIDIA H100 80GB HBM3", [of_gpu(2**30)]))
    refused = RuntimeError("JaxRuntimeError: RESOURCE_EXHAUSTED: 90G")
    monkeypatch.setattr(compiled_lib, "of_step", lambda *args: (_ for _ in ()).throw(refused))
    assert start(folder, "--topology=h100:4") == 1
    assert "takes more than there is of each device's 59.32 GiB" in (line := capsys.readouterr().err) and "MEM_FRACTION" not in line


def test_the_compiler_of_gpus_may_have_to_be_installed(folder, capsys, monkeypatch):
    answer(monkeypatch, RuntimeError("NotImplementedError: topology not implemented for cuda"))
    assert start(folder, "--topology=h100:4") == 2
    assert "--topology=h100:4 needs the compiler of GPUs, which comes with `pip install -e .[cuda]`" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [
    ("h100", "of GPUs it is h100:8, or h100:2x8"), ("h100:0", "of GPUs it is"), ("h100:8x", "of GPUs it is"), ("h100:1x2x8", "of GPUs it is"),
    ("a100:8", "did you mean a100-40gb or a100-80gb? GPUs are l4"), ("H100:8", "did you mean h100?"), ("h100-80gb:8", "did you mean h100?"),
    ("rtx:8", "^GPUs are l4, a10g"), ("v100:8", "^GPUs are"), (":8", "^GPUs are"),
])  # fmt: skip
def test_what_is_no_topology_of_gpus_is_told(name, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        topology_lib.devices(name)


@pytest.mark.parametrize("too_much", [17 * 2**30, "JaxRuntimeError: RESOURCE_EXHAUSTED: 17G of 15.75G hbm"], ids=["compiled", "not compiled"])
def test_what_does_not_fit_by_the_compiler_is_refused(folder, capsys, monkeypatch, too_much):
    step = {"arguments": 0, "temporary": 0, "bytes": too_much, "cycles": {"forward": 1}, "by_kind": NOTHING_SENT, "lower_s": 1.0, "compile_s": 2.0}
    answer(monkeypatch, ("TPU v5 lite", [step]))
    if isinstance(too_much, str):
        monkeypatch.setattr(compiled_lib, "of_step", lambda *args: (_ for _ in ()).throw(RuntimeError(too_much)))
    assert start(folder, "--topology=v5e:2x2") == 1
    line = capsys.readouterr().err.strip()
    takes = "more than there is" if isinstance(too_much, str) else "17.00 GiB"
    assert f"the step takes {takes} of each device's 16.00 GiB, by the compiler of v5e:2x2: set train.remat=all" in line


@pytest.mark.parametrize(("found", "arguments", "message"), [
    (RuntimeError("RuntimeError: JAX TPU support not installed; cannot"), (), "--topology=v5e:2x2 needs the compiler of TPUs, which comes with"),
    (RuntimeError("NotImplementedError: topology not implemented for cuda"), (), "--topology=v5e:2x2 needs the compiler of TPUs, which comes with"),
    (RuntimeError("JaxRuntimeError: INVALID_ARGUMENT: Invalid name: v9"), (), "is not one of TPUs, such as v5e:4x4, or GPUs, such as h100:8: Invalid name: v9"),
    (RuntimeError("ValueError: GPUs are few"), (), "is not one of TPUs, such as v5e:4x4, or GPUs, such as h100:8: GPUs are few"),
    (RuntimeError("the compiler's process died: no memory"), (), "--topology=v5e:2x2 cannot be looked up: the compiler's process died: no memory"),
    (("TPU v5 lite", []), ("--config.mesh.fsdp=3",), "make 3 devices and --topology=v5e:2x2 has 4"),
    (("TPU v5 lite", []), ("--devices=8",), "--topology=v5e:2x2 has 4 devices and --devices=8: leave --devices out"),
    (("TPU v99", []), (), "--topology=v5e:2x2 is of TPU v99, of which no memory is known: say it with --memory"),
], ids=["no compiler", "not implemented", "no such TPU", "no such GPU", "dead", "mesh", "other number", "no memory"])  # fmt: skip
def test_topologies_that_cannot_be_planned_for_are_one_line(folder, capsys, monkeypatch, found, arguments, message):
    answer(monkeypatch, found)
    assert start(folder, "--topology=v5e:2x2", *arguments) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line


def test_a_config_json_alone_is_planned_with_the_limits_of_the_config(folder, tmp_path):
    assert start(folder, "--devices=1", "--memory=1", f"--json={tmp_path}/plan.json", model="shape") == 0
    lengths = json.loads((tmp_path / "plan.json").read_text())["lengths"]
    assert (lengths["generator"], lengths["query"], lengths["answer"], lengths["prompt"]) == (60, 60, 24, 8)
    assert "limits" in lengths["from"]


def test_what_does_not_fit_is_refused_with_an_option_that_helps(folder, tmp_path, capsys):
    huge = ("--config.train.batch_size=4096", "--devices=1", f"--json={tmp_path}/plan.json")
    assert start(folder, "--memory=0.3", *huge) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: the step takes ") and line.count("\n") == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    parts = found["memory"]["phases"]["step"]
    assert f"most is taken by the {max(parts, key=parts.get)}" in line
    options = [word for word in line.split() if word.startswith("--config.")]
    assert options
    assert start(folder, "--memory=0.3", *huge, *options) == 0


def test_what_no_option_makes_fit_is_said_to_need_more_devices(folder, capsys):
    assert start(folder, "--memory=0.00001", "--devices=1") == 1
    assert "take more devices" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["mesh.fsdp=8", "train.remat=all", "train.accumulate=2", "train.batch_size", "generator.train=lora", "mesh.tensor"])
def test_each_option_is_found_where_it_is_the_one_that_helps(change):
    kind = "full" if "generator" in change else "lora"
    setup, mesh = make_setup(learns=kind), plan.Mesh(8, 1, 1)
    names = [name for name, *_ in plan.changes(setup, mesh)]
    assert any(change in name for name in names)
    peak = lambda setup, mesh: max(sum(parts.values()) for parts in plan.memory(setup, LENGTHS, mesh).values())
    lowest = min(peak(other, there) for name, other, there in plan.changes(setup, mesh) if change in name)
    assert lowest < peak(setup, mesh)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--devices=8", "--config.mesh.fsdp=3"), "make 6 devices and --devices=8"),
    (("--devices=8", "--config.mesh.fsdp=8"), "train.batch_size=4 must be a multiple of mesh.data * mesh.fsdp = 8"),
    (("--devices=none",), "--devices=none must be a number above 0"),
    (("--devices=1", "--config.actor.model=someone/unknown"), "actor.model='someone/unknown' cannot be used"),
    (("--device=1",), "did you mean --devices?"),
])  # fmt: skip
def test_mistakes_are_one_line(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert start(folder, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err


def test_a_number_of_bytes_is_split_as_the_rules_say():
    shapes = {"q": {"kernel": jax.ShapeDtypeStruct((3, 16, 8), "float32")}, "norm": {"scale": jax.ShapeDtypeStruct((7,), "float32")}}
    assert plan.bytes_of(shapes, plan.Mesh(4, 2, 2)) == 4 * (3 * 16 * 8 // 4 + 7)
    assert plan.Mesh(4, 2, 2).size == math.prod((4, 2, 2))
