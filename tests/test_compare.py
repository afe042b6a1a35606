"""The comparison of methods: statistics by hand, the grid with made-up runs, the plot, and RESULTS.md from what is committed."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import compare, run, summary, tables
from metatuner_jax import config as config_lib
from metatuner_jax import files
from metatuner_jax import job as job_lib

REPOSITORY = pathlib.Path(__file__).parent.parent
METHODS = tuple(config_lib.METHODS)
QUALITY = {name: (i + 1) / (len(METHODS) + 2) for i, name in enumerate(METHODS)}  # made-up scores: the later, the better
CONFIG = "from metatuner_jax import config\n\n\ndef get_config():\n    return config.to_tree(config.Config())\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder to work in, with a config file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


class Runs:
    """Stands for the processes of the runs: each writes made-up results, or fails or is broken off where it is told to."""

    def __init__(self):
        self.started, self.failing, self.broken = [], set(), set()

    def __call__(self, arguments, log):
        path, workdir, settings, _ = run.parse(arguments)
        settings = dict(settings)
        name = workdir.name
        self.started.append(name)
        pathlib.Path(log).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(log).write_text("began\nfailed: no luck\n\n")
        if name in self.failing:
            return 1
        workdir.mkdir(parents=True, exist_ok=True)
        config = run.load_config(path, list(settings.items()))
        content = {"config": dataclasses.asdict(config), "devices": {"kind": "cpu", "platform": "cpu", "count": 1}}
        files.write_json(workdir / "config.json", content)
        if name in self.broken:
            self.broken.remove(name)
            raise KeyboardInterrupt
        made = short_results(config) if settings.get("eval.report") == "validation" else make_results(config.method, config.seed)
        files.write_json(workdir / "results.json", made)
        return 0


def short_results(config):
    """Returns what a run on validation rows alone says: 1e-3 and 5e-4 score the same, 2e-4 less; answers are likelier at low rates."""
    mean = 0.25 if config.train.learning_rate == 2e-4 else 0.5
    score = {"mean": mean, "log_likelihood": -1000 * config.train.learning_rate, "n": 16}
    return {
        "task": "jsonl", "method": config.method, "seed": config.seed, "metric": "number", "validation": score, "steps": 25,
        "wall_s": 30.0, "cost": {},
    }  # fmt: skip


def make_results(method, seed, n=40, mean=None, **changes):
    """Returns results of a run whose scores are drawn at a method's quality."""
    rng = np.random.default_rng([METHODS.index(method), seed])
    scores = {f"test-{i}": float(rng.random() < (QUALITY[method] if mean is None else mean)) for i in range(n)}
    after = {"mean": float(np.mean(list(scores.values()))), "ci95": [0.0, 1.0], "n": n}
    found = {
        "task": "jsonl", "method": method, "seed": seed, "metric": "number", "before": {**after, "mean": 0.125}, "after": after,
        "validation": {"mean": 0.5, "n": 16}, "steps": 100, "wall_s": 600.0 + 60 * METHODS.index(method), "scores": scores,
        "cost": {"trained_parameters": 34_800_000, "actor_calls": 150 * METHODS.index(method), "tokens": 123_456, "seconds": 500.0},
    }  # fmt: skip
    ours = method.startswith("metatuner")
    control = lambda *names: {name: {**after, "mean": after["mean"] / 2 ** (i * ours)} for i, name in enumerate(names)}
    found |= {
        "adapter": control("own", "shuffled", "mean", "none"), "prompt": control("own", "shuffled", "initial"),
        "prompts": {"distinct": 3, "share_initial": 0.75, "mean_tokens": 9.5},
    }  # fmt: skip
    return found | changes


@pytest.fixture
def runs(monkeypatch):
    """What takes the place of starting a process."""
    fake = Runs()
    monkeypatch.setattr(compare, "start", fake)
    return fake


def call(*arguments):
    return compare.main(["--config", "config.py", "--workdir", "work", *arguments])


def read(path):
    return json.loads(pathlib.Path(path).read_text())


def write_run(folder, results, **config):
    """Writes the folder of a finished run."""
    folder.mkdir(parents=True)
    files.write_json(
        folder / "config.json", {"config": {"train": {"learning_rate": 5e-4}}, "devices": {"kind": "cpu", "count": 1}, **config}
    )
    files.write_json(folder / "results.json", results)


