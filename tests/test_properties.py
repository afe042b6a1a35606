"""What holds for any text, any padding, any row and any setting: scorers, packing, batches and the config parser.

The same few examples each time; with SOAK=1 in the environment many more, drawn anew.
"""

import dataclasses
import functools
import json
import os
import string
import time
import typing

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTOR, END, GENERATOR, make_setup, scores_of
from hypothesis import assume, example, given
from hypothesis import strategies as st

from metatuner_jax import actor, config, data, generator, pretrained, tasks, transformer
from metatuner_jax.tasks import Example, Score, competition_math, cosmosqa, gsm8k, hotpotqa, jsonl, mixture

hypothesis.settings.register_profile("few", max_examples=30, derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("soak", max_examples=1000, database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("soak" if os.environ.get("SOAK") else "few")
few = hypothesis.settings(max_examples=300 if os.environ.get("SOAK") else 12)  # for what takes long

# --- scorers: texts ---

WORDS = st.sampled_from(["red", "blue", "seven", "house", "was", "it", "yes", "no", "noanswer", "running", "Zürich"])
_PIECES = st.sampled_from(
    ["answer is", "Answer:", "the answer is not", "\\boxed{", "\\boxed", "\\text{", "}", "{", "\\", "$", "**", "*", "_", " ", "\n", "\t", "####", "#### ",
     "1,200", "1,", "3/4", "1/0", "-", ".", ",", ":", "A", "(B)", "it's ", "it is ", "option ", "I would choose ", "is right", "not ", "or C", "<answer>",
     "</answer>", "1e999999999", "9**9**9**9", "9!", "(", "[1, 2]", "x^2", "**99", "İ", "½", "٣", "²", "\x00", "yes", "a", "the", "|"]
)  # fmt: skip
# What models write: prose, marks, and one thing over and over up to the length limit.
REPEATED = st.tuples(_PIECES | st.text(max_size=4), st.sampled_from([1, 1, 1, 2, 3, 300])).map(lambda pair: pair[0] * pair[1])
TEXTS = st.text() | st.lists(REPEATED, max_size=8).map("".join)
REFERENCES = TEXTS.map(lambda text: text.strip()[:200].strip()).filter(bool)  # as `rows.text` gives them
NUMBERS = st.builds(lambda sign, whole, rest: f"{sign}{whole}{rest}", st.sampled_from(["", "-"]), st.integers(0, 10**7), st.sampled_from(["", ".5", ".00", ".125"]))


def gold(reference, source=None, query="q"):
    return Example("x", query, reference, reference, source)


def letters_of(choices):
    return st.sampled_from("ABCD").map(lambda letter: gold(letter, choices))


SCORERS = {
    "gsm8k": (gsm8k.score, NUMBERS.map(lambda n: gold(n, n)), "#### {}"),
    "exact_match": (jsonl.exact_match, REFERENCES.map(gold), "{}"),
    "contains": (jsonl.contains, REFERENCES.map(gold), "{}"),
    "number": (jsonl.number, (NUMBERS | NUMBERS.map("#### {} of them".format) | REFERENCES.filter(gsm8k.last_number)).map(gold), "{}"),
    "hotpotqa": (hotpotqa.score, REFERENCES.map(gold), "{}"),
    "cosmosqa": (cosmosqa.score, st.tuples(*[REFERENCES] * 4).flatmap(letters_of), "{}"),
}
# Verifiers that evaluate the text, make numbers of it, or look for the answer in it.
GYM = ("coin_flip", "countdown", "decimal_arithmetic", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration",
       "spiral_matrix", "word_sequence_reversal")  # fmt: skip


@functools.cache
def gym(name):
    loaded = tasks.load(config.TaskConfig(f"reasoning_gym:{name}", num_train=1, num_validation=1, num_test=1), seed=3)
    return loaded.score, loaded.train[0]


def scored(score, text, example):
    """Returns the score, once it is seen to be one and to have come soon."""
    start = time.process_time()
    found = score(text, example)
    assert time.process_time() - start < 10, repr(text)  # what hangs takes minutes
    assert 0 <= found.strict <= found.flexible <= 1 and found.strict in (0, 1)
    return found


@pytest.mark.parametrize("name", SCORERS)
@given(data=st.data())
def test_any_text_has_a_score_soon_and_the_reference_is_right(name, data):
    score, examples, said = SCORERS[name]
    case, text = data.draw(examples), data.draw(TEXTS)
    found = scored(score, text, case)
    assert found.flexible in (0, 1) or name == "hotpotqa"
    assert scored(score, said.format(case.reference), case) == Score(1, 1)


@pytest.mark.parametrize("name", GYM)
@few
@given(text=TEXTS)
@example("1e999999999")
@example("The answer is 1E+99999999")
def test_no_verifier_of_reasoning_gym_raises_or_hangs(name, text):
    score, case = gym(name)
    assert scored(score, text, case).flexible in (0, 1)
    assert scored(score, f" {case.reference}\n", case) == Score(1, 1)


@pytest.fixture(scope="module")
def math_score():
    return competition_math.make_score(10.0)


@few
@given(text=TEXTS, reference=st.sampled_from(["5", r"\frac{1}{4}", "x^2+1", r"\text{Friday}", "36_8", "(2,3)"]))
def test_any_text_has_a_score_in_math(math_score, text, reference):
    case = gold(reference, reference)
    assert scored(math_score, text, case) in (Score(0, 0), Score(0, 1), Score(1, 1))


# --- scorers: what makes no difference ---

SPACES = st.sampled_from([" ", "\n", "\t ", "  "])
SENTENCES = st.lists(WORDS, min_size=1, max_size=6)


def joined(words, data):
    """Returns the words with white space of any kind between and around them."""
    return "".join(data.draw(SPACES) + word for word in words) + data.draw(SPACES)


@given(words=SENTENCES, others=SENTENCES, data=st.data())
def test_case_and_white_space_make_no_difference_to_words(words, others, data):
    case = gold(" ".join(others))
    for score in (jsonl.exact_match, jsonl.contains, hotpotqa.score):
        plain, odd = score(" ".join(words), case).flexible, joined(words, data)
        assert score(odd, case).flexible == score(odd.upper(), case).flexible == score(odd.title(), case).flexible == plain
    assert jsonl.exact_match(data.draw(SPACES) + case.reference + data.draw(SPACES), case) == Score(1, 1)
    assert jsonl.exact_match(" ".join(words), case).strict == float(words == others)


@given(words=SENTENCES, others=SENTENCES, marks=st.lists(st.sampled_from("!?;'\"()*"), min_size=12, max_size=12), articles=st.lists(st.booleans(), min_size=6, max_size=6))
def test_punctuation_and_articles_make_no_difference_to_words(words, others, marks, articles):
    case = gold(" ".join(others))
    odd = " ".join(("the " if article else "") + a + word + b for word, a, b, article in zip(words, marks, marks[6:], articles))
    for score in (jsonl.exact_match, hotpotqa.score):
        assert score(odd, case).flexible == score(" ".join(words), case).flexible
    everywhere = "".join(char + mark for char, mark in zip(" ".join(words), string.punctuation * 9))
    assert hotpotqa.score(everywhere, case) == hotpotqa.score(" ".join(words), case)


@given(words=SENTENCES, others=SENTENCES, data=st.data())
def test_f1_is_symmetric_bounded_and_blind_to_order(words, others, data):
    a, b = " ".join(words), " ".join(others)
    found = hotpotqa.f1(a, b)
    assert 0 <= found == hotpotqa.f1(b, a) <= 1
    special = {a, b} & {"yes", "no", "noanswer"}
    if not special:
        assert (found == 1) == (sorted(words) == sorted(others)) and (found == 0) == (not set(words) & set(others))
        assert hotpotqa.f1(" ".join(data.draw(st.permutations(words))), b) == pytest.approx(found)
    assert found == float(a == b) or not special


@given(text=TEXTS | st.text("thean .-’"))
@example("tahe man")
def test_normalising_twice_is_normalising_once(text):
    assert hotpotqa.normalize(hotpotqa.normalize(text)) == hotpotqa.normalize(text)


@given(text=TEXTS, other=TEXTS, more=st.sampled_from(["!", " a", "b", ".5"]))
def test_equality_is_symmetric(text, other, more):
    a = text.strip() or "x"
    for b in (other.strip() or "y", a + more):
        assert jsonl.exact_match(a, gold(b)) == jsonl.exact_match(b, gold(a))


@given(number=NUMBERS, other=NUMBERS, before=st.sampled_from(["", "So she pays ", "It is: ", "#### ", "= "]), currency=st.sampled_from(["", "$", r"\$"]),
       after=st.sampled_from(["", ".", "%", " kg", "kg", " apples.", "\n", " dollars in all!"]), commas=st.booleans(), zeros=st.booleans())  # fmt: skip
def test_thousands_separators_units_and_currency_make_no_difference_to_a_number(number, other, before, currency, after, commas, zeros):
    sign, digits = "-" * number.startswith("-"), number.lstrip("-")
    whole, _, rest = digits.partition(".")
    written = f"{int(whole):,}" if commas else whole
    written += (f".{rest}" if rest else "") + ("0" if zeros and rest else "")
    text = before + sign + currency + written + after
    assert gsm8k.last_number(text) == gsm8k.last_number(number)
    same = float(gsm8k.last_number(number) == gsm8k.last_number(other))
    for score in (gsm8k.score, jsonl.number):
        assert score(text, gold(other, other)).flexible == same == score(other, gold(number, number)).flexible
    assert jsonl.number(sign + written, gold(other)).strict == same
    if not currency:
        assert gsm8k.score(f"#### {sign}{written}", gold(number, number)).strict == float(sign + written.replace(",", "") == number)


@given(letter=st.sampled_from("ABCD"), said=st.sampled_from(["{}", "**{}**", "({})", r"\boxed{{{}}}", "The answer is ({}).", "Answer: {}", "It's {}.", "I would choose {}.", "{} is correct."]),
       choices=st.tuples(*[REFERENCES] * 4))  # fmt: skip
def test_a_letter_is_chosen_however_it_is_said(letter, said, choices):
    assert cosmosqa.chosen(said.format(letter), choices) == letter


@given(choices=st.lists(st.lists(st.sampled_from(["red", "blue", "seven", "house", "running"]), min_size=3, max_size=3).map(" ".join), min_size=4, max_size=4, unique=True),
       at=st.integers(0, 3), data=st.data())  # fmt: skip
def test_a_choice_said_in_full_is_chosen_but_for_case_and_punctuation(choices, at, data):
    said = joined([data.draw(st.sampled_from(["{}", "{},", '"{}"', "{}!"])).format(word) for word in choices[at].split()], data)
    assert cosmosqa.chosen(said, tuple(choices)) == cosmosqa.chosen(said.upper(), tuple(choices)) == cosmosqa.LETTERS[at]
    assert cosmosqa.chosen(f"{said} or {choices[at - 1]}", tuple(choices)) is None


BOXED = st.recursive(st.text("x12 +^\\,", max_size=5).map(lambda t: t.rstrip("\\")), lambda inner: st.lists(inner.map("{{{}}}".format) | inner, max_size=3).map("".join))


@given(inside=BOXED, before=TEXTS | st.just("First \\boxed{7}. No: "), after=st.text("ab .$\n"), data=st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.filter_too_much])
def test_the_last_box_is_found_after_any_text_and_latex_spacing_makes_no_difference(math_score, inside, before, after, data):
    assume("\\{" not in inside and "\\}" not in inside and inside.strip())
    assert competition_math.last_box(f"{before}\\boxed{{{inside}}}{after}") == inside.strip()
    spaced = "".join(char + data.draw(st.sampled_from(["", " ", "\n"])) for char in inside.replace("\\", ""))
    assert math_score(f"so \\boxed{{{spaced}}}{after}", gold("", inside.replace("\\", ""))) == Score(1, 1)


@given(total=st.integers(0, 10**6), weights=st.lists(st.floats(1e-300, 1e308), min_size=1, max_size=6))
def test_shares_of_a_mixture_add_up_and_are_next_to_exact(total, weights):
    found, largest = mixture.shares(total, weights), max(weights)
    assert sum(found) == total
    scaled = [weight / largest for weight in weights]
    assert all(abs(share - total * weight / sum(scaled)) < 1 + 1e-9 * total for share, weight in zip(found, scaled, strict=True))


# --- the packed pass and the actor's rows: one shape, any padding ---

IDS = st.lists(st.integers(3, GENERATOR.vocab_size - 1), min_size=8, max_size=8)


@st.composite
def padded(draw, width, side):
    """Returns a row of ids and its mask: holes anywhere but in the last column, or padding on the right alone."""
    ids = np.array((draw(IDS) * 2)[:width], np.int32)
    if side == "left":
        return ids, np.array([*draw(st.lists(st.booleans(), min_size=width - 1, max_size=width - 1)), True])
    return ids, np.arange(width) < draw(st.integers(1, width))


def stacked(*widths_and_sides):
    """Returns a strategy of two rows of each kind, as [(ids, mask), ...]."""
    rows = [st.lists(padded(*kind), min_size=2, max_size=2) for kind in widths_and_sides]
    return st.tuples(*rows).map(lambda kinds: [tuple(np.stack(part) for part in zip(*kind)) for kind in kinds])


def elsewhere(ids, mask):
    """Returns other ids where there is padding."""
    return np.where(mask, ids, (ids + 7) % GENERATOR.vocab_size)


@pytest.fixture(scope="module")
def packed(networks):
    """(packed logits of query, sampled and expert prompt; the same of one row alone)."""
    setup = make_setup()
    frozen, params = networks(setup)
    weights, loras = generator.language_model(setup, params, frozen)

    @jax.jit
    def run(params, frozen, query, sampled, expert):
        own = jnp.zeros_like(query[1])
        prefill = generator.start(setup, params, frozen, generator.read(setup, params, frozen, *query, own))
        states = generator.packed(setup, params, frozen, prefill, [sampled, expert])
        return [transformer.logits(GENERATOR, generator.language_model(setup, params, frozen)[0], x) for x in states]

    def alone(query, prompt):
        return scores_of(GENERATOR, weights, np.concatenate([query, prompt]), loras)[len(query) - 1 : -1]

    return lambda *parts: [np.array(x) for x in run(params, frozen, *parts)], alone


@few
@given(parts=stacked((6, "left"), (5, "right"), (4, "right")))
def test_packed_prompts_score_as_they_do_alone_and_do_not_see_each_other_or_padding(packed, parts):
    together, alone = packed
    query, *prompts = parts
    found = together(*parts)
    other = [elsewhere(ids, np.zeros_like(mask)) for ids, mask in prompts]
    hidden = together(*((elsewhere(ids, mask), mask) for ids, mask in parts))
    without = [together(query, (other[0], prompts[0][1]), prompts[1])[1], together(query, prompts[0], (other[1], prompts[1][1]))[0]][::-1]
    for logits, same, apart, (ids, mask) in zip(found, hidden, without, prompts):
        for row in range(2):
            real = mask[row]
            expected = alone(query[0][row][query[1][row]], ids[row][real])
            np.testing.assert_allclose(logits[row][real], expected, atol=5e-5)
            np.testing.assert_allclose(same[row][real], logits[row][real], atol=1e-6)
            np.testing.assert_allclose(apart[row][real], logits[row][real], atol=1e-6)


@pytest.fixture(scope="module")
def answers(networks):
    """(likelihoods of the tokens of answers, one row's alone, the splice)."""
    setup = make_setup()
    frozen, _ = networks(setup)
    run = jax.jit(lambda frozen, *parts: actor.log_likelihoods(setup, frozen, None, *parts))

    def alone(ids, answer):
        scores = jax.nn.log_softmax(scores_of(ACTOR, frozen.actor, np.concatenate([ids, answer]))[len(ids) - 1 : -1])
        return [float(scores[i, token]) for i, token in enumerate(answer)]

    splice = jax.jit(functools.partial(actor.splice, setup))
    return lambda *parts: np.array(run(frozen, *parts)), alone, lambda *parts: [np.array(x) for x in splice(*parts)], setup


@few
@given(parts=stacked((5, "right"), (7, "left"), (4, "right")), ends=st.lists(st.booleans(), min_size=10, max_size=10))
def test_the_spliced_row_is_template_words_and_query_whatever_the_padding(answers, parts, ends):
    likelihoods, alone, splice, setup = answers
    (prompt, prompt_mask), (query, query_mask), (answer, answer_mask) = parts
    prompt = np.where(np.reshape(ends, (2, 5)), END, prompt)
    tokens, mask = splice(prompt, prompt_mask, query, query_mask)
    found = likelihoods(prompt, prompt_mask, query, query_mask, answer)
    hidden = likelihoods(elsewhere(prompt, prompt_mask), prompt_mask, elsewhere(query, query_mask), query_mask, elsewhere(answer, answer_mask))
    for row in range(2):
        words = [token for token in prompt[row][prompt_mask[row]] if token != END]
        ids = [*setup.prefix, *words, *query[row][query_mask[row]]]
        assert list(tokens[row][mask[row]]) == ids and mask[row, -1]
        real = answer_mask[row]
        np.testing.assert_allclose(found[row][real], alone(ids, answer[row][real]), atol=5e-5)
        np.testing.assert_allclose(hidden[row][real], found[row][real], atol=1e-6)


# --- padding and trimming ---


@given(rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=5), more=st.integers(0, 3), side=st.sampled_from(["left", "right"]))
def test_padding_keeps_every_token_in_order(rows, more, side):
    length = max([0, *map(len, rows)]) + more
    ids, mask = data.pad(rows, length, side)
    assert ids.shape == mask.shape == (len(rows), length) and not ids[~mask].any()
    for row, tokens, real in zip(rows, ids, mask):
        assert tokens[real].tolist() == row and mask.sum() == sum(map(len, rows))
        assert not row or real[-1 if side == "left" else 0]
    again, mask_again = data.pad(ids, length, side)
    assert np.array_equal(again, ids) and mask_again.all()


