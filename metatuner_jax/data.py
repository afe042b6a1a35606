"""Token rows: chat templates cut into pieces around the prompt, padding, and the batch of each step."""

import dataclasses
import functools
import hashlib
import json
from typing import NamedTuple

import numpy as np

from metatuner_jax import config as config_lib
from metatuner_jax import processes
from metatuner_jax.tasks import Example

_PROMPT, _QUERY = "\x02prompt\x03", "\x02query\x03"  # stand-ins that no template and no text holds


@dataclasses.dataclass(frozen=True)
class Template:
    """The actor's chat template, cut where the prompt goes; prompts are spliced in as token ids."""

    prefix: tuple[int, ...]  # before the prompt
    between: str  # after the prompt, up to the query
    suffix: str  # after the query, up to the answer


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split as arrays. Queries are padded on the left, answers on the right."""

    examples: tuple[Example, ...]
    generator: np.ndarray  # int32 [rows, tg]: the generator's templated input
    generator_mask: np.ndarray  # bool
    own: np.ndarray  # bool [rows, tg]: the query's own tokens in it
    query: np.ndarray  # int32 [rows, tq]: the actor's input after the prompt
    query_mask: np.ndarray
    answer: np.ndarray  # int32 [rows, ta]: the answer to learn, end token included
    answer_mask: np.ndarray
    initial: np.ndarray  # int32 [rows, tp]: the initial prompt, end token included
    initial_mask: np.ndarray

    def __len__(self):
        return len(self.examples)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Columns of each part, the same for all splits, so that each pass compiles once."""

    generator: int
    query: int
    answer: int


class Tokens:
    """A tokenizer with its chat template, the special ids, and the run's meta-prompt."""

    def __init__(self, tokenizer, vocab_size: int, instruction: str, stop: tuple[str, ...] = ()):
        self.tokenizer, self.instruction, self.vocab_size, self.stop = tokenizer, instruction, vocab_size, stop
        self.template = make_template(tokenizer)
        self.end_id = end_id(tokenizer)
        self._plain = functools.lru_cache(maxsize=8)(lambda text: tuple(encode_piece(tokenizer, text, split_special_tokens=True)))
        self._around_query = self.encode(self.template.between), self.encode(self.template.suffix)
        text = _with_system(tokenizer, instruction, f"Instruction:\n{_PROMPT}\nQuestion:\n{_QUERY}")
        start, rest = text.split(_PROMPT)
        self._around_both = [self.encode(piece) for piece in (start, *rest.split(_QUERY))]

    @functools.cached_property
    def allowed(self) -> np.ndarray:
        """Which ids may be sampled, bool [vocab_size]: the tokenizer's own, of the special ones only the end token."""
        from metatuner_jax import pretrained

        allowed = np.arange(self.vocab_size) < len(self.tokenizer)
        allowed[[i for i in pretrained.special_ids(self.tokenizer) if i < self.vocab_size]] = False
        allowed[self.end_id] = True
        return allowed

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a piece of a longer text, nothing added at its ends."""
        return encode_piece(self.tokenizer, text)

    def plain(self, text: str) -> list[int]:
        """Returns the ids of a piece that somebody wrote, in which the name of a special token is only text."""
        return list(self._plain(text))

    def decode(self, ids, mask=None) -> str:
        """Returns the text of the real tokens, without the end token."""
        ids = [int(i) for i in (ids if mask is None else np.asarray(ids)[np.asarray(mask)]) if i != self.end_id]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def answers(self, ids, masks) -> list[str]:
        """Returns the texts of answers, each up to the first of the texts that it is to stop before."""
        texts = map(self.decode, ids, masks)
        return [min((text.partition(stop)[0] for stop in self.stop), key=len, default=text) for text in texts]

    def stopped_at(self, ids) -> int | None:
        """Returns how many of an answer's tokens there are when one of the texts that it is to stop before is whole; None where none is."""

        def holds_one(ids):
            text = self.decode(ids)
            return any(stop in text for stop in self.stop)

        return next(count for count in range(1, len(ids) + 1) if holds_one(ids[:count])) if holds_one(ids) else None

    def before_stop(self, ids) -> list[int]:
        """Returns an answer's tokens without those of the text that it stopped before, and of what they share with it; all where there is none."""
        if self.stopped_at(ids) is None:
            return list(ids)
        (text,) = self.answers([ids], [None])
        return list(ids[: max(count for count in range(len(ids)) if text.startswith(self.decode(ids[:count])))])

    def generator_ids(self, initial_prompt: str, query: str) -> tuple[list[int], list[bool]]:
        """Returns the generator's input for a query, and which of it are the query's own tokens."""
        start, between, after = self._around_both
        before, own = start + self.plain(initial_prompt) + between, self.plain(query)
        return before + own + after, [False] * len(before) + [True] * len(own) + [False] * len(after)

    def query_ids(self, query: str) -> list[int]:
        """Returns the actor's input after the prompt."""
        between, suffix = self._around_query
        return between + self.plain(query) + suffix

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns a prompt as the generator would write it, with the end token."""
        return [*self.plain(prompt), self.end_id]

    def answer_ids(self, answer: str) -> list[int]:
        """Returns the answer to learn, with the end token."""
        return [*self.plain(answer), self.end_id]


def end_id(tokenizer) -> int:
    """Returns the token that ends a turn: the one that the template puts after an assistant's message, or else eos."""
    from metatuner_jax import pretrained

    text = _render(tokenizer, [{"role": "user", "content": _QUERY}, {"role": "assistant", "content": _PROMPT}])
    after = tokenizer.encode(text.split(_PROMPT)[-1], add_special_tokens=False)
    if after and after[0] in pretrained.special_ids(tokenizer):  # Gemma 3's <end_of_turn> is special, and none of those that have a name
        return after[0]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, so no answer could end: set eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def make_template(tokenizer) -> Template:
    """Returns the chat template's pieces with the prompt as system message or, where it takes none, before the user's turn."""
    text = _with_system(tokenizer, _PROMPT, _QUERY)
    if text.count(_PROMPT) != 1 or text.count(_QUERY) != 1 or text.index(_PROMPT) > text.index(_QUERY):
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template does not show the system message and then the user's message, once each: it cannot be used; "
            "take another model, or mend chat_template in its folder"
        )
    prefix, rest = text.split(_PROMPT)
    between, suffix = rest.split(_QUERY)
    return Template(tuple(tokenizer.encode(prefix, add_special_tokens=False)), between, suffix)