def make_comparison(folder, runs, variants=None, seeds=(0, 1), sweep=None):
    """Writes the folder of a comparison out of {(variant, seed): results}."""
    names = variants or list(dict.fromkeys(name for name, _ in runs))
    grid = {
        "command": "python -m experiments.compare --config c.py",
        "sweep": sweep,
        "variants": names,
        "seeds": list(seeds),
        "machines": ["a cpu"],
    }
    folder.mkdir(parents=True)
    files.write_json(folder / "grid.json", grid)
    for (name, seed), results in runs.items():
        write_run(folder / f"{name}-{seed}", results)
    return folder


# --- statistics ---


def test_the_interval_resamples_queries_within_each_seed():
    parts = [np.array([0.0, 1.0]), np.array([1.0, 1.0, 1.0])]
    means = summary.bootstrap(parts, 20000)
    assert set(means) == {0.5, 0.75, 1.0}  # the second seed has nothing to vary, and weighs as much as the first
    np.testing.assert_allclose([(means == m).mean() for m in (0.5, 0.75, 1.0)], [0.25, 0.5, 0.25], atol=0.02)
    assert summary.interval(parts) == [0.5, 1.0]
    normal = np.random.default_rng(1).normal(size=400)
    low, high = summary.interval([normal])
    assert (high - low) / 2 == pytest.approx(1.96 * normal.std() / 20, rel=0.05)


def test_the_spread_over_seeds_needs_two_of_them():
    assert summary.spread([0.5]) is None
    assert summary.spread([0.25, 0.5, 0.75]) == pytest.approx(0.25)


def test_the_paired_bootstrap_takes_the_queries_that_both_answered():
    ours = {0: {"a": 1.0, "b": 1.0, "c": 0.0}, 1: {"a": 1.0, "b": 0.0}, 2: {"a": 1.0}}
    rival = {0: {"c": 0.0, "a": 0.0, "b": 1.0, "d": 1.0}, 1: {"b": 0.0, "a": 1.0}, 3: {"a": 0.0}}
    found = summary.against(ours, rival)
    assert found["seeds"] == [0, 1] and found["pairs"] == 5
    assert found["difference"] == pytest.approx((1 / 3 + 0) / 2) and found["relative"] == pytest.approx(
        (1 / 6) / ((1 / 3 + 1 / 2) / 2)
    )
    assert found["not_above"] == pytest.approx((2 / 3) ** 3, abs=0.02)  # of three draws in seed 0, none is query a
    assert found["ci95"] == [0.0, pytest.approx(0.5)]  # all three are a in 1 of 27
    assert summary.against(rival, ours)["difference"] == pytest.approx(-found["difference"])
    assert summary.against(ours, {3: {"a": 1.0}}) is None


def test_pairing_is_by_query_and_not_by_order():
    ids = [str(i) for i in range(50)]
    scores = dict(zip(ids, np.random.default_rng(0).integers(0, 2, 50).astype(float)))
    found = summary.against({0: scores}, {0: dict(reversed(scores.items()))})
    assert found["difference"] == 0 and found["ci95"] == [0.0, 0.0] and found["not_above"] == 1.0


def test_a_rival_that_scores_nothing_gives_no_relative_gain():
    found = summary.against({0: {"a": 1.0}}, {0: {"a": 0.0}})
    assert found["relative"] is None and found["difference"] == 1.0


