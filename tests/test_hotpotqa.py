"""Tests of the task `hotpotqa`: its queries, which split is test, and the official scores."""

import pytest
from test_tasks import refused, write

from metatuner_jax import tasks
from metatuner_jax.config import TaskConfig
from metatuner_jax.tasks import Example, hotpotqa


def row(i, answer="Ann Lee"):
    """A row in the hub's layout: five paragraphs, of which B and E hold the answer."""
    return {
        "id": f"5a{i}", "question": f"Who wrote book {i}?", "answer": answer, "type": "bridge", "level": "hard",
        "supporting_facts": {"title": ["E", "B", "B"], "sent_id": [0, 0, 1]},
        "context": {"title": list("ABCDE"), "sentences": [[f"{title} is one.", f" It has {i} pages."] for title in "ABCDE"]},
    }  # fmt: skip


def write_split(folder, split, first, num, **changes):
    return write(folder / f"{split}.jsonl.gz", [{**row(i), **changes} for i in range(first, first + num)])


def test_a_query_shows_the_paragraphs_with_their_titles_and_then_the_question(tmp_path):
    for split, first in (("train", 0), ("validation", 10), ("test", 20)):
        write_split(tmp_path, split, first, 3)
    loaded = tasks.load(TaskConfig("hotpotqa", str(tmp_path), num_validation=2), seed=0)
    assert [example.id for example in loaded.validation + loaded.test] == [
        "validation-0", "validation-1", "test-0", "test-1", "test-2",
    ]  # fmt: skip
    assert loaded.test[0].query == "\n\n".join(
        [*(f"{title}: {title} is one. It has 20 pages." for title in "ABCDE"), "Question: Who wrote book 20?"]
    )
    assert loaded.test[0].answer == loaded.test[0].reference == "Ann Lee"


def test_fewer_paragraphs_keep_what_the_answer_needs_and_the_original_order(tmp_path):
    path, test = write_split(tmp_path, "train", 0, 4), write_split(tmp_path, "test", 9, 1)
    for number, titles in ((2, "BE"), (3, "ABE"), (4, "ABCE"), (9, "ABCDE"), (None, "ABCDE")):
        loaded = tasks.load(TaskConfig("hotpotqa", path, test=test, num_validation=1, options={"paragraphs": number}), seed=0)
        assert [part[0] for part in loaded.test[0].query.split("\n\n")[:-1]] == list(titles)


def test_validation_is_test_where_there_is_none_with_answers(tmp_path):
    write_split(tmp_path, "train", 0, 8)
    write_split(tmp_path, "validation", 10, 3)
    task = TaskConfig("hotpotqa", str(tmp_path), num_validation=2)
    loaded = tasks.load(task, seed=0)
    assert [example.id for example in loaded.test] == ["validation-0", "validation-1", "validation-2"]
    assert len(loaded.train) == 6 and all(example.id.startswith("train-") for example in loaded.validation)
    write_split(tmp_path, "test", 20, 5, answer=None)
    again = tasks.load(task, seed=0)
    assert again.test == loaded.test and again.dropped == {**loaded.dropped, "unlabelled": 5}


