"""Logits of fresh random models, by torch and by ours, and a GGUF file as transformers and as we read it."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

from metatuner_jax import pretrained, transformer

TESTS = pathlib.Path(__file__).parent.parent


def _module(name):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_golden = _module("make_golden")


def difference(model, config, params, seed):
    """Returns the greatest difference of logits on real tokens."""
    tokens, mask = make_golden.rows(config.vocab_size, seed)
    ours = jax.jit(functools.partial(transformer.forward, config))(params, tokens, mask)
    return float(np.abs(np.asarray(ours) - make_golden.torch_logits(model, tokens, mask))[mask].max())


@pytest.mark.parametrize("seed", (101, 102, 103))
@pytest.mark.parametrize("name", list(make_golden.MODELS))
def test_logits_of_a_fresh_model_are_those_of_torch(name, seed, tmp_path):
    model = make_golden.random_model(make_golden.MODELS[name], seed)
    make_golden.save(model, tmp_path)
    found = difference(model, *pretrained.load(tmp_path), seed)
    print(f"{name} seed {seed}: greatest difference {found:.1e}")
    assert found < 1e-4


@pytest.mark.parametrize("name", ("llama", "qwen2", "qwen3"))
def test_gguf_file_is_read_as_transformers_reads_it(name, tmp_path):
    config, _ = pretrained.load(TESTS / "golden" / name)
    gguf_path = _module("test_pretrained").write_gguf(tmp_path / "model.gguf", TESTS / "golden" / name)
    # The shape is given: transformers would guess some of it (the vocabulary from the tokenizer, Qwen3's head width).
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=gguf_path.name, config=make_golden.MODELS[name], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours, params = pretrained.load(gguf_path)
    assert ours == config
    found = difference(model, ours, params, seed=7)
    print(f"{name} from GGUF: greatest difference {found:.1e}")
    assert found < 1e-4
