"""Cosmos QA (Huang et al., arXiv 1909.00277): questions about what a blog text leaves unsaid, each with four choices."""

import re

from metatuner_jax import config
from metatuner_jax.tasks import Example, Score, Task, rows

# The repository's main branch is a loading script, which `datasets` no longer runs; the hub keeps its rows as Parquet beside it.
HUB = rows.Hub("allenai/cosmos_qa", None, {"train": 25262, "test": 2985}, revision="refs/convert/parquet")
INITIAL_PROMPT = "Read the text and choose the best answer to the question. Answer only with its letter: A, B, C or D."
LETTERS = "ABCD"
_WAY_OUT = "rows of cosmosqa have the fields context, question, answer0 to answer3 and label; for others use task.name=jsonl"


def check(task: config.TaskConfig) -> None:
    """Raises ValueError for a setting that is known to be wrong without reading rows."""
    rows.check_options(task, ("config",))
    rows.check_splits(task, HUB)


def load(task: config.TaskConfig, seed: int) -> Task:
    """Returns the task. Its queries show the text, the question and the choices A to D; its answers are letters.

    The labels of the published test split are secret: such rows, with label -1, are dropped and counted. As usual, the
    validation split is test where there is no other, and validation rows are cut from train.
    """
    train, validation, test, dropped = rows.load_splits(task, seed, _example, HUB, validation_as_test=True)
    return Task(task.name, "accuracy", task.initial_prompt or INITIAL_PROMPT, train, validation, test, score, dropped)


def _example(id, row):
    context, question, *choices = (
        rows.text(row, field, _WAY_OUT) for field in ("context", "question", *(f"answer{i}" for i in range(4)))
    )
    label = str(row.values.get("label"))  # a CSV file has it as text
    if label == "-1":
        return None
    if label not in ("0", "1", "2", "3"):
        raise ValueError(f"{row.where}: field 'label' is {row.values.get('label')!r}, not one of 0, 1, 2, 3; {_WAY_OUT}")
    letter = LETTERS[int(label)]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    query = f"{context}\n\nQuestion: {question}\n{listed}"
    return Example(id, query, letter, reference=letter, source=tuple(choices))


def score(text: str, example: Example) -> Score:
    """Returns whether the letter that the text chooses is the right one, as both scores: a choice is right however it is said."""
    return Score(*[float(chosen(text, example.source) == example.reference)] * 2)


# --- the chosen letter ---