def test_a_summary_names_the_best_rival_and_what_is_missing(tmp_path):
    made = {("sft", 0): make_results("sft", 0, mean=0.5), ("sft", 1): make_results("sft", 1, mean=0.5)}
    made |= {("dpo", 0): make_results("dpo", 0, mean=0.1), ("hyper_only", 0): make_results("hyper_only", 0, mean=1.0)}
    made |= {("metatuner_j", seed): make_results("metatuner_j", seed, mean=0.9) for seed in (0, 1)}
    found = summary.summarise(make_comparison(tmp_path / "c", made, ["sft", "dpo", "zero_shot", "hyper_only", "metatuner_j"]))
    assert found["best_rival"] == "sft" and found["best_metatuner"] == "metatuner_j"
    assert found["not_run"] == ["zero_shot-0", "dpo-1", "zero_shot-1", "hyper_only-1"]
    assert list(found["variants"]) == ["hyper_only", "metatuner_j", "sft", "dpo"]  # the best first
    ours, means = found["variants"]["metatuner_j"], [made["metatuner_j", seed]["after"]["mean"] for seed in (0, 1)]
    assert ours["mean"] == pytest.approx(np.mean(means)) and ours["sd"] == pytest.approx(np.std(means, ddof=1))
    rival = np.mean([made["sft", seed]["after"]["mean"] for seed in (0, 1)])
    assert ours["against"]["relative"] == pytest.approx(np.mean(means) / rival - 1) and ours["against"]["pairs"] == 80
    assert ours["ablations"]["hyper_only"]["difference"] == pytest.approx(means[0] - 1) and set(ours["ablations"]) == {"hyper_only"}
    text = tables.verdicts(found)
    assert f" Against its ablations: hyper_only (w/o P) {tables.percent(means[0] - 1, '+')} points [" in text
    assert ours["adapter"]["shuffled"] == pytest.approx(np.mean(means) / 2) and ours["learning_rate"] == 5e-4
    assert found["variants"]["dpo"]["sd"] is None and found["variants"]["sft"]["against"] is None
    assert found["wall_s"] == sum(results["wall_s"] for results in made.values())


# --- the grid ---


def test_a_grid_runs_once_and_is_then_done(root, runs, capsys):
    assert call("--methods", "sft,metatuner_j", "--seeds=0,1", "--config.train.num_steps=7") == 0
    assert runs.started == ["sft-0", "metatuner_j-0", "sft-1", "metatuner_j-1"]
    assert {path.name for path in (root / "work").iterdir()} == {
        *runs.started, *(f"{name}.log" for name in runs.started), "grid.json", "comparison.json", "comparison.png", "table.md",
    }  # fmt: skip
    saved = read("work/sft-1/config.json")["config"]
    assert (saved["method"], saved["seed"], saved["train"]["num_steps"]) == ("sft", 1, 7)
    output = capsys.readouterr().out
    assert "[1/4] sft-0, log in work/sft-0.log; left: 4 runs of a length not known yet" in output
    assert "[2/4] metatuner_j-0, log in work/metatuner_j-0.log; left: about 39 min (2 runs guessed from others)" in output
    assert "[4/4] metatuner_j-1, log in work/metatuner_j-1.log; left: about 19 min" in output  # as its own first
    assert "4 of 4 runs are done" in output and "| **metatuner_j** | 0, 1 |" in output
    assert read("work/comparison.json")["variants"]["sft"]["tokens"] == 123_456
    runs.started.clear()
    assert call("--methods", "sft,metatuner_j", "--seeds=0,1", "--config.train.num_steps=7") == 0
    assert runs.started == []


