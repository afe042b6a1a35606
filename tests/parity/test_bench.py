"""The reference in torch that the benchmark times computes our step: the same losses, LoRA of each row included, compiled or not."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from experiments import bench, bench_torch

MODEL = "parity-tiny"


@pytest.fixture(autouse=True)
def shape(monkeypatch):
    small = bench.ModelConfig("llama", 301, 3, 48, 80, 4, 2, 12, tied=True, max_positions=512)
    monkeypatch.setitem(bench.SHAPES, MODEL, small)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_has_our_losses_and_learns(train):
    work = bench.make_work(MODEL, "float32", 2, train)
    reference = bench_torch.Reference(work)
    bench_torch.check_losses(work, reference)
    with torch.no_grad():
        before = sum(reference.losses(reference.batch["initial"]))
    for _ in range(3):
        reference.step()
    with torch.no_grad():
        assert sum(reference.losses(reference.batch["initial"])) < before


def test_a_reference_that_computes_something_else_is_refused():
    work = bench.make_work(MODEL, "float32", 2)
    reference = bench_torch.Reference(work)
    with torch.no_grad():
        reference.hyper["q_b_bias"] += 1.0
    with pytest.raises(RuntimeError, match="does not compute the same step"):
        bench_torch.check_losses(work, reference)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning")  # by dynamo, as it traces
def test_layers_are_compiled_once_whatever_their_number(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for layers in (3, 5):
        monkeypatch.setitem(bench.SHAPES, MODEL, dataclasses.replace(bench.SHAPES[MODEL], num_layers=layers))
        work = bench.make_work(MODEL, "float32", 2)
        torch.compiler.reset()
        graphs.clear()
        found = []
        for compiles in (False, True):
            monkeypatch.setattr(bench_torch, "COMPILES", compiles)
            reference = bench_torch.Reference(work)
            for _ in range(2):
                reference.optimizer.zero_grad()
                sum(reference.losses(reference.batch["initial"])).backward()
            found.append([leaf.grad for leaf in reference.learning])
        torch.testing.assert_close(*found)
        # Of the generator and of the actor; a first layer is by itself, since nothing before it is differentiated.
        assert len(graphs) == 4, layers


def test_our_figures_are_on_disk_when_the_reference_fails(monkeypatch, tmp_path):
    def fail(work, reference):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "ceilings", lambda dtype: {"flops_per_s": 1e12, "bytes_per_s": 1e11})  # of the machine, and slow to find
    monkeypatch.setattr(bench_torch, "check_losses", fail)
    arguments = ["--model", MODEL, "--parts", "actor_lora_per_row", "--dtypes", "float32", "--batch_size", "2", "--against", "torch"]
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.main([*arguments, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["parts"]["float32"]["actor_lora_per_row"]["median_s"] > 0 and found["torch"] == {"float32": {}}


def test_both_decode_the_same_greedy_tokens():
    import jax
    import jax.numpy as jnp

    from metatuner_jax import decode, transformer

    work = bench.make_work(MODEL, "float32", 2)
    model, params = work.setup.actor, work.frozen.actor
    tokens = bench.decode_tokens(model.vocab_size)

    @jax.jit
    def ours(params):
        x = transformer.embed(model, params, jnp.array(tokens))
        start = decode.prefill(model, params, x, jnp.ones(tokens.shape, bool))
        return decode.sample(model, params, start, max_new_tokens=8, end_id=bench.END, allowed=work.frozen.allowed).tokens

    plain = bench_torch.language_model(model, params, torch.float32)
    with torch.no_grad():
        theirs = bench_torch.generate(plain, bench_torch.tensor(tokens), 8, do_sample=False, suppress_tokens=[0, 1])
    np.testing.assert_array_equal(ours(params), theirs)
