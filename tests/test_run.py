"""The command line: the whole path on a tiny model, and runs with one wire cut."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_one_line, assert_same, command, load_state, read_lines, snapshot, start

from experiments import choose_prompt, run
from metatuner_jax import actor, data, evaluate, lora, networks, passes, plots, pretrained, product, progress, report, rollout
from metatuner_jax import job as job_lib

pytestmark = pytest.mark.usefixtures("compiled")
REPOSITORY = pathlib.Path(__file__).parent.parent
PLOTS = ("before_after", "adapters", "learning", "experts", "deltas")


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


def test_a_bare_name_is_a_config_that_comes_with_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder of that name is no config
    path, workdir, *_ = run.parse(["--config", "quickstart"])
    assert path == REPOSITORY / "experiments" / "configs" / "quickstart.py" and str(workdir) == "runs/quickstart"
    assert run.load_config(path, []).task.name == "reasoning_gym:word_sequence_reversal"
    (tmp_path / "jsonl").write_text("")
    assert run.config_path({"--config": "jsonl"}) == pathlib.Path("jsonl")  # a file that is there comes first
    run.main(["--help"])
    assert ", ".join(run.INSTALLED) in capsys.readouterr().out


# --- the whole path ---


@dataclasses.dataclass(frozen=True)
class Finished:
    folder: pathlib.Path
    output: str


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory, draw):
    """A run from the first step to the last without a break."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", draw)
        code, output = start(command(root, folder))
    assert code == 0
    return Finished(folder, output)


@pytest.mark.smoke
def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "experts.jsonl", "predictions.jsonl", "results.json", "before.jsonl", "run.log", "lock"}
    assert names == {*files, "checkpoints", "checkpoint_sums", "mean_adapter.safetensors", "report.html", "plots", "tensorboard"}
    assert {path.name for path in (finished.folder / "plots").iterdir()} == {f"{name}.png" for name in PLOTS}
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


def test_a_report_that_cannot_be_written_is_a_line_in_the_log_and_loses_nothing(finished, tmp_path, monkeypatch, draw):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = snapshot(folder)
    monkeypatch.setattr(report, "write", draw)
    for wrong in (OSError(28, "No space left on device"), ImportError("no matplotlib"), ValueError("no number")):

        def png(panels, path, wrong=wrong):
            raise wrong

        monkeypatch.setattr(plots, "png", png)
        output = io.StringIO()
        job_lib.draw(folder, progress.Progress(output))
        assert output.getvalue() == f"note: the report could not be written ({wrong}); python -m experiments.report {folder} tries again\n"
    kept = {path: content for path, content in snapshot(folder).items() if not path.endswith("report.html")}
    assert kept.items() <= before.items()


def test_the_report_shows_what_the_run_found(finished):
    results, page = json.loads((finished.folder / "results.json").read_text()), (finished.folder / "report.html").read_text(encoding="utf-8")
    assert f"<b>{100 * results['after']['mean']:.1f}%</b> of 8 unseen queries are answered rightly after training" in page
    layers, widths = results["delta_norms"].values(), [len(values) for values in results["delta_norms_spread"].values()]
    assert [len(values) for values in layers] == widths == [3, 3] and min(map(min, layers)) > 0
    for line in read_lines(finished.folder / "predictions.jsonl"):
        assert f">{line['id']}</small>" in page


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
    monkeypatch.setattr(job_lib, "do", lambda job, workdir, progress: jobs.append(job))
    assert run.main(command(root, folder, "dtype=auto")) == 0
    assert jobs[0].given.dtype == "auto" and jobs[0].setup.config.dtype == dtype


def test_weights_of_one_checkpoint_are_held_once(root):
    _, _, assignments, _ = run.parse(command(root, "run", "method=metatuner_j"))
    job = job_lib.prepare(run.load_config(root / "config.py", assignments))
    frozen, _ = networks.load(job.setup, job.tokens, jax.random.key(0), job.mesh)
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