# What is taken by *+ is not given back: else a text of a few hundred stars keeps the search busy for minutes.
_OPEN = r"[\s*_`\"'“‘$:]*+(?:\\(?:boxed|text|textbf)\{)*+[(\[]?+[*_]*+"
# "a man" and "I'd" are no letters; a lower-case "a" before a space is an article, and so is "A", but for "A because" and the like.
_LETTER = r"(?<![\w'’])(?:[B-Db-d](?![\w'’-])|[Aa](?![\w'’-])(?![ \t]+(?!(?i:because|since|as|is|and|or|which|here|would)\b)[a-z]))"
_KIND = r"(?i:answer|option|choice|letter)"
_SURELY = r"(?:[ \t]+(?i:most[ \t]+likely|definitely|probably|likely|clearly|certainly|simply|indeed|therefore|thus|actually)\b)?"
_IS = rf"(?:[ \t]+(?i:is|(?:would|should|must|has[ \t]+to)[ \t]+be)\b{_SURELY}[ \t:]*+|[ \t*_]*+:)"
_TO_THE_QUESTION = r"(?:[ \t]+(?i:to|for)\b[^.\n]{0,80}?)?"
_SAYS = [
    rf"{_KIND}{_TO_THE_QUESTION}{_IS}{_OPEN}(?:(?i:the[ \t]+)?{_KIND}[ \t]*+)?{_OPEN}(?P<x>{_LETTER})",
    rf"\b(?i:it)(?:['’]s\b{_SURELY}[ \t]*+|{_IS}){_OPEN}(?:(?i:the[ \t]+)?{_KIND}[ \t]*+)?{_OPEN}(?P<x>{_LETTER})(?=[)\]*_\"'”’]*(?:[.,;:!]|$|[ \t]+(?i:because|since|as)\b))",
    rf"(?i:choose|pick|select|go[ \t]+with)[ \t]+(?:(?i:the[ \t]+)?{_KIND}[ \t]+)?{_OPEN}(?P<x>{_LETTER})",
    rf"(?P<x>{_LETTER})[)\]*_.\"'”’]*[ \t]+is[ \t]+(?:(?i:the|most|more)[ \t]+)*(?i:correct|right|best|likely|accurate)\b",
]
_MENTIONS = [
    rf"^[ \t]*[*_]*[(\[]?(?P<x>{_LETTER})[)\].:]",
    rf"\A[\s*_]*(?P<x>{_LETTER})[*_]*(?:,?[ \t]+(?i:because|since|as)\b|[ \t]*\n[ \t]*\n)",
    rf"[(\[](?P<x>{_LETTER})[)\]]",
    rf"\b(?i:option|choice)[ \t]+{_OPEN}(?P<x>{_LETTER})",
    rf"(?:\\boxed\{{|\*\*)[(\[]?(?P<x>{_LETTER})[)\]]?(?:\}}|[.:]?\*\*)",
]
_NOT = re.compile(r"(?i:\bnot|n['’]t|\bnever|\bneither)\b(?:[ \t]+\w+){0,2}[ \t]*[*_\"'(\[]*$")
_SECOND = re.compile(rf"[)\]*_.\"'”’}}]*[ \t]*(?:,|/|&|(?:,[ \t]*)?(?i:and|or)\b)[ \t]*(?:{_KIND}[ \t]*+)?{_OPEN}(?P<x>{_LETTER})")
_DENIED = re.compile(
    r"[)\]*_.\"'”’}]*[ \t]+(?:is|are|was|can|could|does)(?:[ \t]+not\b|n['’]t\b|[ \t]+(?:incorrect|wrong|false)\b)"
)


def chosen(text: str, choices: tuple[str, ...]) -> str | None:
    """Returns the letter that a text chooses, or None where it chooses none or several.

    In this order, the first rule that finds anything deciding:

    1. The text is one letter, in any case, with what marks it: "b", "**B**", "(B)", "\\boxed{B}".
    2. Sentences that choose: "the answer is (B)", "Answer: B", "the correct option is B", "it's B", "I would choose B", "B is correct".
       The last one counts; where it goes on with "or C", "and C", ", C", it chooses none. "The answer is not B", "I would not choose
       B" and "I don't think B is right" are none of them.
    3. Letters marked as a choice: "B." or "B)" at the start of a line, "B because" or "B" and an empty line at the start of the text,
       "(B)", "option B", "**B**". All must be the same letter, so a text that repeats the list of choices chooses none. "Option B is
       wrong" is not counted.
    4. The full text of a choice, but for case and punctuation. It must be one alone, where a choice within a longer one
       that stands there is not counted.

    "A" before a word in lower case is an article, not a letter, unless that word is such as "because", "is" or "and".
    """
    bare = re.fullmatch(rf"{_OPEN}([A-Da-d])[)\]}}*_.:`\"'”’$\s]*", text)
    if bare:
        return bare[1].upper()
    says = [match for pattern in _SAYS for match in re.finditer(pattern, text) if not _NOT.search(text, 0, match.start())]
    says.sort(key=lambda match: match.start("x"))
    if says:
        letter, end = says[-1]["x"].upper(), says[-1].end("x")
        second = _SECOND.match(text, end)
        return None if second and second["x"].upper() != letter else letter
    marked = [match for pattern in _MENTIONS for match in re.finditer(pattern, text, re.MULTILINE)]
    letters = {match["x"].upper() for match in marked if not _DENIED.match(text, match.end("x"))}
    if letters:
        return letters.pop() if len(letters) == 1 else None
    said = f" {_words(text)} "
    found = {letter: _words(choice) for letter, choice in zip(LETTERS, choices, strict=True) if f" {_words(choice)} " in said}
    longest = [
        letter
        for letter, words in found.items()
        if not any(f" {words} " in f" {other} " != f" {words} " for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _words(text):
    return " ".join(re.findall(r"\w+", text.lower()))
