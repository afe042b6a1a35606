"""What is exported computes what the run's own passes compute."""

import json

import numpy as np
import pytest
import safetensors.numpy
from small_runs import STRONG, assert_one_line, command, own_logits, read_lines, snapshot, start

import metatuner_jax as mt
from experiments import export
from metatuner_jax import pretrained, transformer

pytestmark = pytest.mark.usefixtures("compiled")
SETTINGS = (
    *STRONG, "warmup.actor_steps=2", "warmup.targets=q,o", "warmup.rank=3", "warmup.learning_rate=0.02",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """The folder of a run whose actor was warmed up by a LoRA of other targets and another rank than the hypernetwork's."""
    folder = tmp_path_factory.mktemp("export") / "run"
    assert start(command(root, folder, *SETTINGS))[0] == 0
    return folder


@pytest.fixture(scope="module")
def tuner(folder):
    return mt.Tuner.load(folder)


def done(capfd, *arguments):
    """Returns (exit code, output, errors) of export."""
    code = export.main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def with_peft(base, folder):
    """Returns the weights of a model's folder with an adapter in PEFT's layout added, by their names."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    adapter, weights = safetensors.numpy.load_file(folder / "adapter_model.safetensors"), safetensors.numpy.load_file(base / "model.safetensors")
    for name in [name for name in adapter if name.endswith(".lora_A.weight")]:
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        place = name.removeprefix("base_model.model.").replace(".lora_A", "")
        assert place.split(".")[-2] in settings["target_modules"] and a.shape[0] == b.shape[1] == settings["r"]
        weights[place] = weights[place] + settings["lora_alpha"] / settings["r"] * b @ a
    assert len(adapter) == 2 * len(settings["target_modules"]) * 3
    return weights, settings


@pytest.mark.parametrize("query", [None, "reverse the list: one two three"])
def test_peft_and_merged_compute_what_the_run_does(query, folder, tuner, root, tmp_path, capfd):
    words = () if query is None else ("--query", query)
    for kind in ("peft", "merged"):
        code, output, _ = done(capfd, "--workdir", folder, "--to", kind, "--out", tmp_path / kind, *words)
        assert code == 0 and output.startswith(f"{tmp_path / kind} holds ")
    weights, settings = with_peft(root / "model", tmp_path / "peft")
    assert settings["target_modules"] == ["o_proj", "q_proj", "v_proj"] and settings["r"] == 11  # 3 of the warm-up beside 8
    assert settings["base_model_name_or_path"] == str(root / "model")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    assert weights.keys() == merged.keys()
    for name in merged:
        np.testing.assert_allclose(weights[name], merged[name], atol=1e-5)
    tokens = np.random.default_rng(0).integers(0, tuner.setup.actor.vocab_size, (2, 9))
    ours = own_logits(tuner, tokens, tuner.mean_lora() if query is None else tuner.lora(query))
    config, params = pretrained.load(tmp_path / "merged")
    assert config == tuner.setup.actor
    assert np.abs(np.asarray(transformer.forward(config, params, tokens)) - ours).max() < 1e-4
    bare = transformer.forward(*pretrained.load(root / "model"), tokens)
    assert np.abs(np.asarray(bare) - ours).max() > 0.01
    assert pretrained.load_tokenizer(tmp_path / "merged").chat_template == tuner.tokens.tokenizer.chat_template


def test_merged_weights_have_the_type_that_is_asked_for(folder, tmp_path, capfd):
    assert done(capfd, "--workdir", folder, "--to=merged", "--out", tmp_path / "half", "--dtype=bfloat16")[0] == 0
    assert safetensors.safe_open(tmp_path / "half" / "model.safetensors", "numpy").get_slice("model.norm.weight").get_dtype() == "BF16"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_prompts_are_those_of_the_test_queries_or_of_the_ones_that_are_given(folder, tuner, root, tmp_path, capfd):
    assert done(capfd, "--workdir", folder, "--to", "prompts", "--out", tmp_path / "own")[0] == 0
    wanted = [{name: line[name] for name in ("id", "query", "prompt")} for line in read_lines(folder / "predictions.jsonl")]
    assert read_lines(tmp_path / "own" / "prompts.jsonl") == wanted
    assert done(capfd, "--workdir", folder, "--to", "prompts", "--out", tmp_path / "given", "--input", root / "test.jsonl")[0] == 0
    assert read_lines(tmp_path / "given" / "prompts.jsonl") == [{name: line[name] for name in ("query", "prompt")} for line in wanted]
    assert done(capfd, "--workdir", folder, "--to", "prompts", "--out", tmp_path / "one", "--query", "one two")[0] == 0
    assert read_lines(tmp_path / "one" / "prompts.jsonl") == [{"query": "one two", "prompt": tuner.prompt("one two")}]


def test_a_hub_folder_answers_as_the_run_does_and_says_its_figures(folder, tuner, tmp_path, capfd):
    out = tmp_path / "hub"
    assert_one_line(done(capfd, "--workdir", folder, "--to", "hub", "--out", out)[2], "is no id on the hub: say in --base")
    code, _, _ = done(capfd, "--workdir", folder, "--to", "hub", "--out", out, "--base", "somebody/something")
    assert code == 0 and json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/something"
    predictions, results = read_lines(folder / "predictions.jsonl"), json.loads((folder / "results.json").read_text())
    queries = [line["query"] for line in predictions]
    there = mt.Tuner.load(out / "metatuner")
    assert there.answer(queries) == tuner.answer(queries)
    assert there.answer(queries, adapter="mean") == tuner.answer(queries, adapter="mean")
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: somebody/something\nlibrary_name: peft\n") and "`\"reverse the list\"`" in card
    for part, names in (("adapter", ("mean", "none")), ("prompt", ("initial",))):
        assert all(f"{100 * results[part][name]['mean']:.1f}% [" in card for name in names)
    content = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert not any(query.encode() in content for query in queries)  # no rows of the data
    assert sum(path.stat().st_size for path in out.rglob("*")) < sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*"))


def test_an_actor_that_was_warmed_up_in_full_is_merged_and_is_no_lora(root, tmp_path, capfd):
    run = tmp_path / "run"
    assert start(command(root, run, *SETTINGS, "warmup.actor_train=full", "eval.batch_size=4"))[0] == 0
    assert_one_line(done(capfd, "--workdir", run, "--to", "peft", "--out", tmp_path / "peft")[2], "warmup.actor_train=full", "take --to merged")
    assert done(capfd, "--workdir", run, "--to", "merged", "--out", tmp_path / "merged")[0] == 0
    tuner, tokens = mt.Tuner.load(run), np.arange(14).reshape(2, 7)
    ours = own_logits(tuner, tokens, tuner.mean_lora())
    assert np.abs(np.asarray(transformer.forward(*pretrained.load(tmp_path / "merged"), tokens)) - ours).max() < 1e-4
    assert not (tmp_path / "peft").exists()


MISTAKES = {
    "no kind": (("--out=x",), ("--to is missing",)),
    "an unknown kind": (("--to=gguf", "--out=x"), ("--to='gguf' is not one of peft, merged, prompts, hub",)),
    "an option of another kind": (("--to=peft", "--out=x", "--dtype=bfloat16"), ("--dtype is not for --to peft, but for merged",)),
    "an unknown type": (("--to=merged", "--out=x", "--dtype=int8"), ("--dtype='int8' is not one of",)),
    "a folder that is there": (("--to=peft", "--out={there}"), ("--out={there} is there already: name a new folder",)),
    "a folder below a file": (("--to=peft", "--out={there}/note/x"), ("--out={there}/note/x cannot be made",)),
    "a query that is too long": (("--to=peft", "--out={new}", "--query=" + "two " * 600), ("above generator.max_query_tokens",)),
    "no such checkpoint": (("--to=peft", "--out={new}", "--step=1"), ("there are those of the steps",)),
    "results of another checkpoint": (("--to=hub", "--out={new}", "--step=4", "--base=a/b"), ("give no --step",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_one_line_and_nothing_is_written(mistake, folder, tmp_path, capfd):
    there = tmp_path / "there"
    there.mkdir()
    (there / "note").write_text("mine")
    arguments, texts = MISTAKES[mistake]
    fill = lambda text: text.format(there=there, new=tmp_path / "new")
    before = snapshot(tmp_path), snapshot(folder)
    code, output, errors = done(capfd, f"--workdir={folder}", *map(fill, arguments))
    assert (code, output) == (2, "") and (snapshot(tmp_path), snapshot(folder)) == before
    assert_one_line(errors, *map(fill, texts))