def test_all_methods_and_three_seeds_are_the_default(root, runs, capsys):
    assert call("--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * len(METHODS) + 1 and lines[0] == "  left  zero_shot-0: no run like it is done yet"
    assert lines[-1] == "0 of 33 runs are done; left: 33 runs of a length not known yet"
    assert not (root / "work").exists() and runs.started == []


def test_a_failed_run_is_named_and_the_others_still_run(root, runs, capfd):
    runs.failing.add("sft-0")
    assert call("--methods=sft,dpo", "--seeds=0") == 1
    output, error = capfd.readouterr()
    assert runs.started == ["sft-0", "dpo-0"] and error == "failed: sft-0\n"
    assert "  failed with exit code 1 after 0 s: failed: no luck\n" in output and "1 of 2 runs are done" in output
    assert read("work/comparison.json")["not_run"] == ["sft-0"]
    runs.failing.clear()
    assert call("--methods=sft,dpo", "--seeds=0") == 0
    assert runs.started == ["sft-0", "dpo-0", "sft-0"]


def test_a_grid_that_was_broken_off_goes_on(root, runs, capfd):
    runs.broken.add("dpo-0")
    assert call("--methods=sft,dpo,metatuner_j", "--seeds=0") == 130
    assert capfd.readouterr().err == "broken off: the same command goes on from here\n"
    assert call("--methods=sft,dpo,metatuner_j", "--seeds=0", "--plan") == 0
    assert capfd.readouterr().out.splitlines() == [
        "  done  sft-0: 35.0% in 13 min", "  left  dpo-0, begun: about 13 min", "  left  metatuner_j-0: about 13 min",
        "1 of 3 runs are done; left: about 26 min (2 runs guessed from others)",
    ]  # fmt: skip
    assert call("--methods=sft,dpo,metatuner_j", "--seeds=0") == 0
    assert runs.started == ["sft-0", "dpo-0", "dpo-0", "metatuner_j-0"]


def test_a_second_call_adds_methods_and_seeds_to_the_first(root, runs):
    assert call("--methods=sft", "--seeds=1") == 0
    assert call("--methods=dpo", "--seeds=0") == 0
    found = read("work/comparison.json")
    assert found["grid"]["variants"] == ["sft", "dpo"] and found["grid"]["seeds"] == [1, 0]
    assert set(found["variants"]) == {"sft", "dpo"} and found["not_run"] == ["dpo-1", "sft-0"]
    assert "--methods sft,dpo --seeds 1,0 --workdir runs/work" in found["grid"]["command"]


def test_the_learning_rate_is_chosen_on_validation_rows_for_each_method_that_learns(root, runs, capfd):
    arguments = ("--methods=zero_shot,sft,dpo", "--seeds=3,4", "--rates=1e-3,2e-4,5e-4")
    runs.failing.add("dpo-0.0005")
    assert call(*arguments) == 1
    assert runs.started[:6] == ["sft-0.001", "sft-0.0002", "sft-0.0005", "dpo-0.001", "dpo-0.0002", "dpo-0.0005"]
    assert runs.started[6:] == ["zero_shot-3", "sft-3", "dpo-3", "zero_shot-4", "sft-4", "dpo-4"]
    short = read("work/search/sft-0.001/config.json")["config"]
    assert (short["seed"], short["train"]["num_steps"], short["train"]["learning_rate"]) == (3, 25, 1e-3)
    rates = {name: read(f"work/{name}-4/config.json")["config"]["train"]["learning_rate"] for name in ("zero_shot", "sft", "dpo")}
    assert rates == {"zero_shot": 2e-4, "sft": 5e-4, "dpo": 1e-3}  # the config's own; the likelier of two equals; the better of two
    found = read("work/comparison.json")
    assert found["search"] == {"dpo": {"0.0002": 0.25, "0.001": 0.5}, "sft": {"0.0002": 0.25, "0.0005": 0.5, "0.001": 0.5}}
    table = pathlib.Path("work/table.md").read_text()
    assert found["at_edge"] == ["dpo"] and table.endswith("so that one beyond it may be better: dpo.\n")
    assert found["variants"]["zero_shot"]["learning_rate"] is None and found["variants"]["sft"]["learning_rate"] == 5e-4
    output, error = capfd.readouterr()
    assert "learning rate of sft: 0.0005, 50.0% of validation rows in 30 s" in output and error == "failed: search/dpo-0.0005\n"
    assert (
        "[4/6] search/dpo-0.001, log in work/search/dpo-0.001.log; left: about 2 min (3 runs guessed from others) and 6 runs"
        in output
    )
    runs.started.clear()
    assert call("--methods=zero_shot,sft", "--seeds=5", "--rates=1e-3,2e-4,5e-4") == 0
    assert runs.started == ["zero_shot-5", "sft-5"]  # the search is of the first seed, and stands


def test_a_method_without_any_rate_is_not_run(root, runs, capfd):
    runs.failing |= {"sft-0.001", "sft-0.002"}
    assert call("--methods=sft,dpo", "--seeds=0", "--rates=1e-3,2e-3") == 1
    assert runs.started[-1] == "dpo-0" and "sft-0" not in runs.started
    assert "sft with every seed (no run of its search for a learning rate ended)" in capfd.readouterr().err
    assert read("work/comparison.json")["not_run"] == ["sft-0"]


@pytest.mark.parametrize(
    "arguments, names, values",
    [
        (["--sweep=rollouts"], ["rollouts-2-0", "rollouts-4-0", "rollouts-8-0"], [2, 4, 8]),
        (["--sweep=share"], ["share-8-0", "share-15-0", "share-22-0"], [8, 15, 22]),
        (["--sweep=share", "--values=3,6", "--methods=metatuner_i"], ["share-3-0", "share-6-0"], [3, 6]),
    ],
)
def test_a_sweep_is_one_method_with_several_values(root, runs, monkeypatch, arguments, names, values):
    monkeypatch.setattr(job_lib, "of_model", lambda config, role, read: config_lib.ModelConfig("llama", 99, 30, 8, 8, 1, 1, 8))
    assert call(*arguments, "--seeds=0") == 0
    assert runs.started == names
    configs = [read(f"work/{name}/config.json")["config"] for name in names]
    section, leaf = compare.SWEEPS[arguments[0].partition("=")[2]].split(".")
    assert [config[section][leaf] for config in configs] == values
    assert {config["method"] for config in configs} == {"metatuner_i" if len(arguments) == 3 else "metatuner_j"}
    found = read("work/comparison.json")
    assert found["best_rival"] is None and [name.rsplit("-", 1)[0] for name in names] == found["grid"]["variants"]
    assert f"--sweep {arguments[0][8:]} --values {','.join(map(str, values))} --methods" in found["grid"]["command"]


# --- publishing ---


def test_each_run_is_published_as_it_ends(root, runs):
    runs.broken.add("dpo-0")
    arguments = ("--methods=sft,dpo", "--seeds=0", "--rates=1e-3", "--publish=results/mine")
    assert call(*arguments) == 130
    found = sorted(str(path.relative_to("results/mine")) for path in pathlib.Path("results/mine").rglob("*.*") if path.is_file())
    searched = [f"search/{name}-0.001/{file}.json" for name in ("dpo", "sft") for file in ("config", "results")]
    assert found == ["comparison.png", "grid.json", *searched, "sft-0/config.json", "sft-0/results.json"]
    for name in ("config.json", "results.json"):
        assert pathlib.Path("results/mine/sft-0", name).read_bytes() == pathlib.Path("work/sft-0", name).read_bytes()


def test_what_is_published_is_not_run_again_in_a_new_folder(root, runs):
    assert call("--methods=sft", "--seeds=0", "--publish=results/mine") == 0
    runs.started.clear()
    assert compare.main(["--config=config.py", "--workdir=other", "--methods=sft,dpo", "--seeds=0", "--publish=results/mine"]) == 0
    assert runs.started == ["dpo-0"]
    assert set(read("other/comparison.json")["variants"]) == {"sft", "dpo"}


def test_another_runs_results_are_never_replaced(root, runs, capfd):
    assert call("--methods=sft", "--seeds=0", "--publish=results/mine") == 0
    before = pathlib.Path("results/mine/sft-0/results.json").read_bytes()
    arguments = ["--config=config.py", "--methods=sft", "--seeds=0", "--publish=results/mine"]
    capfd.readouterr()
    assert compare.main([*arguments, "--workdir=other", "--config.train.num_steps=9"]) == 2
    error = capfd.readouterr().err
    assert_one_line(
        error, "--publish=results/mine: --publish=results/mine/sft-0 holds another run: train.num_steps=100 there, 9 here"
    )
    results = read("work/sft-0/results.json")
    files.write_json(root / "work" / "sft-0" / "results.json", {**results, "wall_s": 1.0})
    assert compare.main([*arguments, "--workdir=work"]) == 2
    assert_one_line(capfd.readouterr().err, "results/mine/sft-0/results.json is of another run", "delete one of the two")
    assert pathlib.Path("results/mine/sft-0/results.json").read_bytes() == before


# --- bad input ---


def assert_one_line(error, *texts):
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    for text in texts:
        assert text in error


BAD = {
    "unknown method": (
        ["--methods=sft,metatuner_k"],
        "--methods=sft,metatuner_k: 'metatuner_k' is not one of",
        "did you mean 'metatuner_",
    ),
    "bad seed": (["--seeds=0,one"], "--seeds=0,one: 'one' must be a whole number of at least 0"),
    "no seed": (["--seeds="], "--seeds='' names nothing"),
    "huge seed": (["--seeds=0,2147483648"], "seed=2147483648 must be at least 0 and below 2**31"),
    "bad rate": (["--rates=1e-3,fast"], "--rates=1e-3,fast: 'fast' must be a number above 0"),
    "rate of 0": (["--rates=0"], "'0' must be a number above 0"),
    "bad steps": (["--search_steps=1,2"], "--search_steps='1,2' must be one whole number"),
    "search of no step": (["--rates=1e-3", "--search_steps=0"], "train.num_steps=0 must be at least 1"),
    "unknown sweep": (["--sweep=shares"], "--sweep='shares' is not one of share, rollouts; did you mean 'share'?"),
    "values without a sweep": (["--values=1,2"], "--values is for --sweep"),
    "sweep of two methods": (["--sweep=rollouts", "--methods=sft,dpo"], "--methods=sft,dpo: a sweep is of one method"),
    "value of 0": (["--sweep=rollouts", "--values=0"], "rollout.num_prompts=0 must be at least 1"),
    "unknown option": (["--method=sft"], "argument '--method=sft' is unknown; did you mean --methods?"),
    "no value": (["--methods"], "argument --methods needs a value: --methods=VALUE"),
    "unknown setting": (["--config.train.num_step=3"], "config.train.num_step is unknown", "did you mean 'num_steps'?"),
    "method twice": (["--config.method=sft"], "--config.method is set by --methods"),
    "rate twice": (["--rates=1e-3", "--config.train.learning_rate=1"], "--config.train.learning_rate is set by --rates"),
    "published into itself": (["--publish=work"], "--publish=work is the --workdir"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_starts_nothing(case, root, runs, capfd):
    arguments, *texts = BAD[case]
    assert call(*arguments) == 2
    output, error = capfd.readouterr()
    assert output == "" and runs.started == []
    assert_one_line(error, *texts)
    assert [path.name for path in root.iterdir()] == ["config.py"]


@pytest.mark.parametrize(
    "arguments, texts",
    [
        ([], ["--config is missing: name a file with get_config(), or one that comes with this package, such as quickstart"]),
        (["--config=gone.py"], ["--config=gone.py is no file"]),
        (["--report", "--results=gone"], ["--results=gone is no folder"]),
    ],
)
def test_a_missing_file_ends_with_one_line(arguments, texts, root, runs, capfd):
    assert compare.main(arguments) == 2
    assert_one_line(capfd.readouterr().err, *texts)


def test_a_folder_of_another_comparison_is_refused(root, runs, capfd):
    assert call("--methods=sft", "--seeds=0") == 0
    assert call("--methods=dpo", "--seeds=0", "--config.train.num_steps=9") == 2
    assert_one_line(
        capfd.readouterr().err, "--workdir or --publish holds another comparison: settings={} there, {'train.num_steps': '9'} here"
    )
    assert call("--methods=sft", "--seeds=0", "--config.train.num_steps=9") == 2
    assert_one_line(capfd.readouterr().err, "--workdir=work/sft-0 holds another run: train.num_steps=100 there, 9 here")


def test_a_config_by_its_bare_name_is_saved_by_it(root, runs):
    """A path into where the package is installed means nothing on another machine."""
    assert compare.main(["--config=quickstart", "--methods=sft", "--seeds=0", "--workdir=work"]) == 0
    assert json.loads(pathlib.Path("work/grid.json").read_text())["config"] == "quickstart"


def test_the_comparison_needs_no_jax():
    program = "import sys; from experiments import compare; print(compare.main(['--help']), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False" and all(option in done.stdout for option in compare.OPTIONS)


# --- processes ---


def test_a_process_of_its_own_writes_its_log_and_gives_its_exit_code(tmp_path, monkeypatch):
    script = "import sys; print('hello', *sys.argv[1:]); print('oh', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(compare, "COMMAND", (sys.executable, "-c", script))
    assert compare.start(["a b", "c"], str(tmp_path / "logs" / "run.log")) == 3
    assert sorted((tmp_path / "logs" / "run.log").read_text().splitlines()) == ["hello a b c", "oh"]
    assert compare.last_line(tmp_path / "none.log") == "it said nothing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_comparison_ends_its_run(number, tmp_path):
    program = (
        "import signal, sys; from experiments import compare\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background was told to ignore it
        f"compare.COMMAND = (sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)')\n"
        "sys.exit(compare.main(['--config=experiments/configs/quickstart.py', '--methods=metatuner_j', '--seeds=0',"
        f" '--workdir', {str(tmp_path / 'w')!r}]))\n"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log, until = tmp_path / "w" / "metatuner_j-0.log", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    ours.send_signal(number)
    _, error = ours.communicate(timeout=60)
    assert ours.returncode == 130 and error == "broken off: the same command goes on from here\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


# --- the report ---


def test_results_md_is_what_the_report_writes():
    assert (REPOSITORY / "RESULTS.md").read_text(encoding="utf-8") == tables.write(REPOSITORY / "results"), (
        "RESULTS.md differs from results/: python -m experiments.compare --report"
    )


@pytest.mark.parametrize("path", sorted((REPOSITORY / "results").glob("*/grid.json")), ids=lambda path: path.parent.name)
def test_the_command_of_a_published_comparison_goes_on_with_it(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(json.loads(path.read_text())["command"])[3:]
    words[words.index("--workdir") + 1] = str(tmp_path / "w")
    assert compare.main([*words, "--plan"]) == 0, capsys.readouterr().err


@pytest.fixture
def results(tmp_path):
    """A folder with a comparison of three methods and a single run of an older form, without scores and cost."""
    made = {("metatuner_j", seed): make_results("metatuner_j", seed, mean=0.9) for seed in (0, 1)}
    made |= {("sft", seed): make_results("sft", seed, mean=0.4) for seed in (0, 1)} | {
        ("zero_shot", 0): make_results("zero_shot", 0)
    }
    folder = make_comparison(tmp_path / "results" / "words", made)
    write_run(folder / "search" / "sft-0.0005", {"validation": {"mean": 0.75}, "wall_s": 60.0, "method": "sft"})
    old = make_results("metatuner_j", 0)
    write_run(
        tmp_path / "results" / "single", {key: value for key, value in old.items() if key not in ("scores", "cost", "validation")}
    )
    (tmp_path / "results" / "empty").mkdir()
    return tmp_path / "results"


def test_the_report_holds_scores_costs_controls_and_what_was_not_run(results, capsys):
    assert compare.main(["--report", "--results", str(results)]) == 0
    text = (results.parent / "RESULTS.md").read_text()
    found = summary.summarise(results / "words")
    ours = found["variants"]["metatuner_j"]
    a, percent = ours["against"], tables.percent
    row = (
        f"| **metatuner_j** | 0, 1 | 0.0005 | 12.5 | {percent(ours['mean'])} | {percent(ours['sd'])} | "
        f"{tables.bounds(ours['ci95'])} | {percent(a['relative'], '+')} | {percent(a['difference'], '+')} | "
        f"{tables.bounds(a['ci95'])} | 0.000 |"
    )
    half, quarter = percent(ours["mean"] / 2), percent(ours["mean"] / 4)
    for part in (
        "\n    python -m experiments.compare --config c.py\n", row, "a cpu; 1 x cpu;", "**Not run**: zero_shot-1.",
        "| metatuner_j | 34.8 million | 1,350 | 123,456 | 8 min | 19 min |",
        f"| metatuner_j | {percent(ours['mean'])} | {half} | {quarter} | {percent(ours['mean'] / 8)} |", "| 3 of 40 | 75.0 |",
        "\n| sft | 75.0 |", f"- **metatuner_j beats sft**, the best rival: {percent(a['difference'], '+')} points",
        "not less than the 10% that it aims at.", f"Another query's adapter in place of its own costs {half} points",
        f"| [words](#words) | metatuner_j {percent(ours['mean'])} | sft ", "| `single` | jsonl, metatuner_j, seed 0 |",
    ):  # fmt: skip
        assert part in text, part
    assert "\n| sft |" not in tables.control_table(found)
    assert "comparison.png" not in text and "empty" not in text
    (results / "words" / "comparison.png").write_bytes(b"")
    assert "![Scores and costs](results/words/comparison.png)" in tables.write(results)
    assert text != tables.write(results) and tables.write(results) == tables.write(results)


def test_runs_without_scores_or_cost_show_dashes(tmp_path):
    made = {("sft", 0): make_results("sft", 0), ("metatuner_j", 0): make_results("metatuner_j", 0)}
    for results in made.values():
        for name in ("scores", "cost", "before"):
            del results[name]
    figures = summary.summarise(make_comparison(tmp_path / "c", made, seeds=(0,)))
    assert figures["variants"]["metatuner_j"]["ci95"] is None and figures["variants"]["metatuner_j"]["against"] is None
    mean = tables.percent(figures["variants"]["metatuner_j"]["mean"])
    assert f"| **metatuner_j** | 0 | 0.0005 | – | {mean} | – | – | – | – | – | – |" in tables.score_table(figures)
    assert "| sft | – | – | – | – | 13 min |" in tables.cost_table(figures)
    assert "they have no scored query in common" in tables.verdicts(figures)
    tables.draw(figures, tmp_path / "plot.png")


@pytest.mark.parametrize(
    "ours, rival, text",
    [
        (1.0, 0.5, "**metatuner_j beats sft**"),
        (0.2, 0.9, "**metatuner_j loses to sft**"),
        (0.5, 0.5, "**metatuner_j cannot be told from sft**"),
    ],
)
def test_the_verdict_is_plain(ours, rival, text, tmp_path):
    made = {("metatuner_j", 0): make_results("metatuner_j", 0, mean=ours), ("sft", 0): make_results("sft", 0, mean=rival)}
    verdict = tables.verdicts(summary.summarise(make_comparison(tmp_path / "c", made, seeds=(0,))))
    assert text in verdict and ("aims at" in verdict) == (ours > rival)


def test_a_mixture_shows_its_parts(tmp_path):
    parts = {"words": {"after": {"mean": 0.75}}, "dates": {"after": {"mean": 0.25}}}
    made = {("sft", 0): make_results("sft", 0, parts=parts), ("metatuner_j", 0): make_results("metatuner_j", 0)}
    text = tables.part_table(summary.summarise(make_comparison(tmp_path / "c", made, seeds=(0,))))
    assert "| after, on | words | dates |" in text and "| sft | 75.0 | 25.0 |" in text and "| metatuner_j | – | – |" in text


def test_notes_take_their_figures_from_the_runs(results):
    (results / "words" / "notes.md").write_text(
        "MetaTuner-J: {metatuner_j.after}; {best_rival}: {best_rival.after}; goal {goal}, as a 95% interval."
    )
    figures = summary.summarise(results / "words")
    ours, rival = (tables.percent(figures["variants"][name]["mean"]) for name in ("metatuner_j", "sft"))
    assert f"\n\nMetaTuner-J: {ours}%; sft: {rival}%; goal 10%, as a 95% interval.\n\n" in tables.write(results)
    assert tables.fill("{metatuner_j.adapter.none} {sft.actor_calls}", figures, "n") == (
        f"{tables.percent(figures['variants']['metatuner_j']['adapter']['none'])}% 450"
    )


@pytest.mark.parametrize(
    "notes, texts",
    [
        ("{metatuner_j.aftr}", ["notes.md: placeholder {metatuner_j.aftr} is unknown; did you mean 'metatuner_j.after'?"]),
        ("It reaches 95.5%.", ["notes.md: '95.5%' is typed by hand: write a placeholder such as {metatuner_j.after}"]),
    ],
)
def test_notes_with_a_wrong_or_typed_figure_are_refused(notes, texts, results, capfd):
    (results / "words" / "notes.md").write_text(notes)
    assert compare.main(["--report", "--results", str(results)]) == 2
    assert_one_line(capfd.readouterr().err, *texts)
    assert not (results.parent / "RESULTS.md").exists()


def test_figures_read_well():
    assert [tables.percent(x) for x in (None, 0.9549, -0.0001)] == ["–", "95.5", "0.0"]
    assert [tables.number(x) for x in (None, 0, 1234.4, 34_800_000)] == ["–", "0", "1,234", "34.8 million"]
    assert [tables.duration(x) for x in (None, 45, 100, 1010, 11_100)] == ["–", "45 s", "2 min", "17 min", "3 h 05 min"]
