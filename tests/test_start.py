"""Runs that start from what an earlier run has learnt."""

import json
import shutil

import jax
import numpy as np
import pytest
from small_runs import STRONG, assert_one_line, command, load_state, read_lines, start

from experiments import run
from metatuner_jax import job

pytestmark = pytest.mark.usefixtures("compiled")
STILL = ("train.learning_rate=1e-12", "train.num_steps=2")  # steps that change nothing that can be seen


@pytest.fixture(scope="module")
def earlier(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "run"
    assert start(command(root, folder, *STRONG, "hyper.standardize=true"))[0] == 0
    return folder


def settings_from(folder, *others):
    return (*STRONG, "hyper.standardize=true", *STILL, f"train.start_from={folder}", *others)


def best(folder):
    return json.loads((folder / "results.json").read_text())["checkpoint"]


def test_it_takes_the_evaluated_checkpoint_and_goes_on_without_the_earlier_folder(earlier, root, tmp_path):
    gone, folder = tmp_path / "earlier", tmp_path / "run"
    shutil.copytree(earlier, gone)
    code, output = start(command(root, folder, *settings_from(gone)))
    assert code == 0 and f"starting from step {best(gone)} of {gone}: hyper, prompt, shared" in output.replace("embed, ", "")
    answers = [[(line["prompt"], line["answer"]) for line in read_lines(at / "predictions.jsonl")] for at in (folder, gone)]
    assert answers[0] == answers[1]
    before, after = load_state(gone, best(gone))["params"], load_state(folder, 2)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), after, before)  # shift and gain of the states too
    assert any(leaf.any() for leaf in jax.tree.leaves(before["hyper"]["shift"]))
    shutil.rmtree(gone)
    code, output = start(command(root, folder, *settings_from(gone), "train.num_steps=3"))
    assert code == 0 and "resuming at step 2 of 3" in output and "starting from" not in output
    assert json.loads((folder / "config.json").read_text())["started_from"] == {"workdir": str(gone), "step": 4}


def test_another_method_takes_the_parts_that_both_have(earlier, root, tmp_path):
    _, _, assignments, _ = run.parse(command(root, tmp_path / "run", *settings_from(earlier), "method=unshared"))
    config = run.load_config(root / "config.py", assignments)
    found = job.start_of(job.make_setup(config)[0], config)
    learnt = load_state(earlier, best(earlier))["params"]
    assert found.step == best(earlier) and found.anew == ("encoder",) and found.like.keys() == learnt.keys()
    assert jax.tree.map(np.shape, found.like) == jax.tree.map(np.shape, learnt)


@pytest.mark.parametrize(("others", "message"), [
    (("train.start_from=nowhere",), "train.start_from=nowhere holds no run: name the folder of one"),
    (("hyper.scale=9",), "has hyper.scale=20.0, to which what it learnt belongs, and this run has 9.0: take the same"),
    (("hyper.standardize=false",), "has hyper.standardize=True, to which"),
    (("hyper.rank=4",), "is a checkpoint of another architecture: hyper/"), (("method=sft",), "is a checkpoint of another architecture: hyper/"),
    (("generator.train=full",), "is a checkpoint of another architecture: "),
])  # fmt: skip
def test_what_cannot_be_started_from_is_one_line(others, message, earlier, root, tmp_path, capfd):
    assert start(command(root, tmp_path / "run", *settings_from(earlier, *others)))[0] == 2
    assert_one_line(capfd.readouterr().err, message)
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_belongs_to_a_warmed_up_actor_or_another_model_is_not_taken_without_it(root, earlier, tmp_path, capfd):
    warm, other = tmp_path / "warm", tmp_path / "model"
    assert start(command(root, warm, *STRONG, "warmup.actor_steps=1", "train.num_steps=1", "eval.report=validation"))[0] == 0
    capfd.readouterr()
    assert start(command(root, tmp_path / "run", *STRONG, *STILL, f"train.start_from={warm}"))[0] == 2
    assert_one_line(capfd.readouterr().err, f"train.start_from={warm} has warmed up its actor, to which all else that it learnt belongs: set warmup.actor_steps")
    _, _, assignments, _ = run.parse(command(root, tmp_path / "run", *STRONG, *STILL, f"train.start_from={warm}", "warmup.actor_steps=1"))
    config = run.load_config(root / "config.py", assignments)
    assert "actor" in job.start_of(job.make_setup(config)[0], config).like
    shutil.copytree(root / "model", other)
    assert start(command(root, tmp_path / "third", *settings_from(earlier, f"actor.model={other}")))[0] == 2
    assert_one_line(capfd.readouterr().err, f"has actor.model={root}/model, to which what it learnt belongs, and this run has {other}: take the same")
