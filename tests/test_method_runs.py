"""Whole runs of every method on a tiny model, through the command line."""

import json

import numpy as np
import pytest
from small_runs import SOAK, assert_same, command, load_state, read_lines, start, write_rows

from metatuner_jax import data, evaluate, tuner
from metatuner_jax.methods import METHODS

pytestmark = pytest.mark.usefixtures("compiled")
PREFERENCE = ("preference.num_samples=2", "preference.temperature=2.0")


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "metatuner_j"])  # which test_run is about
def test_every_method_runs_to_its_results(method, root, tmp_path):
    settings = ("rollout.search_prompts=2", "rollout.search_rounds=1", "train.alternate_every=1", *PREFERENCE)
    code, output = start(command(root, tmp_path / "run", f"method={method}", *settings))
    assert code == 0 and f"{method} on jsonl, seed 0: {METHODS[method].summary}" in output
    results, m = results_of(tmp_path / "run"), METHODS[method]
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in metrics if line["phase"] != "search"]
    assert [line["step"] for line in steps] == list(range(4 if m.learns else 0))
    assert results["steps"] == (0 if not m.learns else 2 if method == "dpo" else 4)
    assert results["method"] == method and len(results["scores"]) == 8 and results["validation"]["n"] == 8
    cost = results["cost"]
    assert (cost["trained_parameters"] > 0) == m.learns and (cost["tokens"] > 0) == (method != "zero_shot")
    assert cost["actor_calls"] == sum(line.get("rollout_attempts", 0) for line in metrics)
    assert (cost["actor_calls"] > 0) == (m.prompt != "initial" or m.preference)
    if m.adapter == "static":
        assert results["adapter"]["own"] == results["adapter"]["shuffled"] == results["adapter"]["mean"]
    if m.prompt == "initial":
        assert results["prompts"] == {"distinct": 1, "share_initial": 1.0, "mean_tokens": results["prompts"]["mean_tokens"]}
    terms = {line["step"]: {name for name in line if name.endswith("_loss")} for line in steps}
    if method == "metatuner_i":
        assert terms == {0: {"task_loss"}, 1: {"prompt_loss"}, 2: {"task_loss"}, 3: {"prompt_loss"}}
    if method == "dpo":
        assert [line["phase"] for line in steps] == ["actor"] * 2 + ["joint"] * 2
        assert terms[2] == {"preference_loss"} and steps[2]["margin"] == 0
        pairs = read_lines(tmp_path / "run" / "pairs.jsonl")
        assert {pair["step"] for pair in pairs} == {2} and any(pair["chosen"] for pair in pairs)
    if m.prompt == "searched":
        assert metrics[-1]["phase"] == "search"
    if method == "zero_shot":
        assert results["after"] == results["before"]
    found = assert_answers(tmp_path / "run")
    if m.adapter is None:
        with pytest.raises(ValueError, match=f"method={method} has no adapter: it adapts the prompt alone"):
            found.mean_lora()
    else:
        assert set(found.mean_lora()) == set(found.lora("one two")) == {"q", "v"}


def assert_answers(folder):
    """Compares what the run said with what is said by what it trained."""
    predictions = read_lines(folder / "predictions.jsonl")
    found = tuner.Tuner.load(folder)
    answers = found.answer([line["query"] for line in predictions])
    assert [(answer.prompt, answer.text) for answer in answers] == [(line["prompt"], line["answer"]) for line in predictions]
    return found


WARM = (
    "warmup.actor_steps=2", "warmup.generator_steps=2", "train.num_steps=3", "train.checkpoint_every=1", "train.diagnose_every=2",
    "rollout.every=1", "hyper.standardize=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def warm(root, tmp_path_factory):
    """A run with both warm-ups, without a break."""
    folder = tmp_path_factory.mktemp("warm") / "run"
    code, output = start(command(root, folder, *WARM))
    assert code == 0
    return folder, output


def test_warm_ups_are_phases_of_the_run(warm):
    folder, output = warm
    for text in (
        "step 0: warm-up of the actor",
        "step 2: warm-up of the generator",
        "step 4: training",
        "% of their square differs",
    ):
        assert text in output
    assert " of at most 60 actor calls" in output  # five refreshes of four queries with two new prompts
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["phase"] for line in metrics] == ["actor"] * 2 + ["generator"] * 2 + ["joint"] * 3
    losses = [{name for name in line if name.endswith("_loss")} for line in metrics]
    assert losses == [{"task_loss"}] * 2 + [{"prompt_loss"}] * 2 + [{"task_loss", "prompt_loss"}] * 3
    assert [("task_gradient_share" in line) for line in metrics] == [False] * 4 + [False, True, False]
    for line in metrics[4:]:
        assert {"delta_ratio", "delta_variance", "delta_rank", "initial_share", "expert_size", "expert_score"} <= set(line)
    assert {attempt["step"] for attempt in read_lines(folder / "experts.jsonl")} == {2, 3, 4, 5, 6}
    before = [line["score"] for line in read_lines(folder / "before.jsonl")]
    assert results_of(folder)["before"]["mean"] == np.mean(before)
    assert np.all(load_state(folder, 7)["params"]["hyper"]["gain"] > 1.5)  # the joint phase began with standardised states
    assert_answers(folder)