def encode_piece(tokenizer, text: str, **settings) -> list[int]:
    """Returns the ids of a piece from inside a longer text.

    Tokenizers with SentencePiece's word mark put one before every text, as if a word began there: they are shown the piece after a
    character of its own, which is taken off again.
    """
    lead, taken = _lead(tokenizer)
    return tokenizer.encode(lead + text, add_special_tokens=False, **settings)[taken:]


@functools.lru_cache(maxsize=4)
def _lead(tokenizer) -> tuple[str, int]:
    """Returns what goes before each piece, and how many tokens that is."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    letter = tokenizer.convert_ids_to_tokens(encode("a"))
    if not letter:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer turns the letter a into no token at all: take the model's own tokenizer.json")
    return ("\x02", len(encode("\x02"))) if letter[0].startswith("\N{LOWER ONE EIGHTH BLOCK}") else ("", 0)


def _with_system(tokenizer, system, user):
    """Returns the text of the messages up to the answer, the system's before the user's words where the template takes no such role."""
    answer = {"add_generation_prompt": True}
    try:
        text = _render(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": user}], **answer)
    except ValueError:  # a template raises what it likes where it does not know the role
        text = None
    if text is not None and system.strip() in text:
        return text
    return _render(tokenizer, [{"role": "user", "content": f"{system}\n\n{user}"}], **answer)


def _render(tokenizer, messages, **settings):
    # Thinking models (Qwen3) open an empty thought when told not to think; Llama 3 would write today's date. Others ignore the words.
    words = {"enable_thinking": False, "date_string": "26 Jul 2024"} if settings else {}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings, **words)
    except Exception as error:  # a template is a program, and fails in as many ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template fails: {reason}; take another model, or mend chat_template in its folder"
        ) from error


# --- rows ---


class _Encoded(NamedTuple):
    """A row before it is padded."""

    example: Example
    generator: list[int]
    own: list[bool]
    query: list[int]
    answer: list[int]
    initial: list[int]


def make_rows(tokens: Tokens, config: config_lib.Config, initial_prompt: str, splits: dict[str, tuple[Example, ...]]):
    """Returns ({split: Rows}, Lengths, {split: (too long queries, too long answers)}).

    `initial_prompt` is that of all rows whose examples have none of their own. A query is too long where the generator's templated input passes generator.max_query_tokens, an answer where it passes
    actor.max_answer_tokens (of train rows alone: the others' answers are never fed). Such rows are dropped, or cut (the query's
    first tokens, the answer's last), as data.too_long says. Of several processes each tokenises its share.

    Raises:
      ValueError: an initial prompt is too long, or a split has no rows left.
    """
    limit_query, limit_answer = config.generator.max_query_tokens, config.actor.max_answer_tokens
    limit_prompt = config.generator.max_prompt_tokens
    prompt_of = lambda example: example.initial_prompt or initial_prompt
    prompts = {prompt: tokens.prompt_ids(prompt) for prompt in {prompt_of(e): None for part in splits.values() for e in part}}
    for prompt, ids in prompts.items():
        if len(ids) > limit_prompt:
            raise ValueError(
                f"generator.max_prompt_tokens={limit_prompt} is less than the initial prompt needs ({len(ids)} tokens with the end "
                "token): raise it, or shorten task.initial_prompt"
            )
        template_tokens = len(tokens.generator_ids(prompt, "")[0])
        if template_tokens >= limit_query:
            raise ValueError(
                f"generator.max_query_tokens={limit_query} leaves no room for a query: the template with the initial prompt takes "
                f"{template_tokens} tokens; raise it"
            )

    def encode(example):
        return *tokens.generator_ids(prompt_of(example), example.query), tokens.query_ids(example.query), tokens.answer_ids(example.answer)

    encoded, too_long = {}, {}
    for split, examples in splits.items():
        kept, long_queries, long_answers = [], 0, 0
        for example, (ids, own, query, answer) in zip(examples, processes.group.shared(encode, examples), strict=True):
            surplus = max(len(ids) - limit_query, 0)
            long_answer = split == "train" and len(answer) > limit_answer
            long_queries, long_answers = long_queries + (surplus > 0), long_answers + long_answer
            if (surplus or long_answer) and config.data.too_long == "drop":
                continue
            if surplus:
                ids, own, query = _shorten(tokens, ids, own, query, surplus)
            kept.append(_Encoded(example, ids, own, query, answer[:limit_answer], prompts[prompt_of(example)]))
        if not kept:
            raise ValueError(
                f"no {split} row is left of {len(examples)}: {long_queries} have a query above generator.max_query_tokens="
                f"{limit_query}, {long_answers} an answer above actor.max_answer_tokens={limit_answer}; raise them, or set data.too_long=cut"
            )
        encoded[split], too_long[split] = kept, (long_queries, long_answers)
    every = [row for rows in encoded.values() for row in rows]
    lengths = Lengths(*(max(len(getattr(row, part)) for row in every) for part in ("generator", "query", "answer")))
    return {split: _pad_rows(rows, lengths, limit_prompt) for split, rows in encoded.items()}, lengths, too_long


def query_rows(tokens: Tokens, config: config_lib.Config, initial_prompt: str, queries: list[str]) -> Rows:
    """Returns rows that are to be answered, as wide as queries may be, whose answers are not known.

    Raises:
      ValueError: a query is empty, or too long and data.too_long is not 'cut'.
    """
    limit, encoded = config.generator.max_query_tokens, []
    for number, text in enumerate(queries, 1):
        if not text.strip():
            raise ValueError(f"query {config_lib.short(text)} is empty: give it some text")
        ids, own = tokens.generator_ids(initial_prompt, text)
        query, surplus = tokens.query_ids(text), max(len(ids) - limit, 0)
        if surplus and config.data.too_long != "cut":
            raise ValueError(
                f"query {config_lib.short(text)} takes {len(ids)} tokens with the template, above generator.max_query_tokens={limit}: shorten it, or set data.too_long=cut"
            )
        if surplus:
            ids, own, query = _shorten(tokens, ids, own, query, surplus)
        example = Example(str(number), text, answer="", reference="")
        encoded.append(_Encoded(example, ids, own, query, [tokens.end_id], tokens.prompt_ids(initial_prompt)))
    return _pad_rows(encoded, Lengths(limit, max(limit, *(len(row.query) for row in encoded)), 1), config.generator.max_prompt_tokens)


def _shorten(tokens, ids, own, query, surplus):
    """Returns a row's generator's input, what of it are the query's own tokens, and the actor's input, without the query's first tokens."""
    first = own.index(True)
    ids, own = ids[:first] + ids[first + surplus :], own[:first] + own[first + surplus :]
    first = len(tokens.encode(tokens.template.between))
    return ids, own, query[:first] + query[first + surplus :]


def largest_id(rows: dict[str, Rows], tokens: Tokens) -> int:
    """Returns the largest token id that a run reads."""
    parts = [getattr(part, name) for part in rows.values() for name in ("generator", "query", "answer", "initial")]
    return max(int(np.max(part, initial=0)) for part in [*parts, np.array(tokens.template.prefix, np.int32)])


def digest(rows: dict[str, Rows]) -> dict[str, str]:
    """Returns a SHA-256 sum of each split's ids, queries and answers, and of the initial prompts' tokens."""
    initial = [part.initial.tolist() for part in rows.values()]
    return {**digest_texts({split: part.examples for split, part in rows.items()}), "initial_prompt": _sum_of(initial)}


def digest_texts(splits: dict[str, tuple[Example, ...]]) -> dict[str, str]:
    """Returns a SHA-256 sum of each split's ids, queries and answers."""
    return {split: _sum_of([[e.id, e.query, e.answer] for e in examples]) for split, examples in splits.items()}


def _sum_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _pad_rows(encoded, lengths, prompt_tokens):
    examples, generator, own, query, answer, initial = zip(*encoded)
    generator, generator_mask = pad(generator, lengths.generator, "left")
    own, _ = pad(own, lengths.generator, "left")
    query, query_mask = pad(query, lengths.query, "left")
    answer, answer_mask = pad(answer, lengths.answer, "right")
    initial, initial_mask = pad(initial, prompt_tokens, "right")
    return Rows(examples, generator, generator_mask, own.astype(bool), query, query_mask, answer, answer_mask, initial, initial_mask)


def pad(rows, length: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of ids as int32 [rows, length] with zeros on one side, and the mask of what is real."""
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, True
    return ids, mask


# --- the batch of a step ---


def order_at(step: int, num_rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns the rows of a step of a phase: a new shuffle every epoch, a function of the step alone; batches may span two epochs."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(places // num_rows):
        inside = places // num_rows == epoch
        shuffle = np.random.default_rng([seed, 1, int(epoch)]).permutation(num_rows)
        rows[inside] = shuffle[places[inside] % num_rows]
    return rows


def batch_at(step: int, rows: Rows, experts, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the batch of a step, from its number and the expert set alone.

    Args:
      experts: the best prompt so far of each train row (see `rollout.Experts`).
    """
    return batch_of(order_at(step, len(rows), batch_size, seed), rows, experts)


def batch_of(index, rows: Rows, experts) -> dict[str, np.ndarray]:
    """Returns rows as a batch, with the best prompt so far of each, and as `rows` their places, which are not for the step."""
    expert, expert_mask = experts.tokens_of(index)
    names = ("generator", "generator_mask", "own", "query", "query_mask", "answer", "answer_mask", "initial", "initial_mask")
    return {**{name: getattr(rows, name)[index] for name in names}, "expert": expert, "expert_mask": expert_mask, "rows": np.asarray(index)}


_LEFT, _RIGHT = ("generator", "query"), ("answer", "chosen", "rejected")  # the side on which they are padded


def parts_of(name: str, mask: np.ndarray, buckets: int) -> np.ndarray:
    """Returns how many of `buckets` parts of its width hold each row, int [rows]; `mask` is bool [rows, t], of the tokens called `name`."""
    width = mask.shape[1]
    places = np.arange(width)
    needed = np.where(mask, width - places if name in _LEFT else places + 1, 0).max(axis=1, initial=0)
    return -(-needed * buckets // width)


def trim(batch: dict[str, np.ndarray], buckets: int) -> dict[str, np.ndarray]:
    """Returns a batch without most of the columns that are padding in all of its rows.

    Queries and answers are cut to the least of 1, 2 .. `buckets` parts of their width that holds them, the same number for all of
    them, so that no more than `buckets` shapes are ever compiled. Prompts keep their width.
    """
    masks = {name: batch[name + "_mask"] for name in (*_LEFT, *_RIGHT) if name in batch}
    parts = max([1, *(int(parts_of(name, mask, buckets).max(initial=0)) for name, mask in masks.items())])
    trimmed = dict(batch)
    for name, mask in masks.items():
        width = -(-mask.shape[1] * parts // buckets)
        for key in (name, name + "_mask", *(["own"] if name == "generator" else [])):
            trimmed[key] = batch[key][:, -width:] if name in _LEFT else batch[key][:, :width]
    return trimmed
