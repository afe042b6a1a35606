"""Tests of `tasks`: rows, their split, scoring, and the messages for what cannot be used."""

import gzip
import json
import re
import subprocess
import sys

import pytest

from metatuner_jax import tasks
from metatuner_jax.config import TaskConfig
from metatuner_jax.tasks import Example, gsm8k, jsonl, reasoning_gym, rows


def write(path, lines):
    """Writes text lines or objects, one a line, and returns the path as text."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return str(path)


def questions(prefix, num):
    return [{"question": f"{prefix} {i}?", "answer": f"{i}"} for i in range(num)]


def keys(examples):
    return {rows.query_key(example.query) for example in examples}


def refused(task, *parts):
    """Asserts that the task is refused in one line that holds every part."""
    with pytest.raises(ValueError) as caught:
        tasks.load(task, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- reasoning-gym ---


def test_reasoning_gym_splits_take_seed_ranges_of_their_own():
    import reasoning_gym as library

    task = TaskConfig("reasoning_gym:word_sequence_reversal", num_train=7, num_validation=3, num_test=5, options={"min_words": 4})
    loaded = tasks.load(task, seed=11)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (7, 3, 5)
    for split, offset in (("train", 0), ("validation", 10**8), ("test", 2 * 10**8)):
        dataset = library.create_dataset("word_sequence_reversal", min_words=4, seed=11 + offset, size=10)
        for i, example in enumerate(getattr(loaded, split)):
            assert example.id == f"{split}-{i}"
            assert example.query == dataset[i]["question"].strip()
            assert example.answer == example.reference == dataset[i]["answer"]


def test_reasoning_gym_is_the_same_for_a_seed_and_another_for_another():
    task = TaskConfig("reasoning_gym:spell_backward", num_train=20, num_validation=5, num_test=5)
    one, again, other = (tasks.load(task, seed=seed) for seed in (3, 3, 4000))
    assert (one.train, one.validation, one.test) == (again.train, again.validation, again.test)
    assert one.train != other.train


def test_reasoning_gym_draws_anew_what_was_in_train_and_counts_it():
    task = TaskConfig("reasoning_gym:coin_flip", num_train=60, num_validation=20, num_test=40)
    loaded = tasks.load(task, seed=0)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (60, 20, 40)
    assert loaded.dropped["test_in_train"] > 0 and loaded.dropped["validation_in_train"] > 0
    assert not keys(loaded.test) & keys(loaded.train + loaded.validation)
    assert not keys(loaded.validation) & keys(loaded.train)
    assert int(loaded.test[-1].id.removeprefix("test-")) == 39 + loaded.dropped["test_in_train"]
    assert len({example.id for example in loaded.train + loaded.validation + loaded.test}) == 120


def test_reasoning_gym_stops_where_a_task_has_no_more_questions():
    task = TaskConfig("reasoning_gym:tower_of_hanoi", num_train=300, num_validation=100, num_test=10, options={"max_disks": 3})
    refused(task, "task.num_validation=100", "3000 rows", "task.num_train=300")


def make_example(name, index=0, **options):
    task = TaskConfig(f"reasoning_gym:{name}", num_train=index + 1, num_validation=1, num_test=1, options=options)
    loaded = tasks.load(task, seed=5)
    return loaded.score, loaded.train[index]


@pytest.mark.parametrize(
    "name", ["word_sequence_reversal", "spell_backward", "number_filtering", "color_cube_rotation", "simple_integration"]
)
def test_reasoning_gym_scores_a_gold_answer_in_odd_clothes(name):
    score, example = make_example(name)
    gold = example.answer
    assert score(gold, example) == score(f"  {gold}\n", example) == tasks.Score(1, 1)
    for text in (
        f"The answer is {gold}.", f"**Answer:** {gold}", f"Answer:\n{gold}", f"First I turn it round.\n\n{gold}", f"<answer>{gold}</answer>",
        f"So we get \\boxed{{{gold}}} in the end.", f"**{gold}**", f'"{gold}"', f"The final result: {gold}",
        f"{gold}\n\nTo get there, I took all that was given and did what was asked, one thing after another, as one does, with care.",
    ):  # fmt: skip
        assert score(text, example) == tasks.Score(0, 1), text


@pytest.mark.parametrize(
    "name", ["word_sequence_reversal", "spell_backward", "number_filtering", "gsm_symbolic", "fraction_simplification"]
)
def test_reasoning_gym_passes_no_text_that_only_holds_the_answer(name):
    score, example = make_example(name)
    gold = example.answer
    for text in (
        "", " \n", "I do not know", f"It is {gold} or it is not", f"{gold} or zebra", f"zebra, {gold}, horse and cow", f"{gold}\nzebra\nhorse",
        f"<answer>{gold}</answer> no, <answer>zebra</answer>", f"The answer is {gold}. No, the answer is zebra.", gold[: len(gold) // 2],
    ):  # fmt: skip
        assert score(text, example) == tasks.Score(0, 0), text


def test_part_marks_are_no_marks():
    import reasoning_gym as library

    score, example = make_example("color_cube_rotation")
    assert library.create_dataset("color_cube_rotation", seed=0).score_answer("plaid", example.source) > 0
    assert score("plaid", example) == tasks.Score(0, 0)


def test_a_verifier_that_takes_any_text_passes_only_the_answer():
    score, example = make_example("game_of_life_halting")
    assert score(example.answer, example) == tasks.Score(1, 1)
    assert score(str(example.answer != "True"), example) == score("?", example) == tasks.Score(0, 0)


def test_a_verifier_that_raises_means_a_wrong_answer():
    score, example = make_example("prime_factorization")
    assert score(example.answer, example) == tasks.Score(1, 1)
    assert score("I don't know", example) == tasks.Score(0, 0)


@pytest.mark.parametrize("name", sorted(reasoning_gym._HARMLESS))
def test_no_verifier_runs_an_answer_as_code(name, tmp_path):
    score, example = make_example(name)
    assert score(example.answer, example) == tasks.Score(1, 1)
    path = tmp_path / "made"
    code = f"open({str(path)!r}, 'w').close()"
    for text in (code, f"[{code}]", f"x + {code}", "9**9**9**9", "((9**99)**99)**99", "(" * 200, "9" * 200 + "!"):
        assert score(text, example) == score(f"The answer is {text}", example) == tasks.Score(0, 0)
    assert not path.exists()


def test_an_answer_in_another_form_passes_where_it_is_worth_the_same():
    score, example = make_example("simple_integration")
    swapped = " + ".join(["C", example.answer.removesuffix(" + C")])
    assert swapped != example.answer and score(swapped, example) == tasks.Score(1, 1)


def test_reasoning_gym_settings_are_checked_against_its_own_fields():
    spell = "reasoning_gym:spell_backward"
    refused(
        TaskConfig("reasoning_gym:spell_backwards"), "task.name='reasoning_gym:spell_backwards'", "did you mean 'spell_backward'?"
    )
    refused(TaskConfig("reasoning_gym"), "task.name='reasoning_gym'", "reasoning_gym:<name>")
    refused(TaskConfig(spell, options={"min_word_length": 3}), "task.options.min_word_length=3", "did you mean 'min_word_len'?")
    refused(TaskConfig(spell, options={"min_word_len": "three"}), "task.options.min_word_len='three' must be a whole number")
    refused(TaskConfig(spell, options={"min_word_len": True}), "task.options.min_word_len=True must be a whole number")
    refused(TaskConfig(spell, options={"min_word_len": 30}), "'min_word_len': 30", "max_word_len must be >= min_word_len")
    refused(TaskConfig(spell, options={"seed": 3}), "task.options.seed=3", "config.seed")
    refused(TaskConfig(spell, test="rows.jsonl"), "task.test='rows.jsonl'", "leave it none")
    refused(TaskConfig("reasoning_gym:rubiks_cube"), "task.name='reasoning_gym:rubiks_cube'", "no written answers")


def test_reasoning_gym_takes_names_with_commas_between():
    task = TaskConfig(
        "reasoning_gym:calendar_arithmetic",
        num_train=5,
        num_validation=1,
        num_test=1,
        options={"tasks": "is_leap_year, count_days"},
    )
    kinds = {example.source["metadata"]["task"] for example in tasks.load(task, seed=1).train}
    assert kinds <= {"is_leap_year", "count_days"}


# --- GSM8K ---


@pytest.mark.parametrize(
    "text, gold, strict, flexible",
    [
        ("48 + 24 = 72\n#### 72", "72", 1, 1),
        ("#### 1,200", "1200", 1, 1),
        ("#### -5", "-5", 1, 1),
        ("#### 72\nand then 3 more", "72", 1, 1),
        # what SmolLM2-135M wrote: right, wrong in the right form, and running in a circle up to the length limit
        ("If Peter has 42 dollars for the week, he can go to the movies 42/12 = 3 times.\n#### 3", "3", 1, 1),
        ("He needs to pay 16 * 5 = $72.\n#### 72", "64", 0, 0),
        ("The robe takes 512 * 2 = 1024 bolts of blue fiber.\nThe robe takes 1024 * 2 = 2248 bolts", "3", 0, 0),
        ("The answer is 72.", "72", 0, 1),
        ("So she pays $1,200.00", "1200", 0, 1),
        ("#### $12", "12", 0, 1),
        ("#### 12.00", "12", 0, 1),
        ("####12", "12", 0, 1),
        (r"\boxed{12}", "12", 0, 1),
        (r"\boxed{1{,}200}", "1200", 0, 1),
        ("it grew by 15%", "15", 0, 1),
        ("12kg", "12", 0, 1),
        ("-$5", "-5", 0, 1),
        ("\N{MINUS SIGN}5", "-5", 0, 1),
        ("10-3=7", "7", 0, 1),
        ("from 10-3", "3", 0, 1),
        ("it is ...5", "5", 0, 1),
        (".5", "0.5", 0, 1),
        ("1/2", "0.5", 0, 1),
        ("#### 73\n#### 72", "72", 0, 1),
        ("#### 720", "72", 0, 0),
        ("72 of 100", "72", 0, 0),
        ("7 2", "72", 0, 0),
        ("72.5", "72", 0, 0),
        ("7,2", "72", 0, 0),
        ("5", "-5", 0, 0),
        ("-5", "5", 0, 0),
        ("3/4", "4", 0, 0),
        ("4/0", "4", 0, 0),
        ("1,2000", "12000", 0, 0),
        ("1" * 5000, "1", 0, 0),
        ("seventy-two", "72", 0, 0),
        ("", "72", 0, 0),
    ],
)
def test_gsm8k_scores(text, gold, strict, flexible):
    assert gsm8k.score(text, Example("x", "q", "a", gold, gold)) == tasks.Score(strict, flexible)


def write_gsm8k(folder, num_train=9, num_test=4):
    for split, num in (("train", num_train), ("test", num_test)):
        answers = [f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}" for i in range(num)]
        write(folder / f"{split}.jsonl.gz", [{"question": f"{split} {i}", "answer": a} for i, a in enumerate(answers)])
    return str(folder)


def test_gsm8k_reads_a_folder_and_keeps_the_reasoning(tmp_path):
    loaded = tasks.load(TaskConfig("gsm8k", train=write_gsm8k(tmp_path), num_validation=2), seed=0)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (7, 2, 4)
    example = loaded.test[3]
    assert (example.id, example.query, example.reference) == ("test-3", "test 3", "6")
    assert example.answer == "It is 3+3=6.\n#### 6"
    assert "####" in loaded.initial_prompt
    assert all(loaded.score(e.answer, e) == tasks.Score(1, 1) for e in loaded.train)


def test_gsm8k_refuses_an_answer_without_its_mark(tmp_path):
    path = write(tmp_path / "train.jsonl", [{"question": "q", "answer": "#### 3"}, {"question": "q", "answer": "#### three"}])
    refused(TaskConfig("gsm8k", train=path, test=path), f"{path}:2", "'answer'", "####")


def test_gsm8k_knows_how_many_rows_the_hub_has():
    for task, part in (
        (TaskConfig(num_test=1320), "task.num_test=1320"),
        (TaskConfig(num_train=7410), "task.num_train=7410"),
        (TaskConfig(options={"metric": "number"}), "task.options.metric='number'"),
        (TaskConfig("gsm8l"), "task.name='gsm8l' is not one of"),
        (TaskConfig("gsm8l"), "did you mean 'gsm8k'?"),
        (TaskConfig("gsm8k:main"), "task.name='gsm8k:main'"),
    ):
        with pytest.raises(ValueError) as caught:
            tasks.check(task)
        assert part in str(caught.value)
    tasks.check(TaskConfig(num_test=1319, num_train=7409))


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\n(a long story)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused(TaskConfig("gsm8k"), "task.train='openai/gsm8k'", "Couldn't reach the hub (a long story)", "give a path")


# --- a user's own rows ---


def test_validation_is_cut_from_train_by_the_seed(tmp_path):
    task = TaskConfig(
        "jsonl",
        write(tmp_path / "a.jsonl", questions("a", 30)),
        test=write(tmp_path / "b.jsonl", questions("b", 5)),
        num_validation=6,
    )
    one, again, other = (tasks.load(task, seed=seed) for seed in (1, 1, 2))
    assert one == again and one.validation != other.validation
    assert (len(one.train), len(one.validation), len(one.test)) == (24, 6, 5)
    everything = one.train + one.validation + one.test
    assert len({example.id for example in everything}) == len(keys(everything)) == 35
    for example in one.train + one.validation:  # an id is the row's place in its file
        assert example.query == f"a {example.id.removeprefix('train-')}?"


def test_fewer_train_rows_are_part_of_more(tmp_path):
    path = write(tmp_path / "a.jsonl", questions("a", 30))
    few, more = (tasks.load(TaskConfig("jsonl", path, num_train=n, num_validation=6, num_test=4), seed=1) for n in (5, 15))
    assert set(few.train) < set(more.train) and (few.validation, few.test) == (more.validation, more.test)
    assert len(few.train) == 5 and len(few.test) == 4
    assert not keys(more.train) & keys(more.validation + more.test) and not keys(more.validation) & keys(more.test)


def test_rows_met_in_train_are_dropped_and_counted(tmp_path):
    task = TaskConfig(
        "jsonl",
        write(tmp_path / "train.jsonl", questions("a", 6) + questions("a", 2)),
        write(tmp_path / "validation.jsonl", questions("v", 3) + questions("a", 1)),
        write(
            tmp_path / "test.jsonl",
            [{"question": "  a \n 3?", "answer": "3"}, *questions("v", 2), *questions("t", 2), *questions("t", 1)],
        ),
        num_validation=3,
    )
    loaded = tasks.load(task, seed=0)
    assert loaded.dropped == {"validation_in_train": 1, "test_in_train": 3}
    assert [example.id for example in loaded.test] == ["test-3", "test-4", "test-5"]  # a query met twice within test stays
    assert len(loaded.train) == 8 and len(loaded.validation) == 3


def test_what_is_cut_from_train_is_met_there_only_once(tmp_path):
    path = write(tmp_path / "train.jsonl", questions("a", 20) + questions("a", 8))
    for seed in range(5):
        loaded = tasks.load(TaskConfig("jsonl", path, num_validation=5, num_test=4), seed=seed)
        assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (19, 5, 4)
        assert not keys(loaded.train) & keys(loaded.validation + loaded.test)


def test_more_rows_than_there_are_is_an_error_that_counts_them(tmp_path):
    a, b = write(tmp_path / "a.jsonl", questions("a", 10)), write(tmp_path / "b.jsonl", questions("b", 5) + questions("a", 1))
    refused(TaskConfig("jsonl", a, test=b, num_train=9, num_validation=3), "task.num_train=9", "7")
    refused(TaskConfig("jsonl", a, test=b), "task.num_validation=64", "10 rows")
    c = write(tmp_path / "c.jsonl", questions("c", 4))
    refused(TaskConfig("jsonl", a, b, c, num_validation=6), "task.num_validation=6", "5 rows", "1 were dropped")
    refused(TaskConfig("jsonl", a, test=b, num_test=6, num_validation=3), "task.num_test=6", "5 rows", "1 were dropped")
    refused(TaskConfig("jsonl", a, test=a, num_validation=3), f"task.test='{a}'", "all its 10 queries")
    refused(TaskConfig("jsonl", a, num_validation=3), "task.test=none", "task.num_test")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_json_lines_keep_text_as_it_is_written(tmp_path, suffix):
    lines = [{"prompt": f"q{i}", "label": text} for i, text in enumerate(["007", "2020-01-01", "null", "line\u2028break", "1e5"])]
    path = write(tmp_path / f"rows{suffix}", ["\ufeff" + json.dumps(lines[0]), "", *lines[1:]])
    task = TaskConfig("jsonl", path, num_validation=1, num_test=1, options={"question": "prompt", "answer": "label"})
    loaded = tasks.load(task, seed=0)
    answers = {example.id: example.answer for example in loaded.train + loaded.validation + loaded.test}
    assert answers == {f"train-{i}": line["label"] for i, line in enumerate(lines)}


def test_csv_values_stay_text(tmp_path):
    path = write(
        tmp_path / "rows.csv",
        ["question,answer,n", "q0,007,1", "q1,2020-01-01,2", "q2,NA,3", '"q3, and\nmore","a ""b""",', "q4,true,5"],
    )
    loaded = tasks.load(TaskConfig("jsonl", path, num_validation=1, num_test=1), seed=0)
    answers = {example.query: example.answer for example in loaded.train + loaded.validation + loaded.test}
    assert answers == {"q0": "007", "q1": "2020-01-01", "q2": "NA", "q3, and\nmore": 'a "b"', "q4": "true"}


