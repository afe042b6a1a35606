"""One prompt for a whole task: proposed by the generator, selected by the actor's answers on train rows."""

import dataclasses

import jax
import numpy as np

from metatuner_jax import data, rollout


def search(passes, params, key, rows, experts: rollout.Experts, tokens, score, step: int, done: int, incumbent=None) -> dict:
    """Looks for a better prompt for all rows, makes it their expert, and returns what came of it.

    In each round the generator, as it is, rewrites the best prompt so far for some train queries, and the actor answers one set of
    train queries under each proposal; the highest mean score wins, then the highest mean log-likelihood, a full tie keeps the
    incumbent. The actor has the method's current adapter.

    Source: the instruction proposals of MIPRO (Opsahl-Ong et al. 2024, arXiv 2406.11695), whose proposer is shown data as here, without
    its surrogate model: every proposal is tried on all queries of the set.

    Args:
      params: the tree that learns.
      done: a number that tells one search's queries from another's.
      incumbent: ids of the best prompt so far, end token included; None: each row's own initial prompt.
    """
    config = passes.setup.config
    rng = np.random.default_rng([config.seed, 4, done])
    count = min(config.rollout.num_queries, len(rows))
    trial = rng.permutation(len(rows))[:count]  # the queries on which prompts are tried, the same in all rounds
    adapter = passes.adapter(params, None)  # the same for all rows, or None
    tried, calls = {}, 0

    def try_prompts(prompts):
        """Adds [mean score, mean log-likelihood, attempts] of new prompts, ids or None for each row's initial one, to `tried`."""
        nonlocal calls
        new = [words for words in prompts if words not in tried]
        index = np.tile(trial, len(new))
        words_of = lambda words, row: words or tuple(int(i) for i in rows.initial[row][rows.initial_mask[row]])
        given = [words_of(words, row) for words in new for row in trial]
        place = np.tile(np.arange(count), len(new))
        found = rollout.attempt(
            passes, rows, index, given, adapter and (lambda at: adapter(place[at])), tokens, score, step, experts.known
        )  # fmt: skip
        calls += sum(not one.get("known") for one in found)
        experts.add(found)
        for i, words in enumerate(new):
            own = found[i * count : (i + 1) * count]
            tried[words] = tuple(float(np.mean([one[name] for one in own])) for name in ("score", "log_likelihood"))

    incumbent = first = None if incumbent is None else tuple(incumbent)
    for number in range(config.rollout.search_rounds):
        spent = experts.calls + (0 if incumbent in tried else count)
        wanted = rollout.affordable(config.rollout.budget, spent, config.rollout.search_prompts, count)
        if not wanted:
            break
        asked = rng.permutation(len(rows))[:wanted]
        source = rows if incumbent is None else rewritten(rows, asked, incumbent, tokens)
        index = asked if incumbent is None else np.arange(len(asked))
        _, prompt, mask = passes.write(params, source, index, jax.random.fold_in(key, number), config.rollout.temperature)
        proposals = [rollout.candidates_of((), ids[None], real[None], tokens.end_id)[1] for ids, real in zip(prompt, mask)]
        try_prompts(dict.fromkeys([incumbent, *(words for words in proposals if len(words) > 1)]))
        incumbent = max(tried, key=lambda words: (*tried[words], words == incumbent))
    if not tried:
        what = f"no search: rollout.budget={config.rollout.budget} actor calls are spent"
        return {"what": what, "prompt": first and list(first), "rollout_queries": 0, "rollout_attempts": 0}
    changed = incumbent != first
    current = experts.for_all()
    if incumbent is not None and list(incumbent) != current:  # a later search than the incumbent's may have found another one
        mean, likelihood = tried[incumbent]
        experts.add([
            {"step": step, "id": None, "prompt": tokens.decode(incumbent), "answer": None, "score": mean,
             "log_likelihood": likelihood, "best": True, "tokens": list(incumbent)}
        ])  # fmt: skip
        ids, mask = experts.tokens_of(trial)
        if any(tuple(row[real]) != incumbent for row, real in zip(ids, mask)):
            raise RuntimeError("the expert set does not hold the prompt that won the search: it is not in use")
    mean = tried[incumbent][0]
    return {
        "prompt": incumbent and list(incumbent),
        "what": f"search among {len(tried)} prompts, {calls} attempts: {'a new best' if changed else 'none better'}, mean score {mean:.2f}",
        "rollout_queries": count, "rollout_attempts": calls, "rollout_changed": int(changed), "rollout_score": mean,
    }  # fmt: skip


def rewritten(rows: data.Rows, index, prompt, tokens) -> data.Rows:
    """Returns some rows as the generator reads them when it is to rewrite another prompt than the initial one.

    Args:
      prompt: its ids, end token included.
    """
    text = tokens.decode(prompt)
    pairs = [tokens.generator_ids(text, rows.examples[i].query) for i in index]
    length = rows.generator.shape[1] + rows.initial.shape[1]  # one shape for all prompts
    generator, mask = data.pad([ids[:length] for ids, _ in pairs], length, "left")
    own, _ = data.pad([marks[:length] for _, marks in pairs], length, "left")
    return dataclasses.replace(rows, generator=generator, generator_mask=mask, own=own.astype(bool))
