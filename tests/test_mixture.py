"""Tests of the task `mixture`: shares, what a row takes from its part, and settings of the command line."""

import collections

import pytest
from test_tasks import keys, questions, refused, write

from metatuner_jax import config, tasks
from metatuner_jax.config import TaskConfig
from metatuner_jax.tasks import jsonl, mixture


@pytest.fixture
def parts(tmp_path):
    """Three parts with files of their own; c has another prompt and metric."""
    found = {}
    for name in "abc":
        (tmp_path / name).mkdir()
        for split, num in (("train", 40), ("test", 9)):
            write(tmp_path / name / f"{split}.jsonl", questions(f"{name} {split}", num))
        found[name] = {"name": "jsonl", "train": str(tmp_path / name)}
    found["c"] |= {"initial_prompt": "Count.", "options": {"metric": "number"}}
    return found


def make(parts, **settings):
    return TaskConfig("mixture", **{"num_validation": 4, **settings}, options={"parts": parts})


def counts(examples):
    return dict(collections.Counter(example.part for example in examples))


def test_train_rows_follow_the_weights_and_test_rows_are_even(parts):
    parts["a"]["weight"] = 2.5
    loaded = tasks.load(make(parts, num_train=20, num_validation=9, num_test=8), seed=3)
    assert counts(loaded.train) == {"a": 11, "b": 5, "c": 4} and counts(loaded.validation) == {"a": 5, "b": 2, "c": 2}
    assert counts(loaded.test) == {"a": 3, "b": 3, "c": 2}
    assert loaded.metric == "mean of parts"


def test_largest_remainders_get_what_is_left_over():
    assert mixture.shares(20, [2.5, 1, 1]) == [11, 5, 4]
    assert mixture.shares(10, [1, 1, 1]) == [4, 3, 3]
    assert mixture.shares(7, [0.0, 3.0, 1.0]) == [0, 5, 2]
    assert mixture.shares(3, [0.3, 0.3, 0.3]) == [1, 1, 1]


def test_a_row_keeps_its_parts_name_prompt_and_score(parts):
    loaded = tasks.load(make(parts), seed=0)
    prompts = {example.part: example.initial_prompt for example in loaded.train}
    assert prompts == {"a": jsonl.INITIAL_PROMPT, "b": jsonl.INITIAL_PROMPT, "c": "Count."}
    for example in loaded.train + loaded.validation + loaded.test:
        name, id = example.id.split("/")
        assert name == example.part and example.query.startswith(f"{name} {id.split('-')[0]}")
        assert loaded.score(f"It is {example.answer}", example) == tasks.Score(
            0, float(name == "c")
        )  # only numbers are looked for in a text


def test_the_mixtures_own_prompt_is_for_parts_without_one(parts):
    loaded = tasks.load(make(parts, initial_prompt="Say it."), seed=0)
    assert loaded.initial_prompt == "Say it."
    assert {example.part: example.initial_prompt for example in loaded.test} == {"a": None, "b": None, "c": "Count."}


def test_rows_are_interleaved_by_the_seed(parts):
    one, again, other = (tasks.load(make(parts, num_train=30), seed=seed) for seed in (1, 1, 2))
    assert (one.train, one.validation, one.test) == (again.train, again.validation, again.test)
    order = [example.part for example in one.train]
    assert order != sorted(order) and order != [example.part for example in other.train]
    assert len({example.id for example in one.train + one.validation + one.test}) == 30 + 4 + 27


def test_trained_on_some_and_tested_on_another(parts):
    for name, use in zip("abc", ("train", "train", "test"), strict=True):
        parts[name]["use"] = use
    loaded = tasks.load(make(parts, num_train=10, num_test=5), seed=0)
    assert (
        counts(loaded.train) == {"a": 5, "b": 5}
        and counts(loaded.validation) == {"a": 2, "b": 2}
        and counts(loaded.test) == {"c": 5}
    )
    assert len(tasks.load(make(parts), seed=0).train) == 2 * 40 - 4


def test_a_part_needs_only_the_files_that_it_is_used_for(parts, tmp_path):
    parts["a"] = {"name": "jsonl", "train": str(tmp_path / "a" / "train.jsonl"), "use": "train"}
    parts["b"] = {"name": "jsonl", "test": str(tmp_path / "b" / "test.jsonl"), "use": "test"}
    parts["c"] = None  # left out
    parts["coins"] = {"name": "reasoning_gym:spell_backward", "use": "test"}
    parts["cubes"] = {"name": "reasoning_gym:spell_backward", "use": "train", "options": {"min_word_len": 4}}
    loaded = tasks.load(make(parts, num_train=6, num_test=8), seed=0)
    assert counts(loaded.train) == {"a": 3, "cubes": 3} and counts(loaded.test) == {"b": 4, "coins": 4}
    assert all(loaded.score(example.answer, example).strict == 1 for example in loaded.train + loaded.test)
    parts["b"]["test"] = str(tmp_path / "none.jsonl")
    refused(make(parts, num_train=6, num_test=8), "task.options.parts.b: task.test='", "none.jsonl'", "no such file")
    parts["b"] = {"name": "jsonl", "use": "test"}
    refused(make(parts, num_train=6, num_test=8), "task.options.parts.b: task.test=none", "name a test file")


