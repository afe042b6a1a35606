"""The benchmark: every part runs and is counted rightly, ratios are of the fastest types, mistakes are one line."""

import dataclasses
import json
import math

import pytest
from conftest import save_model

from experiments import bench
from metatuner_jax.config import ModelConfig

MODEL = ModelConfig("llama", vocab_size=11, num_layers=2, width=6, ff_width=10, num_heads=3, num_kv_heads=1, head_width=4)


def test_every_part_of_a_real_folder_is_measured(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ceilings", lambda dtype: {"flops_per_s": 1e12, "bytes_per_s": 1e11})  # of the machine, and slow to find
    names = [name for name in bench.PARTS if name not in ("generator_separate", "actor_forward", "step_straight_through")]  # as the others are
    arguments = ["--model", str(tiny_model), "--parts", ",".join(names), "--dtypes", "float32", "--batch_size", "2", "--rounds", "1", "--children", "0"]
    assert bench.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    parts = found["parts"]["float32"]
    assert {*parts} == {*names}
    for name, part in parts.items():
        assert 0 < part["least_s"] <= part["median_s"] <= part["most_s"] and part["compile_s"] > 0, name
        assert part["share_of_product"] == pytest.approx(part["flops_per_s"] / 1e12)
        assert part["share_of_copy"] == pytest.approx(part["bytes_per_s"] / 1e11) and part["share_of_copy"] > 0
        assert part["peak_bytes"] >= part["temporary_bytes"]
    assert parts["decode"]["tokens_per_s"] == pytest.approx(32 * 64 / parts["decode"]["median_s"])
    assert found["ratios"] == {
        "per_row_lora": parts["actor_lora_per_row"]["median_s"] / parts["actor_lora_shared"]["median_s"]
    }
    assert {"jax", "flax"} <= {*found["versions"]} and found["machine"]["host"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*names, *found["ratios"]))


@pytest.mark.parametrize("where", ["when it is compiled", "in its second round"])
def test_what_was_measured_before_a_part_fails_is_on_disk(tiny_model, tmp_path, monkeypatch, where):
    monkeypatch.setattr(bench, "ceilings", lambda dtype: {"flops_per_s": 1e12, "bytes_per_s": 1e11})
    hypernetwork = bench.PARTS["hypernetwork"]

    def make(work):
        part, runs = hypernetwork(work), []

        def run():
            runs.append(len(runs))
            if where == "when it is compiled" or len(runs) > 2:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

        if where == "when it is compiled":
            run()
        return dataclasses.replace(part, run=run)

    monkeypatch.setitem(bench.PARTS, "rollout", make)
    arguments = ["--model", str(tiny_model), "--parts", "hypernetwork,rollout", "--dtypes", "float32", "--batch_size", "2", "--children", "0"]
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        bench.main([*arguments, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "bench.json").read_text())
    rounds = {name: part["rounds"] for name, part in found["parts"]["float32"].items()}
    assert rounds == ({"hypernetwork": 1} if where == "when it is compiled" else {"hypernetwork": 1, "rollout": 1})
    assert found["parts"]["float32"]["hypernetwork"]["median_s"] > 0 and found["settings"]["batch_size"] == 2


def test_operations_are_those_of_the_products():
    layer = 6 * 12 + 2 * 6 * 4 + 12 * 6 + 3 * 6 * 10  # q, k and v, o, feed-forward
    scores_and_mix = 2 * 2 * 7 * 3 * 4
    assert bench.pass_flops(MODEL, rows=5, read=9, seen=7, scored=3) == 5 * (2 * 9 * (2 * layer + scores_and_mix) + 3 * 2 * 11 * 6)


def test_ratios_take_each_side_in_the_type_in_which_it_is_fastest():
    seconds = lambda **parts: {name: {"median_s": value} for name, value in parts.items()}
    found = {
        "parts": {
            "float32": seconds(step_lora=4.0, decode=1.0, actor_lora_per_row=9.0, actor_lora_shared=5.0),
            "bfloat16": seconds(step_lora=2.0, decode=3.0, actor_lora_per_row=4.4, actor_lora_shared=4.0),
        },
        "torch": {
            "float32": seconds(torch_step_lora=5.0, torch_decode=2.0, torch_sample=2.0, torch_generate=4.0),
            "bfloat16": seconds(torch_step_lora=6.0, torch_decode=1.5, torch_sample=3.3, torch_generate=3.0),
        },
        "memory": {"ours": 2, "torch": 5},
        "starts": {"first": {"lower_s": 3.0, "compile_s": 13.0}, "second": {"lower_s": 3.0, "compile_s": 1.0}},
    }
    assert bench.ratios(found) == pytest.approx(
        {"step_lora": 2.5, "decode": 1.5, "per_row_lora": 1.1, "torch_sampling": 1.1, "memory": 0.4, "second_start": 0.25}
    )


def test_a_second_process_takes_the_step_from_the_first_ones_cache_which_holds_no_weights(tmp_path):
    folder = save_model(tmp_path / "wide", vocab_size=60_000)  # 5.8 MB of random numbers
    given = bench.parse(["--model", str(folder), "--batch_size", "2"])
    found = bench.starts(given, "float32")
    assert 0 < found["entry_bytes"] < 5e6
    assert all(math.isfinite(value) and value > 0 for start in (found["first"], found["second"]) for value in start.values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--parts", "decodee"], "--parts: 'decodee' is none of"),
        (["--dtypes", "float16"], "--dtypes: 'float16' is neither float32 nor bfloat16"),
        (["--model", "nowhere/at/all"], "--model='nowhere/at/all' cannot be used"),
        (["--rounds", "0"], "--rounds=0 must be at least 1"),
        (["--query_tokens", "0"], "--query_tokens=0 must be at least 1"),
        (["--model", "smollm2-135m", "--query_tokens", "9000"], "--query_tokens=9000 is more than smollm2-135m has positions for, beside template and prompt: 8134 at most"),
    ],
)
def test_mistakes_end_with_one_line(arguments, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([*arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_ratios_of_a_run_that_was_stopped_are_of_what_both_sides_have():
    of = lambda **seconds: {name: {"median_s": value} for name, value in seconds.items()}
    ours = {"float32": of(step_lora=4.0, step_straight_through=5.0, decode=2.0), "bfloat16": of(step_lora=1.0)}
    found = {"parts": ours, "torch": {"float32": of(torch_step_lora=6.0), "bfloat16": {}}}
    assert bench.ratios(found) == {"step_lora": 6.0, "straight_through": 1.25}
