"""Tests of the task `cosmosqa`: its rows, and the letter that a rambling text chooses."""

import pyarrow
import pyarrow.parquet
import pytest
from test_tasks import refused, write

from metatuner_jax import tasks
from metatuner_jax.config import TaskConfig
from metatuner_jax.tasks import Example, cosmosqa

CHOICES = ("None of the above choices .", "A man was late .", "A man was late for school .", "She does n't like him .")


def row(i, label=1):
    """A row in the hub's layout."""
    return {
        "id": f"3{i}",
        "context": f"It rained on day {i} .",
        "question": "Why ?",
        **{f"answer{j}": c for j, c in enumerate(CHOICES)},
        "label": label,
    }


def write_split(folder, split, first, num, label=1):
    return write(folder / f"{split}.jsonl.gz", [row(i, label) for i in range(first, first + num)])


def test_a_query_shows_the_text_the_question_and_the_lettered_choices(tmp_path):
    write_split(tmp_path, "train", 0, 4)
    write_split(tmp_path, "test", 10, 2, label=2)
    loaded = tasks.load(TaskConfig("cosmosqa", str(tmp_path), num_validation=1), seed=0)
    example = loaded.test[1]
    assert example.query == (
        "It rained on day 11 .\n\nQuestion: Why ?\nA. None of the above choices .\nB. A man was late .\n"
        "C. A man was late for school .\nD. She does n't like him ."
    )
    assert (example.id, example.answer, example.reference) == ("test-1", "C", "C")
    assert loaded.metric == "accuracy" and loaded.score("C", example) == tasks.Score(1, 1)


def test_rows_without_a_label_are_dropped_and_validation_is_test(tmp_path):
    for split, first, label in (("train", 0, 0), ("validation", 10, 1), ("test", 20, -1)):
        write_split(tmp_path, split, first, 6, label)
    loaded = tasks.load(TaskConfig("cosmosqa", str(tmp_path), num_validation=2), seed=0)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (4, 2, 6)
    assert loaded.dropped == {"validation_in_train": 0, "test_in_train": 0, "unlabelled": 6}
    assert {example.reference for example in loaded.test} == {"B"} and loaded.test[0].id == "validation-0"
    path = str(tmp_path / "test.jsonl.gz")
    refused(
        TaskConfig("cosmosqa", str(tmp_path / "train.jsonl.gz"), test=path),
        f"task.test='{path}'",
        "none of its 6 rows has an answer",
    )


