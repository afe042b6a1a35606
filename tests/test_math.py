r"""Tests of the task `math`: the gold answer in the solution, answers in odd clothes, and answers that never end."""

import concurrent.futures
import time

import pytest
from test_tasks import refused, write

from metatuner_jax import tasks
from metatuner_jax.config import TaskConfig
from metatuner_jax.tasks import Example, competition_math, math_verifier

# Invented for this test, in the layout of the hub's rows.
ROWS = [
    {
        "problem": r"A shelf holds $4$ red and $12$ blue books. What share of the books is red?",
        "level": "Level 1",
        "type": "Prealgebra",
        "solution": r"There are $4 + 12 = \boxed{16}$ books in all, so the share is $\frac{4}{16} = \boxed{\frac{1}{4}}.$",
    },
    {
        "problem": r"Solve $x^2 = 9$ for all real $x$.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"The roots are $\boxed{\left\{-3, 3\right\}}$.",
    },
    {"problem": "What is $2 + 3$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed 5$."},
]


@pytest.fixture(scope="module")
def score():
    return competition_math.make_score(20.0)  # long enough for a busy machine


def gold(answer):
    return Example("x", "q", answer, answer, answer)


@pytest.mark.parametrize(
    "text, answer, strict, flexible",
    [
        (r"We get \boxed{\frac{1}{4}}", r"\frac{1}{4}", 1, 1),
        (r"so the probability is $\boxed{\dfrac{3}{\sqrt{8}}}$.", r"\frac{3}{2\sqrt{2}}", 1, 1),
        (r"\[ \boxed{0.25} \]", r"\frac14", 1, 1),
        (r"First \boxed{7}. No wait, that is wrong. \boxed{8}", "8", 1, 1),
        (r"\boxed{1,200}", "1200", 1, 1),
        (r"\boxed{1{,}200}", "1200", 1, 1),
        (r"\boxed{12\text{ cm}}", "12", 1, 1),
        (r"The total cost is \boxed{\$18.50}.", "18.50", 1, 1),
        (r"\boxed{x = 5}", "5", 1, 1),
        (r"\boxed{50\%}", r"50\%", 1, 1),
        (r"\boxed{90^\circ}", "90", 1, 1),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1, 1),
        (r"\boxed{3, -3}", r"\{-3,3\}", 1, 1),
        (r"\boxed{\text{Friday}}", r"\text{Friday}", 1, 1),
        ("So $f(2) = 4 + 6 + 2 = 12$.\n\nThe answer is 12.", "12", 0, 1),
        ("Step 1: 3 * 4 = 12\nStep 2: 12 / 2 = 6\n\n**Answer:** 6", "6", 0, 1),
        ("The final answer is: $\\frac{1}{4}$. I hope it is correct.", r"\frac14", 0, 1),
        ("the answer is 1,200 apples.", "1200", 0, 1),
        ("The answer is (B).", r"\text{(B)}", 0, 1),
        ("The answer is (2, 3).", "(2,3)", 0, 1),
        ("The answer is 12. There are 3 kinds of it.", "12", 0, 1),
        (r"The answer is \(2\sqrt{2}\).", r"\sqrt{8}", 0, 1),
        ("The answer is x^2 + 1.", "x^2+1", 0, 1),
        ("We have 5 red and 7 blue balls, which gives us 5 + 7 = 12", "12", 0, 1),
        ("#### 7", "7", 0, 1),
        (r"\boxed{8}, so the answer is 7.", "7", 0, 0),
        (r"\boxed{7} or \boxed{8}", "7", 0, 0),
        (r"\boxed{7", "7", 0, 0),
        (r"\boxed{\frac{1}{4}}", r"\frac{1}{3}", 0, 0),
        (r"\boxed{(3,2)}", "(2,3)", 0, 0),
        (r"\boxed{-5}", "5", 0, 0),
        (r"\boxed{x^2+1}", "x^2-1", 0, 0),
        (r"\boxed{}", "5", 0, 0),
        ("The answer is not 5.", "5", 0, 0),
        ("The answer is 6. We do not need the 5 other ones.", "5", 0, 0),
        ("There are 12 of them, not 13", "12", 0, 0),
        ("The answer is 7, not 8.", "7", 0, 1),
        ("The answer is 7, not 8.", "8", 0, 0),
        (r"\boxed{36_8}", "36_8", 1, 1),
        (r"\boxed{36_{8}}", "36_8", 1, 1),
        (r"\boxed{36}", "36_8", 1, 1),
        (r"\boxed{36_7}", "36_8", 0, 0),
        (r"\boxed{44_7}", "44", 0, 0),
        ("The answer is", "5", 0, 0),
        ("I am sorry, I cannot solve this problem.", "5", 0, 0),
        ("", "5", 0, 0),
    ],
)
def test_math_scores(score, text, answer, strict, flexible):
    assert score(text, gold(answer)) == tasks.Score(strict, flexible)


ROOT, SUM = r"Simplify $\sqrt{50}$.", r"What is the value of $\frac{3}{4} + \frac{1}{6}$? Express your answer as a common fraction."


