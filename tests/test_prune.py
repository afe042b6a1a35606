"""A model with layers left out computes what the layers that are kept compute, and influence tells which can be spared."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import prune
from metatuner_jax import pretrained, transformer


def test_what_is_written_computes_what_the_kept_layers_do(tiny_model, tmp_path):
    out = tmp_path / "fewer"
    assert prune.main(["--model", str(tiny_model), "--keep", "0,2", "--out", str(out)]) == 0
    config, params = pretrained.load(str(tiny_model))
    kept = {**params, "layers": jax.tree.map(lambda leaf: leaf[np.array([0, 2])], params["layers"])}
    fewer, found = pretrained.load(str(out))
    assert (config.num_layers, fewer.num_layers) == (3, 2)
    tokens = np.arange(10, 22).reshape(2, 6)
    np.testing.assert_array_equal(transformer.forward(fewer, found, tokens), transformer.forward(fewer, kept, tokens))
    assert pretrained.same_tokenizer(*(pretrained.load_tokenizer(str(folder)) for folder in (tiny_model, out))) is None


def test_a_layer_that_adds_nothing_has_no_influence(tiny_model, tmp_path, capsys):
    folder = tmp_path / "idle"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = next(folder.glob("*.safetensors"))
    tensors = dict(safetensors.numpy.load_file(path))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"] *= 0
    safetensors.numpy.save_file(tensors, path)
    (tmp_path / "text").write_text("say the words in order\n\nreverse one two three four\n")
    assert prune.main(["--model", str(folder), "--text", str(tmp_path / "text")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "1:", "0.000"] and len(lines) == 3
    values = prune.influence(str(folder), ["say the words in order", "reverse one two three four"])
    assert values[1] == pytest.approx(0, abs=1e-6) and min(values[0], values[2]) > 1e-3


def test_influence_counts_real_tokens_alone(tiny_model):
    texts = ["say the words in order", "one two"]
    together = prune.influence(str(tiny_model), texts)
    apart = [prune.influence(str(tiny_model), [text]) for text in texts]
    sizes = [len(pretrained.load_tokenizer(str(tiny_model)).encode(text)) - 1 for text in texts]
    np.testing.assert_allclose(together, np.average(apart, axis=0, weights=sizes), rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--keep", "2,0"], "--keep=2,0 must name layers of 0 to 2, each once and in order"),
        (["--keep", "0,3"], "--keep=0,3 must name layers of 0 to 2"),
        (["--keep", "1", "--out", "."], "--out=. is there already"),
        (["--text", "none"], "none"),
    ],
)
def test_mistakes_end_with_one_line(arguments, text, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "--out" not in arguments and "--text" not in arguments:
        arguments = [*arguments, "--out", "fewer"]
    assert prune.main(["--model", str(tiny_model), *arguments]) == 2
    printed = capsys.readouterr().err
    assert text in printed and printed.count("\n") == 1
    assert not (tmp_path / "fewer").exists()


def test_the_config_names_the_layers_that_are_left(tiny_model, tmp_path):
    prune.prune(str(tiny_model), [1], tmp_path / "one")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_hidden_layers"] == 1


def test_layers_that_are_no_numbers_are_said_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        prune.main(["--model", "none", "--keep", "a,b"])
    assert "--keep: 'a,b' must be numbers of layers" in capsys.readouterr().err