def test_rows_of_the_hub_come_from_its_parquet_branch(monkeypatch, tmp_path):
    import datasets

    branch = tmp_path / "branch"
    for split, first, num, label in (("train", 0, 9, 0), ("validation", 10, 5, 1), ("test", 20, 4, -1)):  # as it is laid out there
        (branch / "default" / split).mkdir(parents=True)
        table = pyarrow.Table.from_pylist([row(i, label) for i in range(first, first + num)])
        pyarrow.parquet.write_table(table, branch / "default" / split / "0000.parquet")
    real, asked = datasets.load_dataset, set()

    def load_dataset(source, subset, revision):
        asked.add((source, subset, revision))
        return real(str(branch), subset, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = tasks.load(TaskConfig("cosmosqa", num_validation=2, num_train=3, num_test=4), seed=0)
    assert asked == {("allenai/cosmos_qa", None, "refs/convert/parquet")}
    assert [example.id for example in loaded.test] == [f"validation-{i}" for i in range(4)]
    assert {example.reference for example in loaded.train + loaded.validation} == {"A"} and loaded.dropped["unlabelled"] == 4


@pytest.mark.parametrize(
    "text", ["B", " B\n", "B.", "(B)", "(B).", "[B]", "B)", "B:", "b", "**B**", "The answer is (B).", "B) because he was late"]
)
def test_the_chosen_letter_is_right_however_it_is_said(text):
    assert cosmosqa.score(text, Example("x", "q", "B", "B", CHOICES)) == tasks.Score(1, 1)
    assert cosmosqa.score(text, Example("x", "q", "C", "C", CHOICES)) == tasks.Score(0, 0)


REPEATED = "A. None of the above choices .\nB. A man was late .\nC. A man was late for school .\nD. She does n't like him ."


@pytest.mark.parametrize(
    "text, letter",
    [
        # the letter, marked up
        ("b", "B"),
        ("**B**", "B"),
        ("'C'", "C"),
        (r"\boxed{\text{D}}", "D"),
        (r"$\boxed{B}$.", "B"),
        # a sentence that chooses
        ("The answer is (B).", "B"),
        ("The correct answer is option B) A man was late .", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B. A man was late .", "B"),
        ("The best answer to the question is: C", "C"),
        ("The correct option is **D**.", "D"),
        ("The answer is \"A. None of the above choices .\"", "A"),
        ("The answer is A because none of the others is likely.", "A"),
        ("I would choose option C, as the man was late.", "C"),
        ("B is the most likely answer.", "B"),
        ("Based on the text, option D is correct.", "D"),
        ("The answer is B. No, wait, he was at school, so the answer is C.", "C"),
        (f"{REPEATED}\n\nThe correct answer is B.", "B"),
        ("The answer is not B. The answer is C.", "C"),
        ("Question: Why ?\nAnswer: (D) She does n't like him .\n\nExplanation: A man came by.", "D"),
        ("It's B.", "B"),
        ("It is (C), since the man was late.", "C"),
        ("The answer is definitely B.", "B"),
        ("The answer must be B", "B"),
        ("The correct answer would most likely be **D**", "D"),
        ("The answer is not A, it is B.", "B"),
        ("I would not choose B. Option C.", "C"),
        ("I don't think B is right.", None),
        ("I don't think that the answer is B. I'd go with D.", "D"),
        ("It is a man who was late.", None),
        ("It's a shame.", None),
        # one letter is marked as a choice
        ("B, because he came late", "B"),
        ("B because he came late", "B"),
        ("B\n\nExplanation: he came late", "B"),
        ("B. A man was late .", "B"),
        ("B) He did not come, and she waited for a while.", "B"),
        ("(B) because it rained", "B"),
        ("Let us think step by step.\nA man came late. So it must be (B)", "B"),
        ("Option B is wrong, so it is option C", "C"),
        # a choice in full
        ("A man was late.", "B"),
        ("a man was late for school", "C"),
        ("She doesn't know, but none of the above choices.", "A"),
        ("I think that she does n't like him", "D"),
        # no letter, or several
        ("", None),
        ("A", "A"),
        ("A man went to the store.", None),
        ("The answer is a man who came too late.", None),
        ("The answer is A man went home.", None),
        ("I'd say he was late.", None),
        ("The answer is B or C.", None),
        ("The answer is (A) and (D).", None),
        ("The answer is not B.", None),
        (REPEATED, None),
        ("(B) or (C)", None),
        ("Both option A and option D fit.", None),
        ("A man was late . She does n't like him .", None),
        ("Vitamin C is good for you.", None),
        ("E", None),
        ("None of them", None),
    ],
)  # fmt: skip
def test_the_letter_that_a_text_chooses(text, letter):
    assert cosmosqa.chosen(text, CHOICES) == letter


BUS = ("None of the above choices .", "The bus would arrive at the stop soon", "The taxi would pick up the young man",
       "Medical personnel would come to help the old man")  # fmt: skip
FELL = ("He was waiting on a ride", "He likely fell on the sidewalk and hit his head while intoxicated", "He was waiting on the taxi",
        "None of the above choices .")  # fmt: skip
BIAS = (
    "she becomes angry with her husband",
    "She confirms her biases",
    "She makes informed decisions",
    "None of the above choices .",
)
JOB = ("I lost my well paying job .", "I lost my vacation days .", "I ca n't get off medical leave .", "I am taking a sabbatical .")


@pytest.mark.parametrize(
    "text, choices, letter",
    [
        ("A. I lost my well paying job\n\nThe correct answer is A. I lost my well paying job.", JOB, "A"),
        ("C. I am taking a sabbatical", JOB, "C"),  # the letter counts, though the words are D's
        ("B. The taxi would pick up the young man.\n\nThe correct answer is D. Medical personnel would come to help the old man.", BUS, "D"),
        (("C. He likely fell on the sidewalk and hit his head while intoxicated\n\nThe correct answer is C. He likely fell on the sidewalk "
         "and hit his head while intoxicated."), FELL, "C"),
        ("A. she becomes angry with her husband\nB. She confirms her biases\nC. She makes informed decisions", BIAS, None),
        (("A. she becomes angry with her husband\n\nThe correct answer is A. She confirms her biases. This is because the event was aired with "
         "a moderator who had a particular agenda"), BIAS, "A"),
        ("C. None of the above choices.\n\nThe young man's death was a tragic event, and the young man's death was a tragic event.", BUS, "C"),
    ],
)  # fmt: skip
def test_the_letter_that_smollm2_chooses(text, choices, letter):
    """What SmolLM2-135M-Instruct wrote, greedily: it never says the letter alone."""
    assert cosmosqa.chosen(text, choices) == letter
    assert [cosmosqa.score(text, Example("x", "q", gold, gold, choices)).strict for gold in "ABCD"] == [
        gold == letter for gold in "ABCD"
    ]


def test_the_same_choice_twice_is_no_choice_by_its_text():
    assert cosmosqa.chosen("It rained.", ("It rained .", "It rained", "It snowed .", "It was hot .")) is None


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"label": 4}, ["'label' is 4", "not one of 0, 1, 2, 3"]),
        ({"label": "B"}, ["'label' is 'B'"]),
        ({"answer3": ""}, ["'answer3' is empty"]),
        ({"context": 3}, ["'context' is 3 (int)"]),
    ],
)
def test_a_bad_row_of_cosmosqa_is_named(tmp_path, change, parts):
    path = write(tmp_path / "rows.jsonl", [row(0), {**row(1), **change}])
    refused(TaskConfig("cosmosqa", path, test=path), f"{path}:2", *parts)


def test_labels_of_a_csv_file_are_read(tmp_path):
    names = list(row(0))
    train, test = (
        write(
            tmp_path / f"{name}.csv",
            [",".join(names), *(",".join(str(row(i)[name]) for name in names) for i in range(first, first + 3))],
        )
        for name, first in (("train", 0), ("test", 10))
    )
    loaded = tasks.load(TaskConfig("cosmosqa", train, test=test, num_validation=1), seed=0)
    assert loaded.test[0].reference == "B"


def test_wrong_settings_of_cosmosqa_are_refused():
    refused(
        TaskConfig("cosmosqa", options={"letters": "abcd"}), "task.options.letters='abcd' is unknown to cosmosqa, which has config"
    )
    refused(TaskConfig("cosmosqa", num_test=2986), "task.num_test=2986", "2985 test rows of allenai/cosmos_qa")
