"""What evaluation and rollouts compute, against loops over single queries written here."""

import dataclasses
import functools
import io
import json
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, make_batch, make_setup

from metatuner_jax import actor, data, decode, evaluate, generator, lora, rollout, sharding, tasks
from metatuner_jax import passes as passes_lib
from metatuner_jax.config import MeshConfig
from metatuner_jax.passes import Passes
from metatuner_jax.progress import Progress

INITIAL = [5, 6, END]


class Numbers:
    """Stands in for `data.Tokens`: the text of a row is its ids."""

    end_id = END

    def decode(self, ids, mask=None):
        return " ".join(str(i) for i in np.asarray(ids)[np.asarray(mask) if mask is not None else slice(None)] if i != END)

    def answers(self, ids, masks):
        return list(map(self.decode, ids, masks))


def score(text, example):
    """Scores that differ between any two texts, so that equal means are no chance."""
    value = (zlib.crc32(f"{text}|{example.id}".encode()) % 1009) / 1009
    return tasks.Score(value, min(1.0, value + 0.1))


def make_rows(count):
    """Returns rows out of the batch of three, their queries moved so that all differ."""
    batch = {name: np.concatenate([np.array(leaf)] * -(-count // 3))[:count] for name, leaf in make_batch().items()}
    shift = np.arange(count)[:, None] // 3 * 7
    for name in ("generator", "query"):
        batch[name] = np.where(batch[name + "_mask"], 3 + (batch[name] - 3 + shift) % 58, 0).astype(np.int32)
    examples = tuple(tasks.Example(f"test-{i}", str(i), "", "") for i in range(count))
    names = ("generator", "generator_mask", "own", "query", "query_mask", "answer", "answer_mask", "initial", "initial_mask")
    return data.Rows(examples, *(batch[name] for name in names))


@pytest.fixture(scope="module")
def tuned(networks):
    """(setup, frozen, params, passes, rows), batches of 4 over 7 rows, the last one filled up, those of short rows trimmed."""
    setup = make_setup(data={"buckets": 42}, eval={"batch_size": 4, "num_mean": 5, "num_bootstrap": 50}, rollout={"every": 2, "num_queries": 3, "num_prompts": 2})
    frozen, params = networks(setup)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return setup, frozen, params, Passes(setup, frozen, mesh, 4, Progress(io.StringIO())), make_rows(7)


def test_an_answer_ends_at_the_first_text_to_stop_before(tuned, monkeypatch):
    setup, frozen, _, _, rows = tuned
    monkeypatch.setattr(passes_lib, "STOP_EVERY", 1)
    index, mesh = np.arange(len(rows)), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    given = (rows, index, rows.initial, rows.initial_mask)
    plain = Passes(setup, frozen, mesh, 4, Progress(io.StringIO())).answer(*given)
    stops = set(plain.tokens[:, 1][plain.mask[:, 2]].tolist())  # in the middle of some answers
    stopped_at = lambda ids: next((place + 1 for place, token in enumerate(ids) if token in stops), None)
    tokens, looked = types.SimpleNamespace(stop=("any",), stopped_at=lambda ids: (looked.append(len(ids)), stopped_at(ids))[1]), []
    found = Passes(setup, frozen, mesh, 4, Progress(io.StringIO()), tokens).answer(*given)
    lengths = [stopped_at(row[mask]) or mask.sum() for row, mask in zip(plain.tokens, plain.mask)]
    assert found.mask.sum(axis=1).tolist() == lengths != plain.mask.sum(axis=1).tolist()
    np.testing.assert_array_equal(found.tokens[found.mask], plain.tokens[found.mask])
    assert max(looked) <= max(lengths)  # what has stopped is not written on


class Alone:
    """The same networks for one query at a time."""

    def __init__(self, setup, frozen, params, rows):
        self.frozen, self.params, self.rows, self.length = frozen, params, rows, setup.config.generator.max_prompt_tokens

        def write(params, frozen, tokens, mask, own):
            query = generator.read(setup, params, frozen, tokens, mask, own)
            return query.h, generator.write(setup, params, frozen, generator.start(setup, params, frozen, query))

        self._write = jax.jit(write)
        self._adapt = jax.jit(lambda hyper, h: generator.adapt(setup, hyper, h))
        max_tokens = setup.config.actor.max_answer_tokens

        def answer(frozen, loras, *rows):
            return actor.advance(setup, frozen, loras, actor.begin(setup, frozen, loras, *rows, max_tokens)).sampled()

        self._answer = jax.jit(answer)

    def write(self, i):
        """Returns (LoRA, ids of the greedy prompt) of a query."""
        at = slice(i, i + 1)
        h, sampled = self._write(self.params, self.frozen, *(leaf[at] for leaf in (self.rows.generator, self.rows.generator_mask, self.rows.own)))
        return self._adapt(self.params["hyper"], h), [int(t) for t in sampled.tokens[0][sampled.mask[0]]]

    def answer(self, i, loras, prompt):
        """Returns the text of a query's answer under a prompt."""
        tokens, mask = data.pad([prompt], self.length, "right")
        sampled = self._answer(self.frozen, loras, tokens, mask, self.rows.query[i : i + 1], self.rows.query_mask[i : i + 1])
        return Numbers().decode(sampled.tokens[0], sampled.mask[0])


def test_every_control_is_what_its_name_says(tuned):
    setup, frozen, params, passes, rows = tuned
    before = evaluate.answer_before(passes, rows, Numbers(), score)
    results, predictions, _ = evaluate.evaluate(passes, params, rows, rows, Numbers(), score, before)

    alone, n = Alone(setup, frozen, params, rows), len(rows)
    loras, prompts = zip(*(alone.write(i) for i in range(n)))
    other = evaluate.derangement(n, setup.config.seed)
    mean, energy = lora.mean(list(loras[: setup.config.eval.num_mean]), setup.config.hyper.rank)

    def texts(adapter, prompt):
        return [alone.answer(i, adapter(i), prompt(i)) for i in range(n)]

    def mean_of(found, kind="strict"):
        return np.mean([getattr(score(text, example), kind) for text, example in zip(found, rows.examples)])

    own = lambda i: loras[i]
    own_prompt = lambda i: prompts[i]
    after = texts(own, own_prompt)
    expected = {
        ("before",): texts(lambda i: None, lambda i: INITIAL),
        ("adapter", "own"): after,
        ("adapter", "shuffled"): texts(lambda i: loras[other[i]], own_prompt),
        ("adapter", "mean"): texts(lambda i: mean, own_prompt),
        ("adapter", "none"): texts(lambda i: None, own_prompt),
        ("prompt", "own"): after,
        ("prompt", "shuffled"): texts(own, lambda i: prompts[other[i]]),
        ("prompt", "initial"): texts(own, lambda i: INITIAL),
    }
    for path, found in expected.items():
        assert functools.reduce(dict.__getitem__, path, results)["mean"] == pytest.approx(mean_of(found)), path
    means = [round(mean_of(found), 6) for found in expected.values()]
    assert len(set(means)) == 7  # only the two that are the same thing are equal
    assert results["after_flexible"]["mean"] == pytest.approx(mean_of(after, "flexible"))
    assert results["mean_adapter_energy"] == pytest.approx(energy, abs=1e-5) and energy < 0.999
    assert [p["answer"] for p in predictions] == after
    assert [p["prompt"] for p in predictions] == [Numbers().decode(prompt) for prompt in prompts]
    assert results["prompts"]["distinct"] == len(set(prompts_text := [p["prompt"] for p in predictions])) > 1
    assert results["prompts"]["share_initial"] == np.mean([text == "5 6" for text in prompts_text])
    for path, found in expected.items():
        if "own" not in path:
            gain = functools.reduce(dict.__getitem__, path, results["gains"])
            differences = [score(a, e).strict - score(b, e).strict for a, b, e in zip(after, found, rows.examples)]
            by_hand = evaluate.interval(differences, 50, setup.config.seed)
            assert [gain["mean"], *gain["ci95"], gain["n"]] == pytest.approx([by_hand["mean"], *by_hand["ci95"], len(rows)]), path
    assert set(results["delta_norms"]) == set(loras[0]) == set(setup.config.hyper.targets)
    for target in loras[0]:
        dense = [np.linalg.norm(np.asarray(one[target].a[:, 0]) @ np.asarray(one[target].b[:, 0]), axis=(1, 2)) for one in loras]
        np.testing.assert_allclose(results["delta_norms"][target], np.mean(dense, axis=0), rtol=1e-4)
        np.testing.assert_allclose(results["delta_norms_spread"][target], np.std(dense, axis=0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("warmed", [False, True])
def test_the_bare_actor_answers_the_initial_prompt_once_unless_it_was_warmed_up(tuned, monkeypatch, warmed):
    setup, frozen, params, passes, rows = tuned
    index = np.arange(len(rows))
    written = passes.write(params, rows, index)
    kept = index % 2 == 0  # the queries for which the generator writes the initial prompt
    initial = [np.where(kept[:, None], of_query, first) for of_query, first in zip(written[1:], (rows.initial, rows.initial_mask))]
    rows = dataclasses.replace(rows, initial=initial[0], initial_mask=initial[1])
    before = evaluate.answer_before(passes, rows, Numbers(), score)
    if warmed:
        config = dataclasses.replace(setup.config, warmup=dataclasses.replace(setup.config.warmup, actor_steps=1))
        monkeypatch.setattr(passes, "setup", dataclasses.replace(setup, config=config))
    asked, answer = {}, passes.answer

    def spy(rows, index, *arguments, what="answering", **options):
        asked[what] = list(index)
        return answer(rows, index, *arguments, what=what, **options)

    monkeypatch.setattr(passes, "answer", spy)
    results, _, _ = evaluate.evaluate(passes, params, rows, rows, Numbers(), score, before)
    assert asked["adapter: none"] == list(index if warmed else index[~kept])
    alone = Alone(setup, frozen, params, rows)
    expected = [score(alone.answer(i, None, alone.write(i)[1]), example).strict for i, example in enumerate(rows.examples)]
    assert results["adapter"]["none"]["mean"] == pytest.approx(np.mean(expected))


def test_the_prompt_with_the_best_answer_wins_and_is_what_the_next_batch_learns(tuned, tmp_path):
    setup, frozen, params, passes, rows = tuned
    experts = rollout.Experts(tmp_path / "experts.jsonl", [e.id for e in rows.examples], rows.initial, rows.initial_mask)
    found = rollout.refresh(passes, params, jax.random.key(4), rows, experts, Numbers(), score, 0, 0, setup.config.train.num_steps)

    attempts = [json.loads(line) for line in (tmp_path / "experts.jsonl").read_text().splitlines()]
    alone = Alone(setup, frozen, params, rows)
    winners = {}
    for attempt in attempts:
        i = int(attempt["id"].removeprefix("test-"))
        assert attempt["answer"] == alone.answer(i, alone.write(i)[0], attempt["tokens"])
        assert attempt["score"] == score(attempt["answer"], rows.examples[i]).strict
        winners[i] = max(winners.get(i, attempt), attempt, key=lambda a: a["score"])
    assert len(winners) == found["rollout_queries"] == 3 and len(attempts) == found["rollout_attempts"] > 6
    assert found["rollout_changed"] == sum(w["tokens"] != INITIAL for w in winners.values()) > 0

    for step in range(3):
        batch = data.batch_at(step, rows, experts, 3, setup.config.seed)
        for i, ids, mask in zip(data.order_at(step, 7, 3, setup.config.seed), batch["expert"], batch["expert_mask"]):
            assert list(ids[mask]) == (winners[i]["tokens"] if i in winners else INITIAL)


def test_samples_of_a_query_that_is_read_once_are_those_of_its_copies(tuned):
    setup, frozen, params, passes, rows = tuned
    key = jax.random.key(9)
    index = np.array([6, 0, 3, 1, 4])
    together = passes.write(params, rows, index, key, 1.5, copies=3)

    def write(params, frozen, tokens, mask, own):
        prefill = generator.start(setup, params, frozen, generator.read(setup, params, frozen, tokens, mask, own))
        return generator.write(setup, params, frozen, prefill, key, jnp.arange(15), 1.5)

    copies = np.repeat(index, 3)
    each = jax.jit(write)(params, frozen, rows.generator[copies], rows.generator_mask[copies], rows.own[copies])
    assert isinstance(each, decode.Sampled)
    np.testing.assert_array_equal(together.tokens, each.tokens)
    np.testing.assert_array_equal(together.mask, each.mask)
    assert len({tuple(row) for row in together.tokens}) > 5
    np.testing.assert_allclose(together.h, passes.encode(params, rows, index), atol=1e-5)