WIDTHS = {"generator": 9, "query": 8, "answer": 5, "chosen": 7}


@st.composite
def batches(draw):
    rows, batch = draw(st.integers(1, 3)), {"expert": np.arange(6)}
    for name, width in WIDTHS.items():
        ids = [list(range(1, 1 + draw(st.integers(0, width)))) for _ in range(rows)]
        batch[name], batch[name + "_mask"] = data.pad(ids, width, "left" if name in ("generator", "query") else "right")
    return {**batch, "own": batch["generator_mask"]}


@given(batch=batches(), buckets=st.integers(1, 6))
def test_trimming_keeps_every_token_and_has_few_widths(batch, buckets):
    trimmed = data.trim(batch, buckets)
    shapes = [tuple(-(-width * parts // buckets) for width in WIDTHS.values()) for parts in range(1, buckets + 1)]
    found = tuple(trimmed[name].shape[1] for name in WIDTHS)
    assert found in shapes and trimmed["expert"] is batch["expert"] and trimmed["own"].shape == trimmed["generator"].shape
    for whole in (trimmed, data.trim(trimmed, buckets)):
        for name in WIDTHS:
            assert whole[name][whole[name + "_mask"]].tolist() == batch[name][batch[name + "_mask"]].tolist()
            assert np.array_equal(whole[name + "_mask"].sum(1), batch[name + "_mask"].sum(1))
    needed = [batch[name + "_mask"].sum(1).max() for name in WIDTHS]
    assert found == next(shape for shape, parts in zip(shapes, range(1, buckets + 1)) if all(w * parts >= n * buckets for w, n in zip(WIDTHS.values(), needed)))
    assert {key: value.tolist() for key, value in data.trim(batch, 1).items()} == {key: value.tolist() for key, value in batch.items()}


@given(width=st.integers(1, 40), real=st.integers(0, 40), buckets=st.integers(1, 9), name=st.sampled_from(["query", "answer"]))
def test_a_rows_parts_are_the_fewest_that_hold_it(width, real, buckets, name):
    real = min(real, width)
    _, mask = data.pad([[1] * real], width, "left" if name == "query" else "right")
    (parts,) = data.parts_of(name, mask, buckets)
    assert 0 <= parts <= buckets and width * parts >= real * buckets > width * (parts - 1)


# --- the batch of a step ---


@given(num_rows=st.integers(1, 40), batch_size=st.integers(1, 25), seed=st.integers(0, 2**31 - 1), epochs=st.integers(1, 3))
def test_every_row_comes_once_an_epoch_and_the_step_alone_decides(num_rows, batch_size, seed, epochs):
    steps = -(-epochs * num_rows // batch_size)
    order = np.concatenate([data.order_at(step, num_rows, batch_size, seed) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    for step in reversed(range(steps)):  # in any order, and wherever it is asked for first
        assert np.array_equal(data.order_at(step, num_rows, batch_size, seed), order[step * batch_size : (step + 1) * batch_size])


@pytest.fixture(scope="module")
def tokens(tiny_model):
    return data.Tokens(pretrained.load_tokenizer(str(tiny_model)), 400, "rewrite")


QUERIES = st.lists(st.sampled_from(["reverse ", "one two ", "<|im_end|>", "é", "\n", "  ", "😀"]) | st.text(max_size=4), max_size=12).map("".join)


@given(prompt=QUERIES, query=QUERIES)
def test_any_prompt_and_query_are_the_text_of_the_whole_template(tokens, prompt, query):
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": query}]
    whole = tokens.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = [*tokens.template.prefix, *tokens.plain(prompt), *tokens.query_ids(query)]
    assert tokens.tokenizer.decode(ids) == whole and tokens.decode(tokens.prompt_ids(prompt)) == prompt
    assert tokens.end_id not in tokens.plain(query)
    spliced, own = tokens.generator_ids(prompt, query)
    assert [token for token, its in zip(spliced, own) if its] == tokens.plain(query)


class Experts:
    def tokens_of(self, index):
        return np.asarray(index)[:, None], np.ones((len(index), 1), bool)


@given(pairs=st.lists(st.tuples(QUERIES, st.integers(0, 9)), min_size=1, max_size=5), room=st.integers(1, 12), limit=st.integers(1, 8), too_long=st.sampled_from(["drop", "cut"]), step=st.integers(0, 5))  # fmt: skip
def test_long_rows_are_dropped_or_cut_as_the_setting_says(tokens, pairs, room, limit, too_long, step):
    template = len(tokens.generator_ids("say", "")[0])
    settings = config.make(generator={"max_query_tokens": template + room}, actor={"max_answer_tokens": limit}, data={"too_long": too_long})
    examples = tuple(Example(f"r{i}", query, "1" * size, "1") for i, (query, size) in enumerate(pairs))
    long_query = [len(tokens.plain(e.query)) > room for e in examples]
    long_answer = [len(tokens.answer_ids(e.answer)) > limit for e in examples]
    for split in ("train", "test"):
        long = [q or (a and split == "train") for q, a in zip(long_query, long_answer)]
        kept = [e for e, is_long in zip(examples, long) if too_long == "cut" or not is_long]
        if not kept:
            with pytest.raises(ValueError, match=f"no {split} row is left of {len(examples)}"):
                data.make_rows(tokens, settings, "say", {split: examples})
            continue
        made, lengths, counts = data.make_rows(tokens, settings, "say", {split: examples})
        rows = made[split]
        assert rows.examples == tuple(kept) and counts[split] == (sum(long_query), sum(long_answer) * (split == "train"))
        assert rows.generator.shape[1] == lengths.generator <= template + room and rows.answer.shape[1] == lengths.answer <= limit
        for i, row in enumerate(kept):
            own = tokens.plain(row.query)[max(len(tokens.plain(row.query)) - room, 0) :]
            assert rows.generator[i][rows.own[i]].tolist() == own
            between, suffix = tokens.encode(tokens.template.between), tokens.encode(tokens.template.suffix)
            assert rows.query[i][rows.query_mask[i]].tolist() == between + own + suffix
            assert rows.answer[i][rows.answer_mask[i]].tolist() == tokens.answer_ids(row.answer)[:limit]
            assert rows.generator_mask[i].sum() == template + len(own)
        batch = data.batch_at(step, rows, Experts(), 3, 1)
        assert np.array_equal(batch["rows"], data.order_at(step, len(rows), 3, 1)) and np.array_equal(batch["expert"][:, 0], batch["rows"])
        assert all(np.array_equal(batch[name], getattr(rows, name)[batch["rows"]]) for name in ("generator", "own", "query", "answer", "initial_mask"))


# --- the config parser ---

NAMES = st.text(min_size=1, max_size=8).filter(lambda name: "." not in name)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
OPTIONS = st.dictionaries(NAMES, PLAIN | st.dictionaries(NAMES, PLAIN, max_size=2), max_size=3)
PARSED = {int: st.integers(), float: st.floats(allow_nan=False), str: st.text(max_size=12), bool: st.booleans()}


def values_of(kind):
    base, optional = config._optional(kind)
    if typing.get_origin(base) is dict:
        return OPTIONS
    found = st.lists(st.sampled_from(config.PROJECTIONS), max_size=3).map(tuple) if typing.get_origin(base) is tuple else PARSED[base]
    return found | st.none() if optional else found


KINDS = {key: functools.reduce(lambda cls, name: typing.get_type_hints(cls)[name], key.split("."), config.Config) for key, _, _ in config.leaves()}
KEYS = st.sampled_from([*KINDS])
SOME = st.lists(KEYS.flatmap(lambda key: st.tuples(st.just(key), values_of(KINDS[key]))), max_size=12)  # changes of the defaults


def text_of(value):
    return ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool | None) else str(value)


def replaced(settings, key, value):
    """Returns the settings with one leaf changed."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(settings, **{name: replaced(getattr(settings, name), rest, value) if rest else value})


@given(changes=SOME)
def test_any_config_comes_back_from_its_tree(changes):
    settings = functools.reduce(lambda found, change: replaced(found, *change), changes, config.Config())
    assert config.from_tree(config.to_tree(settings)) == settings


@given(changes=SOME)
def test_checks_refuse_settings_in_one_line_or_not_at_all(changes):
    settings = functools.reduce(lambda found, change: replaced(found, *change), changes, config.Config())
    for check in (config.check, lambda s: config.check_model(s, GENERATOR, ACTOR), lambda s: tasks.check(s.task)):
        try:
            check(settings)
        except ValueError as error:
            assert "=" in str(error) and "\n" not in str(error), str(error)


@pytest.mark.parametrize("key", [key for key in KINDS if key != "task.options"])
@hypothesis.settings(max_examples=200 if os.environ.get("SOAK") else 6)
@given(data=st.data())
def test_every_leaf_takes_the_text_of_its_value(key, data):
    value = data.draw(values_of(KINDS[key]).filter(lambda value: not isinstance(value, str) or value.lower() != "none"))
    tree = config.to_tree(config.Config())
    config.override(tree, [(key, json.dumps(value) if key == "actor.stop" else text_of(value))])
    assert config.from_tree(tree) == replaced(config.Config(), key, value)


@given(name=NAMES, value=st.booleans() | st.integers() | st.text(max_size=8).map(repr).filter(lambda text: "\\" not in text))
def test_an_option_takes_the_text_of_its_value(name, value):
    tree = config.to_tree(config.Config())
    config.override(tree, [(f"task.options.{name}", text_of(value))])
    expected = value[1:-1] if isinstance(value, str) else value
    assert config.from_tree(tree).task.options == {name: expected}


SOME_KEY = st.lists(st.sampled_from([*{part for key in KINDS for part in key.split(".")}, "", "get", "lock", "items"]) | st.text(max_size=6), max_size=4).map(".".join)


@given(key=SOME_KEY, text=st.text(max_size=10) | st.sampled_from(["none", "1e999", "9" * 5000, "(q, v)", "true"]))
def test_any_key_and_text_are_taken_or_refused_by_name(key, text):
    tree = config.to_tree(config.Config())
    try:
        config.override(tree, [(key, text)])
    except ValueError as error:
        assert key in str(error) or repr(key)[1:-1] in str(error), str(error)
        assert config.from_tree(tree) == config.Config()
    else:
        assert key in KINDS or key.startswith("task.options.")
        config.from_tree(tree)


ANYTHING = st.recursive(PLAIN | st.just(10**400) | st.binary(max_size=3), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2))


@given(key=SOME_KEY.filter(bool) | KEYS, value=ANYTHING)
@example("train.learning_rate", 10**400)
def test_trees_with_anything_anywhere_are_taken_or_refused(key, value):
    tree = dataclasses.asdict(config.Config())
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {}) if isinstance(node.get(section, {}), dict) else node
    known = leaf in node
    node[leaf] = value
    try:
        found = config.from_tree(tree)
    except ValueError as error:
        assert leaf in str(error) or repr(leaf)[1:-1] in str(error) or sections, str(error)
    else:
        assert known or "options" in sections
        assert dataclasses.asdict(found).keys() == dataclasses.asdict(config.Config()).keys()