def test_rows_of_the_hub_come_from_the_distractor_setting(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs))
        return {"train": [row(i) for i in range(6)], "validation": [row(i) for i in range(10, 13)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = tasks.load(TaskConfig("hotpotqa", num_validation=2), seed=0)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (4, 2, 3)
    assert set(map(str, asked)) == {"('hotpotqa/hotpot_qa', 'distractor', {'revision': None})"}


@pytest.mark.parametrize(
    "text, answer, strict, flexible",
    [
        ("World War II", "World War II", 1, 1),
        ("  the world war II.\n", "World War II", 1, 1),
        ('"World War II"', "World War II", 1, 1),
        ("1,234", "1234", 1, 1),
        ("Yes.", "yes", 1, 1),
        ("The answer is World War II.", "World War II", 0, 0.75),
        ("He fought in World War II as a navy man, says the paragraph about him", "World War II", 0, 6 / 16),
        ("War World", "World War II", 0, 0.8),
        ("World War I", "World War II", 0, 2 / 3),
        ("World War II World War II", "World War II", 0, 2 / 3),
        ("yes, they were both American", "yes", 0, 0),
        ("no", "yes", 0, 0),
        ("noanswer", "World War II", 0, 0),
        ("Korea", "World War II", 0, 0),
        ("", "World War II", 0, 0),
        ("the the", "The The", 1, 1),  # a band, of which the normalisation leaves nothing
        ("a", "The The", 0, 0),
        ("", "The The", 0, 0),
        ("", "!", 0, 0),
    ],
)
def test_hotpotqa_scores(text, answer, strict, flexible):
    found = hotpotqa.score(text, Example("x", "q", answer, answer))
    assert found == tasks.Score(strict, pytest.approx(flexible))


@pytest.mark.parametrize(
    "text, answer, words",
    [
        # What SmolLM2-135M-Instruct wrote, greedily; (shared words, words of the text, words of the answer) counted by hand, without articles
        ('The song "Medicine" by The 1975 appears in a film directed by Danish filmmaker Nicolas Winding Refn.', "Nicolas Winding Refn", (3, 14, 3)),
        (("The award which has Matt James as a winner in 2012 has its name derived from the EN World web site that has hosted the awards "
         "since its inception in 2001."), "EN World web site", (4, 27, 4)),
        (("Brian G. Hutton has more scope of profession than Xawery \u017bu\u0142awski. Xawery \u017bu\u0142awski is a Polish film director, while "
         "Brian G. Hutton is a British film and television director."), "Xawery \u017bu\u0142awski", (2, 27, 2)),
        (("No, The Datsuns and The Black Crowes are not two separate rock bands. They are two distinct musical groups with different styles "
         "and approaches."), "yes", (0, 1, 1)),
        ("The former name of the stadium where the OFC U-20 Championship was played in 1986 was Mount Smart Stadium.", "Ericsson Stadium",
         (1, 16, 2)),
    ],
)  # fmt: skip
def test_what_a_small_model_says_is_never_exact_and_shares_words(text, answer, words):
    shared, said, wanted = words
    precision, recall = shared / said, shared / wanted
    flexible = 2 * precision * recall / (precision + recall) if shared else 0.0
    assert hotpotqa.score(text, Example("x", "q", answer, answer)) == tasks.Score(0, pytest.approx(flexible))


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"answer": ""}, ["'answer' is empty"]),
        ({"context": "A is one."}, ["'context'", "title and sentences", "task.name=jsonl"]),
        ({"context": {"title": ["A", "B"], "sentences": [["one"]]}}, ["2 titles and 1 paragraphs"]),
        ({"supporting_facts": None}, ["'supporting_facts'", "lists named title"]),
    ],
)
def test_a_bad_row_of_hotpotqa_is_named(tmp_path, change, parts):
    path = write(tmp_path / "rows.jsonl", [row(0), {**row(1), **change}])
    refused(TaskConfig("hotpotqa", path, test=path, options={"paragraphs": 2}), f"{path}:2", *parts)


def test_wrong_settings_of_hotpotqa_are_refused(tmp_path):
    for paragraphs in (1, 2.5):
        refused(TaskConfig("hotpotqa", options={"paragraphs": paragraphs}), f"task.options.paragraphs={paragraphs}", "at least 2")
    refused(TaskConfig("hotpotqa", options={"paragraphs": "all"}), "task.options.paragraphs='all' must be a number above 0")
    refused(TaskConfig("hotpotqa", num_test=7406), "task.num_test=7406", "7405 test rows")
    path = write_split(tmp_path, "test", 0, 2, answer=None)
    refused(TaskConfig("hotpotqa", path, num_test=1), f"task.train='{path}'", "none of its 2 rows has an answer")