def test_a_folder_is_split_by_file_name(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    for split, shard in (("train", 0), ("train", 1), ("test", 0)):
        table = pyarrow.table({"question": [f"{split} {shard} {i}" for i in range(4)], "answer": ["007", "2020-01-01", "x", "y"]})
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{split}-0000{shard}-of-00002.parquet")
    loaded = tasks.load(TaskConfig("jsonl", str(tmp_path), num_validation=2), seed=0)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (6, 2, 4)
    assert [example.answer for example in loaded.test] == ["007", "2020-01-01", "x", "y"]
    refused(TaskConfig("jsonl", str(tmp_path), validation=str(tmp_path)), f"task.validation='{tmp_path}'", "'validation'")


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    "line, parts",
    [
        ('{"question": "q", "answer"', ["not a line of JSON"]),
        ('[{"question": "q", "answer": "a"}]', ["a list", "one {...} a line"]),
        ("[", ["not a line of JSON", "not one array"]),
        ("[" * 100000, ["not a line of JSON"]),
        ('"q"', ["a str, not an object"]),
        ({"questoin": "q", "answer": "a"}, ["no field 'question'", "did you mean 'questoin'?", "task.options.question"]),
        ({"question": "q"}, ["no field 'answer'", "task.options.answer"]),
        ({"question": "q", "answer": 42}, ["'answer' is 42 (int)", '"42"']),
        ({"question": "q", "answer": None}, ["'answer' is null (NoneType)"]),
        ({"question": "q", "answer": ["a", "b"]}, ['\'answer\' is ["a", "b"] (list)']),
        ({"question": " \n", "answer": "a"}, ["'question' is empty"]),
        ({"question": "q", "answer": ""}, ["'answer' is empty"]),
        ('{"question": "\\ud800", "answer": "a"}', ["'question'", "surrogate"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, parts):
    path = write(tmp_path / "rows.jsonl", [GOOD, "", line])
    refused(TaskConfig("jsonl", path, num_test=1), f"{path}:3: ", *parts)


def test_a_bad_file_is_named(tmp_path):
    def load(path, *parts, **options):
        refused(TaskConfig("jsonl", str(path), num_test=1, options=options), *parts)

    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "caf\xe9", "answer": "a"}\n')
    load(latin, f"{latin}:2", "not UTF-8")
    empty = write(tmp_path / "empty.jsonl", [])
    load(empty, f"task.train='{empty}'", "no rows")
    short = tmp_path / "short.jsonl.gz"
    short.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:40])
    load(short, str(short), "cannot be read")
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(GOOD))
    load(plain, str(plain), "cannot be read")
    load(tmp_path / "none.jsonl", "task.train='", "none.jsonl'", "no such file")
    load(write(tmp_path / "rows.txt", [GOOD]), "rows.txt'", ".jsonl")
    load(write(tmp_path / "a.csv", ["question,answer", "q,a", "q,a,b"]), "a.csv:3", "3 values for the 2 columns")
    load(write(tmp_path / "b.csv", ["question,reply", "q,a"]), "b.csv:2", "no field 'answer'", "'reply'")
    load(write(tmp_path / "c.csv", ["question,answer", 'q,"a"b']), "c.csv:2", "not a line of CSV")
    load(write(tmp_path / "d.parquet", ["no"]), "d.parquet", "not a Parquet file")
    good = write(tmp_path / "good.jsonl", [GOOD])
    load(good, "task.options.metric='exact_mach'", "did you mean 'exact_match'?", metric="exact_mach")
    load(good, "task.options.anser='a'", "did you mean 'answer'?", anser="a")
    load(good, "task.options.answer=3", "must be text", answer=3)
    load(good, "good.jsonl:1", "holds no number", metric="number")
    refused(TaskConfig("jsonl"), "task.train=none")