@pytest.mark.parametrize("at", [1, 3, 5] if SOAK else [3, 5])  # in either warm-up and in the joint phase; the first one is cut off below too
def test_a_run_cut_off_in_any_phase_goes_on_as_if_it_had_not_been(at, warm, root, tmp_path, monkeypatch):
    goes_on(WARM, at, warm[0], root, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [("method=dpo", *PREFERENCE), (*WARM, "warmup.actor_train=full", "warmup.generator_steps=0", "train.num_steps=1")],
    ids=["dpo", "full"],
)
def test_other_warm_ups_of_the_actor_go_on_too(settings, root, tmp_path, monkeypatch):
    settings = (*settings, "train.checkpoint_every=1")
    assert start(command(root, tmp_path / "whole", *settings))[0] == 0
    assert_answers(tmp_path / "whole")
    goes_on(settings, 1, tmp_path / "whole", root, tmp_path, monkeypatch)


def goes_on(settings, at, whole, root, tmp_path, monkeypatch):
    """Cuts a run off before its step `at`, goes on with it, and compares with one that was not."""
    seen = []

    def cut_off(*args, batch_of=data.batch_of):
        seen.append(1)
        if len(seen) == at + 1:
            raise KeyboardInterrupt
        return batch_of(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "batch_of", cut_off)
        start(command(root, tmp_path / "run", *settings))
    code, output = start(command(root, tmp_path / "run", *settings))
    assert code == 0 and f"resuming at step {at} of" in output
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("method", ["sft", "better_together"])
def test_a_run_cut_off_in_its_evaluation_goes_on_from_the_best_checkpoint(method, root, tmp_path, monkeypatch):
    scores = iter({"mean": mean, "log_likelihood": -1.0, "n": 8} for mean in (1.0, 0.0, 1.0))
    arguments = command(root, tmp_path / "run", f"method={method}", "rollout.search_prompts=2", "rollout.search_rounds=1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "validate", lambda *_: next(scores))

        def cut_off(*_):
            raise KeyboardInterrupt

        patch.setattr(evaluate, "evaluate", cut_off)
        start(arguments)
    lines = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
    code, output = start(arguments)
    assert code == 0 and "resuming at step 4 of 4" in output and "taking the checkpoint of step 2" in output
    assert results_of(tmp_path / "run")["checkpoint"] == 2
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == lines


def test_a_run_may_report_its_validation_score_alone(root, tmp_path):
    code, output = start(command(root, tmp_path / "run", "method=sft", "eval.report=validation"))
    results = results_of(tmp_path / "run")
    assert code == 0 and "jsonl, sft: 0.0% of 8 validation rows" in output
    assert set(results) == {
        "task", "method", "seed", "metric", "validation", "steps", "checkpoint", "wall_s", "train_s", "rollout_s", "cost", "dropped",
    }  # fmt: skip
    assert not (tmp_path / "run" / "before.jsonl").exists() and not (tmp_path / "run" / "predictions.jsonl").exists()
    code, again = start(command(root, tmp_path / "run", "method=sft", "eval.report=validation"))
    assert code == 0 and "finished: nothing to do" in again


def test_rows_of_a_mixture_keep_their_own_prompts_and_are_scored_apart(root, tmp_path):
    write_rows(tmp_path / "more.jsonl", [{"question": f"say {word}", "answer": word} for word in "abcdefghijklmnopqrstuvwxyz"])
    (tmp_path / "config.py").write_text(
        "from metatuner_jax import config\n\n\ndef get_config():\n    parts = {\n"
        f"        'lists': {{'name': 'jsonl', 'train': r'{root}/train.jsonl', 'initial_prompt': 'reverse'}},\n"
        f"        'words': {{'name': 'jsonl', 'train': r'{tmp_path}/more.jsonl', 'initial_prompt': 'say it'}},\n    }}\n"
        "    task = {'name': 'mixture', 'num_train': 12, 'num_validation': 4, 'num_test': 8, 'options': {'parts': parts}}\n"
        "    return config.to_tree(config.make(task=task))\n"
    )
    arguments = command(root, tmp_path / "run", "train.num_steps=2", "eval.batch_size=8")
    arguments[1] = str(tmp_path / "config.py")
    dropped = ("task.name=", "task.train=", "task.validation=", "task.test=", "task.num_validation=", "task.initial_prompt=")
    code, _ = start([word for word in arguments if not word.removeprefix("--config.").startswith(dropped)])
    assert code == 0
    results = results_of(tmp_path / "run")
    assert set(results["parts"]) == {"lists", "words"} and all(part["after"]["n"] == 4 for part in results["parts"].values())
    firsts = {}
    for attempt in read_lines(tmp_path / "run" / "experts.jsonl"):
        firsts.setdefault(attempt["id"], attempt["prompt"])
    assert {(id.split("/")[0], prompt) for id, prompt in firsts.items()} == {("lists", "reverse"), ("words", "say it")}
