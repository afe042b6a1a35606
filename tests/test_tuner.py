"""What a run has trained answers as the run itself did, from Python and from the command line."""

import doctest
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_runs import STRONG, assert_one_line, command, killed_at_last, read_lines, snapshot, start, write_rows

import metatuner_jax as mt
from experiments import predict, score
from metatuner_jax import checkpoint, lora, sharding
from metatuner_jax import tuner as tuner_lib

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("tuner") / "run"
    assert start(command(root, folder, *STRONG))[0] == 0
    return folder


@pytest.fixture(scope="module")
def tuner(folder):
    return mt.Tuner.load(folder)


@pytest.fixture(scope="module")
def predictions(folder):
    return read_lines(folder / "predictions.jsonl")


def read_json(path):
    return json.loads(path.read_text())


def test_it_writes_and_answers_what_the_run_did_in_batches_of_any_size(tuner, predictions):
    wanted = [mt.Answer(line["query"], line["prompt"], line["answer"]) for line in predictions]
    queries = [answer.query for answer in wanted]
    assert tuner.answer(queries) == wanted
    assert tuner.answer(queries[:3]) == wanted[:3] and tuner.answer(queries[4]) == [wanted[4]] and tuner.answer([]) == []
    assert list(tuner.stream(queries * 2)) == wanted * 2
    assert [tuner.prompt(query) for query in queries] == [answer.prompt for answer in wanted]


def test_other_adapters_and_prompts_are_those_of_the_runs_controls(tuner, folder, predictions):
    results, references = read_json(folder / "results.json"), {line["query"]: line["reference"] for line in predictions}
    assert len({answer.text for answer in tuner.answer(list(references))}) > 1

    def score(**how):
        return np.mean([answer.text.strip() == references[answer.query] for answer in tuner.answer(list(references), **how)])

    for adapter in ("own", "mean", "none"):
        assert score(adapter=adapter) == pytest.approx(results["adapter"][adapter]["mean"])
    assert score(prompt="initial") == pytest.approx(results["prompt"]["initial"]["mean"])
    before = [line["answer"] for line in read_lines(folder / "before.jsonl")]
    found = tuner.answer(list(references), adapter="none", prompt="initial")
    assert [answer.text for answer in found] == before and {answer.prompt for answer in found} == {"reverse the list"}
    texts = {name: [answer.text for answer in tuner.answer(list(references), adapter=name)] for name in ("own", "mean", "none")}
    assert texts["own"] != texts["none"]


def test_an_answer_stops_before_the_texts_that_are_given(folder, predictions):
    texts = [line["answer"] for line in predictions]
    stop = max(set("".join(texts)) - {" ", ",", "'"}, key=lambda letter: sum(0 < text.find(letter) < len(text) - 1 for text in texts))
    found = mt.Tuner.load(folder, settings={"actor.stop": stop}).answer([line["query"] for line in predictions])
    assert [answer.text for answer in found] == [text.partition(stop)[0] for text in texts] != texts
    assert sum(len(answer.ids) for answer in found) < sum(len(answer.ids) for answer in mt.Tuner.load(folder).answer([line["query"] for line in predictions]))


def test_a_querys_lora_is_what_it_is_answered_with(tuner, predictions):
    query = predictions[0]["query"]
    found = tuner.lora(query)
    assert {name: (one.a.shape, one.b.shape) for name, one in found.items()} == {"q": ((3, 24, 8), (3, 8, 24)), "v": ((3, 24, 8), (3, 8, 12))}
    rows, passes = tuner._rows([query], None), tuner._passes_for(1)
    h, *prompt = passes.prompts(tuner.params, rows, np.arange(1))
    given = passes.answer(rows, np.arange(1), *prompt, lambda at: lora.repeat(found, len(at)))
    own = passes.answer(rows, np.arange(1), *prompt, passes.adapter(tuner.params, h))
    bare = passes.answer(rows, np.arange(1), *prompt)
    assert given.first == own.first != bare.first
    other = tuner.lora(predictions[1]["query"])
    assert not np.array_equal(other["q"].b, found["q"].b)


