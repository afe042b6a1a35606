"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems of grade school, whose answers end in a line `#### number`."""

import re
from fractions import Fraction

from metatuner_jax import config
from metatuner_jax.tasks import Example, Score, Task, rows

HUB = rows.Hub("openai/gsm8k", "main", {"train": 7473, "test": 1319})
INITIAL_PROMPT = (
    "Solve the problem step by step, in a few short lines. "
    "End with a last line that holds only #### and the final number, such as: #### 42"
)
_MARKED = re.compile(r"#### (\-?[0-9\.\,]+)")  # as its authors score
_NUMBER = re.compile(
    r"""(?<![0-9])(?<![0-9]\.)(?P<sign>(?<![\w)\]}])-)?\\?\$?\s?(?P<minus>(?<=\$)-)?
    (?P<top>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)
    (?:\s?/\s?(?P<bottom>[0-9]+(?:\.[0-9]+)?))?""",
    re.VERBOSE,
)


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for a setting that is known to be wrong without reading rows."""
    rows.check_options(task, ("config",))
    rows.check_splits(task, HUB)


def load(task: config.TaskConfig, seed: int) -> Task:
    """Returns the task. Its answers keep the reasoning and the last line, without the <<...>> calculator marks."""
    train, validation, test, dropped = rows.load_splits(task, seed, _example, HUB)
    return Task(task.name, "exact_match", task.initial_prompt or INITIAL_PROMPT, train, validation, test, score, dropped)


def score(text: str, example: Example) -> Score:
    """Returns strict: the number after the first "#### ", as the authors compare it; flexible: the last number in the text.

    The strict comparison is of the texts without commas, so "12.0" is not "12"; the flexible one is of the values.
    """
    strict = marked_number(text) == example.source
    flexible = strict or last_number(text) == last_number(example.source)
    return Score(float(strict), float(flexible))


def marked_number(text: str) -> str | None:
    """Returns what follows the first "#### ", without commas, or None."""
    match = _MARKED.search(text)
    return match and match[1].replace(",", "")


def last_number(text: str) -> Fraction | None:
    """Returns the value of the last number in the text, or None.

    Thousands may have commas; a currency sign, a percent sign, units and a full stop are passed over; 3/4 is one number.
    """
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None or len(last[0]) > 100:  # nobody writes such a number; to compare it would take long
        return None
    bottom = Fraction(last["bottom"] or 1)
    if bottom == 0:
        return None
    value = Fraction(last["top"].replace(",", "")) / bottom
    return -value if last["sign"] or last["minus"] else value


def _example(id, row):
    way_out = "rows of gsm8k have the fields question and answer; for others use task.name=jsonl"
    query, answer = (rows.text(row, field, way_out) for field in ("question", "answer"))
    number = marked_number(answer)
    if number is None or last_number(number) is None:
        raise ValueError(f"{row.where}: field 'answer' has no line '#### number': add it, or use task.name=jsonl")
    return Example(id, query, re.sub(r"<<.*?>>", "", answer), reference=number, source=number)