@pytest.mark.parametrize(
    "problem, text, answer, strict, flexible",
    [
        # What SmolLM2-135M-Instruct wrote, greedily, up to 128 tokens: the problem again, and none of its answers.
        (ROOT, (r"$\sqrt{50}$ is a mathematical expression that can be simplified by using the property of square roots that states that "
         r"$\sqrt{a}=\sqrt{a^2}$. So, $\sqrt{50}=\sqrt{50^2}$. This is the only possible simplification of $\sqrt{50}$."), r"5\sqrt{2}", 0, 0),
        (SUM, (r"We can rewrite the fractions as follows: $\frac{3}{4} + \frac{1}{6} = \frac{3}{4} + \frac{1}{6}$. Now, we can add these "
         r"fractions by simply adding the numerators and denominators: $\frac{3 + "), r"\frac{11}{12}", 0, 0),
        ("How many ways are there to choose 2 of 5 books?", ("To choose 2 books out of 5, there are 5 choose 2 = 10 ways. This is based on "
         "the combination formula, which is calculated as 5 choose 2, denoted as C(5,2) or 10C2. This formula is used to calculate the "
         "number of possible outcomes when selecting a subset of objects from a larger set. In this case, it's calculated as 10 * 9 / 2 "
         "= 55 ways."), "10", 0, 0),
        ("Solve $2x + 6 = 20$ for $x$.", ("Now, we can divide both sides of the equation by 2 to find the solution. This gives us $x = "
         "10/2$.\n\nSo, the solution is $x = 5$."), "7", 0, 0),
        (r"What is $15\%$ of $200$?", r"So, $15\%$ is equal to 15/100, which is 0.15.\n\nSo, $15\%$ is equal to 15/100 of $200$.", "30", 0, 0),
        # Invented: right answers, and the problem itself in a box.
        (ROOT, r"so $\sqrt{50} = 5\sqrt{2}$.", r"5\sqrt{2}", 0, 1),
        (SUM, r"$\frac{3}{4}+\frac{1}{6} = \frac{11}{12}$", r"\frac{11}{12}", 0, 1),
        ("Factor $x^2 - 9$.", r"\boxed{x^2-9}", "(x-3)(x+3)", 0, 0),
        ("Factor $x^2 - 9$.", r"\boxed{(x+3)(x-3)}", "(x-3)(x+3)", 1, 1),
        ("Find $f(-2)$.", r"\boxed{f(-2) = 8}", "8", 1, 1),
        (r"Simplify $\frac{7}{9}$.", r"\boxed{\frac{7}{9}}", r"\frac{7}{9}", 1, 1),
    ],
)  # fmt: skip
def test_the_problem_said_again_is_no_answer(score, problem, text, answer, strict, flexible):
    assert score(text, Example("x", problem, answer, answer, answer)) == tasks.Score(strict, flexible)


@pytest.mark.parametrize(
    "text, box",
    [
        (r"\boxed{1} and \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right\}}", r"\left\{1\right\}"),
        (r"$\boxed 5$.", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} but \boxed{5", "4"),
        (r"boxed{5}", None),
        (r"\boxed", None),
        (r"\boxed{{5}", None),
    ],
)
def test_the_last_whole_box_is_found(text, box):
    assert competition_math.last_box(text) == box


def test_an_answer_that_never_ends_is_wrong_after_the_time_limit():
    verifier = math_verifier.Verifier(1.0)
    try:
        assert verifier.equal("$5$", ["$5$"])
        for endless in ("$9^{9^{9^{9}}}$", "$(10^{10})!$", "$" + "(" * 3000 + "$"):
            start = time.monotonic()
            assert not verifier.equal("$5$", [endless])
            assert time.monotonic() - start < 60
        assert verifier.equal("$0.5$", [r"$\frac12$"])  # a new process has taken over
        assert 2 <= verifier.num_started <= 4
    finally:
        verifier.close()


def test_any_thread_may_ask_and_one_process_answers():
    verifier = math_verifier.Verifier(20.0)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: verifier.equal("$3$", [f"$\\frac{{{i}}}{{2}}$"]), range(12)))
        assert found == [i == 6 for i in range(12)] and verifier.num_started == 1
    finally:
        verifier.close()


def test_a_verifier_that_cannot_start_is_an_error_and_no_wrong_answer(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho No module named math_verify\n")
    script.chmod(0o755)
    monkeypatch.setattr(math_verifier.sys, "executable", str(script))
    with pytest.raises(RuntimeError, match="math-verify cannot be run by .*: No module named math_verify"):
        math_verifier.Verifier(1.0).equal("$5$", ["$5$"])


def test_math_reads_a_folder_and_takes_the_last_box_for_gold(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [{**ROWS[0], "problem": "Another?"}])
    loaded = tasks.load(TaskConfig("math", str(tmp_path), num_validation=1, options={"seconds": 20}), seed=0)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (2, 1, 1)
    found = {example.query: example.reference for example in loaded.train + loaded.validation}
    assert found == {row["problem"]: want for row, want in zip(ROWS, (r"\frac{1}{4}", r"\left\{-3, 3\right\}", "5"), strict=True)}
    assert loaded.test[0].answer == ROWS[0]["solution"] and "boxed" in loaded.initial_prompt
    assert all(loaded.score(e.answer, e) == tasks.Score(1, 1) for e in loaded.train + loaded.validation)


def test_math_refuses_rows_without_a_box_and_wrong_settings(tmp_path):
    path = write(tmp_path / "train.jsonl", [ROWS[0], {"problem": "q", "solution": "It is 5."}])
    refused(TaskConfig("math", path, test=path), f"{path}:2", "'solution'", r"\boxed{}")
    refused(TaskConfig("math", path, test=path, options={"seconds": 0}), "task.options.seconds=0 must be a number above 0")
    refused(TaskConfig("math", path, test=path, options={"second": 3}), "task.options.second=3", "did you mean 'seconds'?")
    refused(TaskConfig("math", num_test=5001), "task.num_test=5001", "5000 test rows of DigitalLearningGmbH/MATH-lighteval")
