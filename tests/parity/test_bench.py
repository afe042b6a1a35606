"""The reference in torch that the benchmark times computes our step: the same losses, LoRA of each row included."""

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