@pytest.mark.parametrize(
    "metric, text, gold, strict, flexible",
    [
        ("exact_match", " Paris\n", "Paris", 1, 1),
        ("exact_match", "the  paris.", "Paris", 0, 1),
        ("exact_match", "Paris, France", "Paris", 0, 0),
        ("exact_match", "1,200", "1200", 0, 1),
        ("exact_match", "15", "1.5", 0, 0),
        ("exact_match", "5", "-5", 0, 0),
        ("exact_match", "(a)", "A", 0, 1),
        ("exact_match", "the", "A", 0, 0),
        ("exact_match", "", "A", 0, 0),
        ("exact_match", "?", "!", 0, 0),
        ("number", "1,200.0", "1200", 1, 1),
        ("number", "We get 3.\n#### 72", "6*12 = 72\n#### 72", 1, 1),
        ("number", "about $72.", "72", 0, 1),
        ("number", "72 or 73", "72", 0, 0),
        ("contains", "I think it is Paris.", "Paris", 1, 1),
        ("contains", "in THE PARIS region", "Paris", 0, 1),
        ("contains", "Parisian", "Paris", 0, 0),
        ("contains", "17, 7.5 and -7", "7", 0, 0),
        ("contains", "it is 7.", "7", 1, 1),
    ],
)
def test_metrics_of_own_rows(metric, text, gold, strict, flexible):
    assert jsonl.METRICS[metric](text, Example("x", "q", gold, gold)) == tasks.Score(strict, flexible)