def test_the_mean_lora_is_that_of_the_train_queries(tuner, folder, root):
    queries = [json.loads(line)["question"] for line in (root / "train.jsonl").read_text().splitlines()][:8]
    deltas = [np.einsum("lir,lro->lio", one.a, one.b) for one in (tuner.lora(query)["v"] for query in queries)]
    mean, energy = tuner.mean_lora()["v"], read_json(folder / "results.json")["mean_adapter_energy"]
    error = np.linalg.norm(np.einsum("lir,lro->lio", mean.a, mean.b) - np.mean(deltas, axis=0)) / np.linalg.norm(np.mean(deltas, axis=0))
    assert error < 2 * np.sqrt(1 - energy) + 1e-3


def test_a_run_that_has_not_ended_gives_its_best_checkpoint(folder, predictions, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(folder, unfinished)
    for name in ("results.json", "predictions.jsonl", "mean_adapter.safetensors"):
        (unfinished / name).unlink()
    found = mt.Tuner.load(unfinished)
    assert [answer.text for answer in found.answer([line["query"] for line in predictions])] == [line["answer"] for line in predictions]
    with pytest.raises(ValueError, match="has no mean_adapter.safetensors, which a run of this version leaves at its end"):
        found.answer("reverse the list: one two three", adapter="mean")
    best = checkpoint.best_in(unfinished / "checkpoints")
    (other,) = {2, 4} - {best}
    assert not np.array_equal(mt.Tuner.load(folder, step=other).lora("one two")["q"].b, found.lora("one two")["q"].b)
    with pytest.raises(ValueError, match=f"is of the checkpoint of step {best}, not {other}"):
        mt.Tuner.load(folder, step=other).mean_lora()


MISTAKES = {
    "no folder": (lambda folder: mt.Tuner.load(folder / "none"), "holds no run: name the folder of one"),
    "no such setting": (lambda folder: mt.Tuner.load(folder, settings={"hyper.rank": 3}), "hyper.rank cannot be another one than in training"),
    "a value that cannot be": (lambda folder: mt.Tuner.load(folder, settings={"dtype": "int4"}), "dtype='int4' is not one of auto, bfloat16, float32"),
    "devices that are not there": (lambda folder: mt.Tuner.load(folder, settings={"mesh.fsdp": 3}), "mesh.fsdp=3"),
    "no such checkpoint": (lambda folder: mt.Tuner.load(folder, step=3), "there are those of the steps 2, 4"),
    "another model": (lambda folder: mt.Tuner.load(folder, settings={"actor.model": "none"}), "actor.model='none' cannot be used"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_loaded_is_refused_in_one_line(mistake, folder):
    load, text = MISTAKES[mistake]
    before = snapshot(folder)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert text in str(error.value) and "\n" not in str(error.value) and snapshot(folder) == before


def test_a_damaged_checkpoint_is_not_loaded(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    step = read_json(folder / "results.json")["checkpoint"]
    path = max((tmp_path / "run" / "checkpoints" / str(step)).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not as it was written; take another --step"):
        mt.Tuner.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("queries", "how", "text"),
    [
        ([" "], {}, "query ' ' is empty"),
        (["one", 2], {}, "query 2 is no text"),
        (["one", "two " * 600], {}, "takes 676 tokens with the template, above generator.max_query_tokens=384"),
        (["one"], {"adapter": "shuffled"}, "adapter='shuffled' is not one of own, mean, none"),
        (["one"], {"prompt": "none"}, "prompt='none' is not one of own, initial"),
        (["one"], {"part": "maths"}, "part='maths' is not one of the parts"),
    ],
)
def test_queries_that_cannot_be_answered_are_refused(queries, how, text, tuner):
    with pytest.raises(ValueError) as error:
        tuner.answer(queries, **how)
    assert text in str(error.value)


def test_long_queries_are_cut_where_asked(folder):
    found = mt.Tuner.load(folder, settings={"data.too_long": "cut", "eval.batch_size": 2})
    long, short = found.answer(["two " * 300 + "reverse the list: one two three", "reverse the list: one two three"])
    assert long.query.startswith("two two") and short.text == found.answer(["reverse the list: one two three"])[0].text


def test_rows_in_memory_train_what_rows_in_files_do(root, folder, tmp_path):
    from experiments import run

    path, _, assignments, _ = run.parse(command(root, "run", *STRONG))
    config = run.load_config(path, assignments)
    splits = [[json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()] for split in ("train", "validation", "test")]
    here = tmp_path / "run"
    tuner = mt.Tuner.train(config, here, *splits)
    for name in ("predictions.jsonl", "experts.jsonl"):
        ids = lambda lines: [{**line, "id": line["id"].split("/")[-1]} for line in lines]
        assert ids(read_lines(here / name)) == ids(read_lines(folder / name))
    assert jax.tree.all(jax.tree.map(np.array_equal, sharding.fetch(tuner.params), sharding.fetch(mt.Tuner.load(folder).params)))
    before = snapshot(here)
    assert mt.Tuner.train(config, here, *splits).prompt("one two") == tuner.prompt("one two") and snapshot(here) == before
    for rows, text in (([3], "train row 1 is 3, no dict"), ([{"question": "one"}], "train row 1: no field 'answer'"), ([], "holds no rows")):
        with pytest.raises(ValueError, match=text):
            mt.Tuner.train(config, tmp_path / "none", rows)
    with pytest.raises(ValueError, match="was begun with other data: train"):
        (here / "results.json").unlink()
        mt.Tuner.train(config, here, splits[0][:-1], *splits[1:])


def test_the_examples_of_the_docstrings_hold(folder, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(folder)
    (tmp_path / "my-model").symlink_to(root / "model")
    tests = [test for test in doctest.DocTestFinder().find(tuner_lib, "tuner", globs={}) if test.examples]
    assert {test.name for test in tests} == {"tuner.Tuner", "tuner.Tuner.train"}
    for test in tests:
        said = []
        doctest.DocTestRunner().run(test, out=said.append)
        assert not said, "".join(said)


# --- the command line ---


def said(capfd, *arguments):
    """Returns (exit code, output, errors) of predict."""
    code = predict.main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def test_predict_answers_a_query_and_a_file(folder, predictions, tmp_path, capfd):
    one = predictions[0]
    code, output, _ = said(capfd, "--workdir", folder, "--query", one["query"])
    assert code == 0 and output == f"query:  {one['query']}\nprompt: {one['prompt']}\nanswer: {one['answer']}\n\n"
    wanted = [{name: line[name] for name in ("id", "query", "prompt", "answer")} for line in predictions]
    code, output, _ = said(capfd, "--workdir", folder, "--input", folder / "predictions.jsonl", "--json", "--config.eval.batch_size=4")
    assert code == 0 and [json.loads(line) for line in output.splitlines()] == wanted
    write_rows(tmp_path / "mine.jsonl", [{"text": line["query"]} for line in predictions])
    code, output, _ = said(capfd, f"--workdir={folder}", f"--input={tmp_path}/mine.jsonl", "--field=text", "--adapter=none", "--prompt=initial", "--json")
    before = [line["answer"] for line in read_lines(folder / "before.jsonl")]
    assert code == 0 and [json.loads(line)["answer"] for line in output.splitlines()] == before


def test_predict_answers_lines_as_they_come(folder, predictions):
    words = [sys.executable, "-m", "experiments.predict", "--workdir", str(folder), "--json"]
    with killed_at_last(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)) as process:
        for line in predictions[:2]:  # the second one is sent once the first one is answered
            process.stdin.write(line["query"] + "\n\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["answer"] == line["answer"]
        process.stdin.write("".join(line["query"] + "\n" for line in predictions).rstrip("\n"))
        process.stdin.close()
        assert [json.loads(line)["answer"] for line in process.stdout] == [line["answer"] for line in predictions]
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ((), ("--workdir is missing",)),
        (("--workdir=none", "--query=one"), ("--workdir=none holds no run",)),
        (("--workdir={folder}", "--query=one", "--input=x.jsonl"), ("--query and --input are both given",)),
        (("--workdir={folder}", "--query=one", "--adapter=all"), ("--adapter='all' is not one of own, mean, none",)),
        (("--workdir={folder}", "--query=one", "--step=two"), ("--step=two must be the number of a checkpoint",)),
        (("--workdir={folder}", "--query=one", "--config.hyper.rank=3"), ("hyper.rank cannot be another one",)),
        (("--workdir={folder}", "--query=one", "--quiet"), ("argument '--quiet' is unknown",)),
        (("--workdir={folder}", "--input=none.jsonl"), ("--input='none.jsonl'", "no such file")),
        (("--workdir={folder}", "--input={root}/train.jsonl", "--field=text"), ("no field 'text'", "--field")),
        (("--workdir={folder}", "--query= "), ("query ' ' is empty",)),
    ],
)
def test_predict_refuses_mistakes_in_one_line(arguments, texts, folder, root, capfd):
    before = snapshot(folder)
    code, output, errors = said(capfd, *(argument.format(folder=folder, root=root) for argument in arguments))
    assert (code, output) == (2, "") and snapshot(folder) == before
    assert_one_line(errors, *texts)


# --- other rows ---


def scored(capfd, *arguments):
    """Returns (exit code, output, errors) of score."""
    code = score.main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def test_the_test_rows_score_again_what_the_run_says(folder, predictions, root, tmp_path, capfd):
    results = read_json(folder / "results.json")
    percent = lambda mean: f"{100 * mean:6.1f}%"
    words = ("--workdir", folder, "--test", root / "test.jsonl")
    code, output, _ = scored(capfd, *words, "--out", tmp_path / "out.jsonl")
    title, strict, flexible = output.splitlines()
    assert code == 0 and "8 rows of" in title and "exact_match, own adapter, own prompt" in title
    assert percent(results["after"]["mean"]) in strict and percent(results["after_flexible"]["mean"]) in flexible
    assert [{**line, "id": None} for line in read_lines(tmp_path / "out.jsonl")] == [{**line, "id": None} for line in predictions]
    code, output, _ = scored(capfd, *words, "--adapter=mean", "--num_test=3")
    assert code == 0 and "3 rows of" in output and "mean adapter" in output
    write_rows(tmp_path / "right.jsonl", [{"question": line["query"], "answer": line["answer"]} for line in predictions if line["answer"].strip()])
    code, output, _ = scored(capfd, "--workdir", folder, "--test", tmp_path / "right.jsonl")
    assert code == 0 and " 100.0% " in output.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--workdir={folder}",), ("--test is missing",)),
        (("--workdir=none", "--test={root}/test.jsonl"), ("--workdir=none holds no run",)),
        (("--workdir={folder}", "--test=none.jsonl"), ("task.test='none.jsonl'", "no such file")),
        (("--workdir={folder}", "--test={root}/no_field.jsonl"), ("no_field.jsonl:2: no field 'answer'",)),
        (("--workdir={folder}", "--test={root}/test.jsonl", "--num_test=0"), ("--num_test=0 must be a whole number above 0",)),
        (("--workdir={folder}", "--test={root}/test.jsonl", "--num_test=9"), ("task.num_test=9 is above the 8 rows",)),
        (("--workdir={folder}", "--test={root}/test.jsonl", "--out={root}/test.jsonl"), ("is there already: name a new file",)),
        (("--workdir={folder}", "--test={root}/test.jsonl", "--prompt=best"), ("--prompt='best' is not one of own, initial",)),
    ],
)
def test_score_refuses_mistakes_in_one_line(arguments, texts, folder, root, capfd):
    before = snapshot(folder)
    code, output, errors = scored(capfd, *(argument.format(folder=folder, root=root) for argument in arguments))
    assert (code, output) == (2, "") and snapshot(folder) == before
    assert_one_line(errors, *texts)
