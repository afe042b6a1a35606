r"""MATH (Hendrycks et al., arXiv 2103.03874): problems of competitions, whose solutions put the answer in \boxed{}."""

import functools
import re

from metatuner_jax import config
from metatuner_jax.tasks import Example, Score, Task, math_verifier, rows

HUB = rows.Hub("DigitalLearningGmbH/MATH-lighteval", "default", {"train": 7500, "test": 5000})
INITIAL_PROMPT = r"Solve the problem step by step. Put the final answer in \boxed{}, such as: \boxed{42}"
SECONDS = 5.0
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE = re.compile(r"[^$\n{}]+")  # \boxed 5$
_MARK = re.compile(r"####|\banswer(?:\s+(?:is|should\s+be|would\s+be)\b(?P<denied>\s+not\b)?|\s*[:=])", re.IGNORECASE)
# An expression that a problem asks to have worked on, such as that of "Simplify $\sqrt{50}$".
_ASKED = re.compile(
    r"\b(?:simplify|evaluate|compute|calculate|factor|expand|rationalize|convert|express|write|value of|what is|find)\s+"
    r"(?:(?:the|a|an|this|following|expression|sum|product|fraction|value|of)\s+)*(\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\])",
    re.IGNORECASE | re.DOTALL,
)


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for a setting that is known to be wrong without reading rows."""
    rows.check_options(task, ("config",), numbers=("seconds",))
    rows.check_splits(task, HUB)


def load(task: config.TaskConfig, seed: int) -> Task:
    """Returns the task. Its answers are the whole solutions."""
    train, validation, test, dropped = rows.load_splits(task, seed, _example, HUB)
    score = make_score(float(task.options.get("seconds") or SECONDS))
    return Task(task.name, "math_verify", task.initial_prompt or INITIAL_PROMPT, train, validation, test, score, dropped)


def make_score(seconds: float):
    r"""Returns score(text, example): strict: the last \boxed{} equals the gold; flexible: the final answer does, boxed or not.

    Equal is what math-verify takes for equal (0.75 and 3/4, x=5 and 5, 12 cm and 12, {1,2} and {2,1}), or the same text.
    Where there is a box, the last one is the final answer and both scores are the same. Else it is what stands after
    the last "answer is", "Answer:" or "####", to the end of that sentence; else what math-verify finds in the text, mostly
    its last formula or number. An answer that math-verify is not done with in `seconds` is wrong, on a busy machine too. To say the
    problem's own expression again ("Factor $x^2 - 9$": x^2 - 9) is no answer, though it is equal. A number in a box may leave its base
    out (36 for 36_8), but not name another one (math-verify reads neither).
    """
    verifier = _verifier(seconds)

    def score(text: str, example: Example) -> Score:
        text = hide_asked(text, example)
        box = last_box(text)
        if box is not None:
            right = _squeezed(box) == _squeezed(example.source) or (
                _base(box) in (None, _base(example.source)) and verifier.equal(_formula(example.source), [_formula(box)])
            )
            return Score(float(right), float(right))
        if not text.strip():
            return Score(0.0, 0.0)
        return Score(0.0, float(verifier.equal(_formula(example.source), final_answer(text))))

    return score


def hide_asked(text: str, example: Example) -> str:
    """Returns the text with the letter Omega in place of expressions that the problem asks to have worked on."""
    for found in _ASKED.findall(example.query):
        asked = (found[1:-1] if found.startswith("$") else found[2:-2]).strip(" .\n")
        if re.search(r"[-+*/^\\]", asked) and len(asked) > 3 and _squeezed(asked) not in _squeezed(example.source):
            spaced = r"\s*".join(map(re.escape, _squeezed(asked)))
            text = re.sub(spaced, lambda _: r"\Omega ", text)
    return text


@functools.cache
def _verifier(seconds):
    return math_verifier.Verifier(seconds)


def last_box(text: str) -> str | None:
    r"""Returns what the last whole \boxed{...} or \boxed x of a text holds, or None. A box that was cut off is none."""
    opened, closed = [], {}  # each opening brace with the one that closes it, in one pass: boxes within boxes may go on and on
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ is no brace
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closed[opened.pop()] = brace.start()
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if text.startswith("{", start):
            if start in closed:
                return text[start + 1 : closed[start]].strip()
        elif match[0][-1].isspace():
            bare = _BARE.match(text, start)
            if bare:
                return bare[0].strip().rstrip(".")
    return None


def final_answer(text: str) -> list[str]:
    """Returns the final answer of a text without a box, in the forms in which math-verify may read it.

    There is none where a text only says what the answer is not.
    """
    found = list(_MARK.finditer(text))
    marks = [mark for mark in found if not mark["denied"]]
    if not marks:
        return [] if found else [text]
    lines = text[marks[-1].end() :].strip(" :*\t\n").splitlines() or [""]
    sentence = re.split(r"(?<=\S)\.(?=\s|$)|,?\s+(?:and\s+)?not\s", lines[0])[0].strip(" *")
    return [sentence] if "$" in sentence or r"\(" in sentence or r"\[" in sentence else [_formula(sentence), sentence]


def _formula(text):
    """Returns the text as one formula on one line, whose own dollar signs are gone but for those that are money."""
    return "$" + " ".join(re.sub(r"(?<!\\)\$", "", text).split()) + "$"


def _base(text):
    """Returns the base that a number names, such as the 8 of 36_8 or 36_{8}, or None."""
    found = re.fullmatch(r"\$?[0-9A-F.]+_\{?([0-9]+)\}?\$?", _squeezed(text))
    return found and found[1]


def _squeezed(text):
    return "".join(text.split())


def _example(id, row):
    way_out = "rows of math have the fields problem and solution; for others use task.name=jsonl"
    problem, solution = (rows.text(row, field, way_out) for field in ("problem", "solution"))
    gold = last_box(solution)
    if not gold:
        raise ValueError(rf"{row.where}: field 'solution' has no answer in \boxed{{}}: add it, or use task.name=jsonl")
    return Example(id, problem, solution, reference=gold, source=gold)
