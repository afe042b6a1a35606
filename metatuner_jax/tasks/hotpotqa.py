"""HotpotQA (Yang et al., arXiv 1809.09600), distractor setting: questions over ten paragraphs, of which two hold the answer."""

import collections
import re
import string

from metatuner_jax import config
from metatuner_jax.tasks import Example, Score, Task, rows

HUB = rows.Hub("hotpotqa/hotpot_qa", "distractor", {"train": 90447, "test": 7405})
INITIAL_PROMPT = "Answer the question from the paragraphs. Give only the answer, in as few words as you can, with no explanation."
_WAY_OUT = "rows of hotpotqa have the fields question, answer, context and supporting_facts; for others use task.name=jsonl"


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for a setting that is known to be wrong without reading rows."""
    rows.check_options(task, ("config",), numbers=("paragraphs",))
    paragraphs = task.options.get("paragraphs")
    if paragraphs is not None and (paragraphs != int(paragraphs) or paragraphs < 2):
        raise ValueError(f"task.options.paragraphs={paragraphs!r} must be a whole number of at least 2: two hold the answer")
    rows.check_splits(task, HUB)


def load(task: config.TaskConfig, seed: int) -> Task:
    """Returns the task. Its queries show the paragraphs, each after its title, and then the question.

    The answers of the published test split are secret. As usual, the validation split is test where there is no other,
    and validation rows are cut from train. With the option `paragraphs` a query shows at most that many: all that the
    answer needs, then the first of the others, in the original order. That is easier than the published setting, which
    shows all ten.
    """
    paragraphs = task.options.get("paragraphs")

    def example(id, row):
        if row.values.get("answer", "") is None:
            return None
        question, answer = (rows.text(row, field, _WAY_OUT) for field in ("question", "answer"))
        titles, texts = _context(row)
        if paragraphs is not None:
            needed = {i for i, title in enumerate(titles) if title in _lists(row, "supporting_facts", ("title",))[0]}
            others = [i for i in range(len(titles)) if i not in needed]
            kept = sorted([*needed, *others[: max(int(paragraphs) - len(needed), 0)]])
            titles, texts = ([values[i] for i in kept] for values in (titles, texts))
        shown = [f"{title}: {text}" for title, text in zip(titles, texts, strict=True)]
        return Example(id, "\n\n".join([*shown, f"Question: {question}"]), answer, reference=answer)

    train, validation, test, dropped = rows.load_splits(task, seed, example, HUB, validation_as_test=True)
    return Task(task.name, "exact_match", task.initial_prompt or INITIAL_PROMPT, train, validation, test, score, dropped)


def score(text: str, example: Example) -> Score:
    """Returns strict: the whole text is the answer after `normalize`; flexible: F1 of their words, as the authors score.

    An answer of articles or punctuation alone, which `normalize` leaves nothing of, is compared as it is written but for case:
    there alone this differs from hotpot_evaluate_v1.py, the authors' script, in which an empty text would match it.
    """
    found, gold = normalize(text), normalize(example.reference)
    strict = found == gold if gold else text.lower().split() == example.reference.lower().split()
    return Score(float(strict), max(float(strict), f1(found, gold)))


def f1(found: str, gold: str) -> float:
    """Returns the harmonic mean of precision and recall of the words; yes, no and noanswer are right whole or not at all."""
    if found != gold and {found, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    ours, theirs = found.split(), gold.split()
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def normalize(text: str) -> str:
    """Returns the text in lower case, without ASCII punctuation and articles, its words one space apart."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _context(row):
    """Returns the titles and the texts of the paragraphs."""
    titles, sentences = _lists(row, "context", ("title", "sentences"))
    if len(titles) != len(sentences) or not titles:
        raise ValueError(
            f"{row.where}: field 'context' has {len(titles)} titles and {len(sentences)} paragraphs: give each its title"
        )
    return titles, [" ".join(" ".join(paragraph).split()) for paragraph in sentences]


def _lists(row, field, names):
    """Returns the lists of a field that is an object of lists, such as {"title": [...], "sentences": [[...], ...]}."""
    value = row.values.get(field)
    found = [value.get(name) for name in names] if isinstance(value, dict) else [None]
    if not all(isinstance(items, (list, tuple)) for items in found):
        raise ValueError(f"{row.where}: field {field!r} is no object with lists named {' and '.join(names)}; {_WAY_OUT}")
    return found
