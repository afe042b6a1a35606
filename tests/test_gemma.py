"""A small model of Gemma 3's kind through a whole run: templates without a system's turn, windows shorter than rows, norms and scales of its own."""

import json

import numpy as np
import pytest
from small_gemma import GEMMA2_TEMPLATE, GEMMA3_TEMPLATE, save_gemma, save_gemma_tokenizer
from small_runs import STRONG, command, own_logits, read_lines, start

import metatuner_jax as mt
from experiments import export, prune
from metatuner_jax import data, pretrained, transformer


@pytest.mark.parametrize("template", [GEMMA2_TEMPLATE, GEMMA3_TEMPLATE], ids=["gemma2", "gemma3"])
def test_the_prompt_goes_before_the_users_words(template, tmp_path):
    size = save_gemma_tokenizer(tmp_path, template)
    tokens = data.Tokens(pretrained.load_tokenizer(tmp_path), size, "rewrite")
    spliced = [*tokens.template.prefix, *tokens.plain("say the words"), *tokens.query_ids("reverse one two")]
    text = "<bos><start_of_turn>user\nsay the words\n\nreverse one two<end_of_turn>\n<start_of_turn>model\n"
    assert tokens.tokenizer.decode(spliced) == text
    assert spliced == tokens.encode(text)
    assert tokens.tokenizer.decode(tokens.generator_ids("say", "one")[0]) == (
        "<bos><start_of_turn>user\nrewrite\n\nInstruction:\nsay\nQuestion:\none<end_of_turn>\n<start_of_turn>model\n"
    )
    # The end of a turn, which is not the tokenizer's own end; of the special tokens it alone may be written.
    assert tokens.tokenizer.decode([tokens.end_id]) == "<end_of_turn>" and tokens.tokenizer.eos_token == "<eos>"
    assert np.flatnonzero(tokens.allowed[:6]).tolist() == [tokens.end_id] and tokens.allowed[6:].all()
    assert tokens.end_id not in tokens.plain("stop <end_of_turn> here")


@pytest.mark.usefixtures("compiled")
def test_a_whole_run_with_both_terms_and_what_it_exports(root, tmp_path):
    model, run = save_gemma(tmp_path / "model"), tmp_path / "run"
    models = (f"generator.model={model}", f"actor.model={model}")
    settings = (*models, *STRONG, "method=metatuner_j", "train.prompt_gradient=straight_through", "train.num_steps=2", "rollout.every=0", "hyper.targets=q,o,down")
    assert start(command(root, run, *settings))[0] == 0
    lines = [line for line in read_lines(run / "metrics.jsonl") if "task_loss" in line]
    assert all(np.isfinite([line["task_loss"], line["prompt_loss"], line["grad_norm"]]).all() for line in lines) and len(lines) == 2
    tuner, tokens = mt.Tuner.load(run), np.random.default_rng(0).integers(6, 300, (2, 19))
    ours = own_logits(tuner, tokens, tuner.mean_lora())
    assert export.main([f"--workdir={run}", "--to=merged", f"--out={tmp_path / 'merged'}"]) == 0
    config, params = pretrained.load(tmp_path / "merged")
    assert config == tuner.setup.actor
    np.testing.assert_allclose(transformer.forward(config, params, tokens), ours, atol=1e-4)
    assert np.abs(ours - own_logits(tuner, tokens)).max() > 0.01
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [1, tuner.tokens.end_id]


def test_layers_that_are_kept_stay_of_their_kind(tmp_path):
    model = save_gemma(tmp_path / "model")
    assert len(prune.influence(model, ["one two three four"])) == 3
    prune.prune(model, [0, 1], tmp_path / "less")
    assert pretrained.load_config(tmp_path / "less").sliding_layers == (True, False)