def test_a_query_of_another_parts_train_rows_is_dropped_and_counted(parts, tmp_path):
    write(tmp_path / "b" / "test.jsonl", questions("a train", 40) + questions("b test", 2))
    loaded = tasks.load(make(parts), seed=0)
    assert counts(loaded.test) == {"a": 9, "b": 2, "c": 9} and loaded.dropped["test_in_train"] == 40
    assert not keys(loaded.test) & keys(loaded.train + loaded.validation) and not keys(loaded.validation) & keys(loaded.train)
    write(tmp_path / "b" / "test.jsonl", questions("a train", 40))
    refused(make(parts), "task.options.parts.b: all queries of its test rows are in train or validation of other parts")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": {"name": "jsonll"}}, "task.options.parts.a: task.name='jsonll' is not one of"),
        ({"gsm8l": {}}, "task.options.parts.gsm8l: task.name='gsm8l' is not one of"),
        ({"a": {"wieght": 2.0}}, "task.options.parts.a.wieght=2.0 is unknown: a part has name, weight"),
        ({"a": {"wieght": 2.0}}, "did you mean 'weight'?"),
        ({"a": {"weight": 0}}, "task.options.parts.a.weight=0 must be a number above 0"),
        ({"a": {"use": "tset"}}, "task.options.parts.a.use='tset' is not one of both, train, test; did you mean 'test'?"),
        ({"a": {"train": 3}}, "task.options.parts.a.train=3 must be text"),
        ({"a": {"name": "mixture"}}, "task.options.parts.a.name='mixture'"),
        ({"a": {"options": 3}}, "task.options.parts.a.options=3 must be a section"),
        ({"a": 3}, "task.options.parts.a=3 must be a section"),
        ({"a": {"name": "gsm8k", "options": {"x": "y"}}}, "task.options.parts.a: task.options.x='y' is unknown to gsm8k"),
    ],
)
def test_a_wrong_setting_of_a_part_is_named(parts, change, message):
    with pytest.raises(ValueError) as caught:
        tasks.check(make({**parts, **change}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_settings_of_a_mixture_are_refused(parts):
    refused(TaskConfig("mixture"), "task.options.parts=None must be a section")
    refused(TaskConfig("mixture", options={"part": parts}), "task.options.part=", "did you mean 'parts'?")
    refused(make(parts, train="rows.jsonl"), "task.train='rows.jsonl' has no use in a mixture")
    refused(make({name: {**part, "use": "train"} for name, part in parts.items()}), "none of a, b, c is there to test on")
    refused(make({}), "there to test on")
    refused(make(parts, num_train=2), "task.num_train=2 leaves a part without rows", "[1, 1, 0]")
    refused(make({**parts, "a": {**parts["a"], "weight": 2.0}}), "task.num_train=none takes all rows of each part")
    refused(make(parts, num_train=300), "task.options.parts.a: task.num_train=100 is above the 38 train rows")


def parsed(parts, *assignments):
    tree = config.to_tree(config.make(task={"name": "mixture", "options": {"parts": parts}}))
    config.override(tree, [a.split("=", 1) for a in assignments])
    return config.from_tree(tree).task.options["parts"]


def test_settings_of_a_part_can_be_set_on_the_command_line():
    parts = {"gsm8k": {"weight": 1.0, "train": None}, "math": {"use": "test"}, "c": {"options": {}}}
    found = parsed(
        parts, "task.options.parts.gsm8k.weight=2", "task.options.parts.gsm8k.train=rows.jsonl", "task.options.parts.math=none",
        "task.options.parts.c.options.metric=number", "task.options.parts.c.use=train",
    )  # fmt: skip
    assert found == {
        "gsm8k": {"weight": 2, "train": "rows.jsonl"}, "math": None, "c": {"options": {"metric": "number"}, "use": "train"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("task.options.parts.gsm8l.weight=2", r"task.options.parts has no section 'gsm8l'; did you mean 'gsm8k'\?"),
        ("task.options.prats.gsm8k.weight=2", r"task.options has no section 'prats'; did you mean 'parts'\?"),
        ("task.options.parts.gsm8k.weight.x=2", "task.options.parts.gsm8k holds single values"),
        ("task.options.parts.gsm8k=2", "task.options.parts.gsm8k is a section: set one of its values, or none"),
    ],
)
def test_wrong_names_of_parts_on_the_command_line_are_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        parsed({"gsm8k": {"weight": 1.0}}, assignment)