OWN_METRICS = """
def half(answer, reference):
    return 0.5 * (len(answer) == len(reference)) + 0.5 * (answer == reference)

def same(answer, reference):
    return answer == reference

def wrong(answer, reference):
    return 2.0

def broken(answer, reference):
    return 1 / len(answer)

number = 3
"""


def test_a_metric_of_ones_own_is_a_function_of_answer_and_reference(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": "abc"} for i in range(5)])
    (tmp_path / "own_metrics.py").write_text(OWN_METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(metric):
        return tasks.load(TaskConfig("jsonl", path, num_validation=1, num_test=1, options={"metric": metric}), seed=0)

    task = load("own_metrics:half")
    assert task.metric == "own_metrics:half" and [task.score(text, task.test[0]) for text in ("abc", "xyz", "ab")] == [
        tasks.Score(1.0, 1.0), tasks.Score(0.5, 0.5), tasks.Score(0.0, 0.0),
    ]  # fmt: skip
    assert load("own_metrics:same").score("abc", task.test[0]) == tasks.Score(1.0, 1.0)
    for metric, text, message in (("wrong", "abc", "2 is no score from 0 to 1"), ("broken", "", "ZeroDivisionError: division by zero")):
        where = rf"task.options.metric='own_metrics:{metric}' failed for the answer '{text}' to row {re.escape(task.test[0].id)}: {message}"
        with pytest.raises(ValueError, match=where):
            load(f"own_metrics:{metric}").score(text, task.test[0])
    for metric, message in (
        ("own_metrics:halve", "could not be imported: AttributeError: .*'halve'"), ("own_metric:half", "could not be imported: ModuleNotFoundError"),
        ("own_metrics:number", "is 3, no function"), ("own_metrics", "is not one of exact_match, number, contains, nor module:function"),
        (":half", "could not be imported: ValueError"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"task.options.metric='{metric}' {message}"):
            load(metric)


def test_the_users_prompt_comes_before_the_tasks_own(tmp_path):
    path = write(tmp_path / "rows.jsonl", questions("a", 5))
    task = TaskConfig("jsonl", path, num_validation=1, num_test=1, initial_prompt="Say it.", options={"metric": "contains"})
    loaded = tasks.load(task, seed=0)
    assert (loaded.name, loaded.metric, loaded.initial_prompt) == ("jsonl", "contains", "Say it.")
    assert tasks.load(TaskConfig("jsonl", path, num_validation=1, num_test=1), seed=0).initial_prompt == jsonl.INITIAL_PROMPT


def test_checking_imports_only_what_the_task_needs(tmp_path):
    path = write(tmp_path / "rows.jsonl", questions("a", 5))
    code = (
        "import sys; from metatuner_jax import tasks; from metatuner_jax.config import TaskConfig as T; tasks.check(T('gsm8k')); "
        f"tasks.load(T('jsonl', {path!r}, num_validation=1, num_test=1), 0); "
        "print([m for m in ('jax', 'datasets', 'pyarrow', 'reasoning_gym') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
