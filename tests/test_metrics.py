"""The metrics of a run go where they are asked to."""

import json
import sys
import types

import pytest
from small_runs import assert_one_line, command, read_lines, start
from tensorboardX.proto import event_pb2

from metatuner_jax import config as config_lib
from metatuner_jax import metrics

pytestmark = pytest.mark.usefixtures("compiled")


def read_events(folder):
    """Returns the events of TensorBoard's files, in the order in which they are read: each record is its length, a sum, itself and a sum."""
    events = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + size]))
            at += 16 + size
    return events


def values_of(events):
    """Returns {tag: {step: value}} as TensorBoard shows them: what a new start says of a step stands in the place of older files' values."""
    found = {}
    for event in events:
        if event.HasField("session_log"):
            for steps in found.values():
                for step in [step for step in steps if step >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_has_what_metrics_jsonl_has_also_of_a_run_that_went_on(tmp_path):
    settings = config_lib.make(train={"num_steps": 3})
    for first, steps in ((0, (0, 1, 2)), (1, (1, 2))):
        log = metrics.Metrics(tmp_path, settings, first, 0.0)
        for step in steps:
            log.add({"step": step, "phase": "joint", "loss": step + 10.0 * first, "validation": {"mean": 0.5, "n": 8}, "ids": ["a"]})
        log.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.0), (1, 11.0), (2, 12.0)]
    found = values_of(read_events(tmp_path / "tensorboard"))
    assert found["loss"] == {0: 0.0, 1: 11.0, 2: 12.0} and found["validation/mean"] == {0: 0.5, 1: 0.5, 2: 0.5}
    assert set(found) == {"loss", "validation/mean", "validation/n", "wall_s"}


def test_a_run_writes_for_tensorboard_and_the_profiler_and_to_weights_and_biases_where_asked(root, tmp_path, monkeypatch):
    sent = []
    begun, summary = [], {}
    run = types.SimpleNamespace(log=lambda found, step: sent.append((step, found)), finish=lambda: sent.append("end"), summary=summary)
    wandb = types.SimpleNamespace(init=lambda **how: (begun.append(how), run)[1], __spec__=types.SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    arguments = command(root, tmp_path / "run", "train.wandb=mine", "train.profile_steps=1", "eval.report=validation")
    code, output = start(arguments)
    assert code == 0 and f"recording 1 steps for {tmp_path}/run/profile" in output
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    lines, found = read_lines(tmp_path / "run" / "metrics.jsonl"), values_of(read_events(tmp_path / "run" / "tensorboard"))
    assert found["task_loss"] == pytest.approx({line["step"]: line["task_loss"] for line in lines}, rel=1e-6)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["results/validation/mean"] == {results["checkpoint"]: pytest.approx(results["validation"]["mean"])}
    assert [step for step, _ in sent[:-1]] == [0, 1, 2, 3] and sent[-1] == "end" and sent[2][1]["loss"] == lines[2]["loss"]
    assert summary["results/validation/mean"] == results["validation"]["mean"]
    (how,) = begun
    assert how["project"] == "mine" and how["name"] == "run" and how["config"]["train"]["num_steps"] == 4
    assert how["id"] == (tmp_path / "run" / "wandb_id").read_text()


def test_weights_and_biases_failing_ends_no_run(tmp_path, monkeypatch):
    def fail(*args, **how):
        raise KeyError("the server\nhas gone")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: types.SimpleNamespace(log=fail, finish=fail)))
    said = []
    log = metrics.Metrics(tmp_path, config_lib.make(train={"wandb": "mine", "tensorboard": False}), 0, 0.0, said.append)
    for step in range(2):
        log.add({"step": step, "loss": 1.0})
    log.close()
    assert len(said) == 1 and said[0].startswith("note: Weights & Biases gets no more of this run: ")
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2 and not (tmp_path / "tensorboard").exists()


def test_weights_and_biases_must_be_there_where_it_is_asked_for(root, tmp_path, capfd):
    assert start(command(root, tmp_path / "run", "train.wandb=mine"))[0] == 2
    assert_one_line(capfd.readouterr().err, "train.wandb='mine' needs wandb, which is not installed: pip install wandb, or set train.wandb=none")
    assert not (tmp_path / "run").exists()
