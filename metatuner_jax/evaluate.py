"""Scores on unseen queries, before and after, and the controls that show whether prompt and adapter depend on the query."""

import numpy as np


def interval(scores, num_bootstrap: int, seed: int = 0) -> dict:
    """Returns {mean, ci95, n}: the mean of per-query scores and its 95% interval by the percentile bootstrap over queries."""
    scores = np.asarray(scores, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(scores), (num_bootstrap, len(scores)))
    low, high = np.percentile(scores[picks].mean(axis=1), (2.5, 97.5))
    return {"mean": float(scores.mean()), "ci95": [float(low), float(high)], "n": len(scores)}


def derangement(count: int, seed: int) -> np.ndarray:
    """Returns a random permutation without fixed points: each query gets another one's."""
    if count < 2:
        raise ValueError(f"task.num_test={count} must be at least 2: the shuffled controls give each query another one's prompt")
    order = np.random.default_rng([seed, 3]).permutation(count)
    shifted = np.empty(count, np.int64)
    shifted[order] = np.roll(order, 1)
    return shifted


def validate(passes, params, rows, tokens, score) -> float:
    """Returns the mean strict score on a split with each query's own greedy prompt and own adapter."""
    index = np.arange(len(rows))
    h, *prompts = passes.write(params, rows, index)
    answered = passes.answer(rows, index, *prompts, lambda at: passes.adapt(params["hyper"], h[at]), what="validating")
    return float(np.mean([score(text, e).strict for text, e in zip(texts_of(answered, tokens), rows.examples)]))


def texts_of(answered, tokens) -> list[str]:
    """Returns the answers as text."""
    return [tokens.decode(ids, mask) for ids, mask in zip(answered.tokens, answered.mask)]


def score_before(passes, rows, tokens, score, initial) -> list:
    """Returns the Score of each query for the bare actor with the initial prompt. `initial`: its ids, end token included."""
    prompt, mask = repeat(initial, len(rows), passes.setup.config.generator.max_prompt_tokens)
    answered = passes.answer(rows, np.arange(len(rows)), prompt, mask, what="before")
    return [score(text, example) for text, example in zip(texts_of(answered, tokens), rows.examples)]


def repeat(ids, count: int, length: int):
    """Returns one prompt for all rows as (int32 tokens, bool mask), both [count, length]."""
    tokens, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    tokens[:, : len(ids)], mask[:, : len(ids)] = ids, True
    return tokens, mask


def evaluate(passes, params, rows, train_rows, tokens, score, initial, before) -> tuple[dict, list[dict]]:
    """Returns (results, predictions) on a split: the parts of results.json that are scores, and one object a query.

    Source: the four adapters and three prompts are this project's controls; the paper has none.

    Args:
      train_rows: the split whose first `eval.num_mean` queries make the mean adapter.
      initial: ids of the initial prompt, end token included.
      before: what `score_before` gave for the same rows.

    Raises:
      RuntimeError: the adapter or the prompt has no effect on the actor.
    """
    config = passes.setup.config
    index = np.arange(len(rows))
    other = derangement(len(rows), config.seed)
    h, prompt, prompt_mask = passes.write(params, rows, index)
    start, start_mask = repeat(initial, len(rows), prompt.shape[1])

    def adapter_of(states):
        return lambda at: passes.adapt(params["hyper"], states[at])

    check_in_use(passes, rows, prompt, prompt_mask, adapter_of(h))
    train_h = passes.encode(params, train_rows, np.arange(min(config.eval.num_mean, len(train_rows))))
    mean_lora, energy = passes.mean_adapter(params["hyper"], train_h, config.hyper.rank)

    def run(what, adapter, prompts, which=index):
        texts = texts_of(passes.answer(rows, which, *prompts, adapter, what=what), tokens)
        return texts, [score(text, rows.examples[i]) for text, i in zip(texts, which)]

    def run_prompts(what, other, other_mask):
        """Answers anew only the queries whose prompt is another one; the rest stands in `after`."""
        differs = np.any(np.where(prompt_mask, prompt, -1) != np.where(other_mask, other, -1), axis=1)
        changed, scores = np.flatnonzero(differs), list(after)
        if len(changed):
            found = run(what, adapter_of(h[changed]), (other[changed], other_mask[changed]), changed)[1]
            for i, one in zip(changed, found):
                scores[i] = one
        return scores

    own = (prompt, prompt_mask)
    texts, after = run("after", adapter_of(h), own)
    adapters = {
        "own": after,
        "shuffled": run("adapter: shuffled", adapter_of(h[other]), own)[1],
        "mean": run("adapter: mean", lambda at: mean_lora, own)[1],
        "none": run("adapter: none", None, own)[1],
    }
    prompts = {
        "own": after,
        "shuffled": run_prompts("prompt: shuffled", prompt[other], prompt_mask[other]),
        "initial": run_prompts("prompt: initial", start, start_mask),
    }

    def summary(scores, kind="strict"):
        return interval([getattr(s, kind) for s in scores], config.eval.num_bootstrap, config.seed)

    written = [tokens.decode(p, m) for p, m in zip(prompt, prompt_mask)]
    first = tokens.decode(initial)
    results = {
        "before": summary(before),
        "after": summary(after),
        "before_flexible": summary(before, "flexible"),
        "after_flexible": summary(after, "flexible"),
        "adapter": {name: summary(scores) for name, scores in adapters.items()},
        "prompt": {name: summary(scores) for name, scores in prompts.items()},
        "mean_adapter_energy": energy,
        "prompts": {
            "distinct": len(set(written)),
            "share_initial": float(np.mean([text == first for text in written])),
            "mean_tokens": float(prompt_mask.sum(axis=1).mean()),
        },
    }
    predictions = [
        {
            "id": example.id, "query": example.query, "prompt": written[i], "answer": texts[i], "reference": example.reference,
            "score": after[i].strict, "flexible": after[i].flexible,
        }
        for i, example in enumerate(rows.examples)
    ]  # fmt: skip
    return results, predictions


def check_in_use(passes, rows, prompt, prompt_mask, adapter) -> None:
    """Raises RuntimeError where taking the adapter or the prompt away leaves what the actor says as it was.

    A run whose adapter or prompt is not wired to the actor would otherwise report the base model's scores as its own. Both ways
    through the actor are looked at: the one that answers, by its first token's probability, and the one that weighs given answers in
    training and rollouts.
    """
    index = np.arange(min(len(rows), passes.batch_size))
    prompt, prompt_mask = prompt[index], prompt_mask[index]
    look = lambda mask, adapter: passes.answer(rows, index, prompt, mask, adapter, what="checking", weigh=True, max_tokens=1)
    both, no_adapter = look(prompt_mask, adapter), look(prompt_mask, None)
    words = (prompt_mask & (prompt != passes.setup.end_id)).any()
    no_prompt = look(np.zeros_like(prompt_mask), adapter) if words else None
    for name, what in (("first", "answers"), ("likelihood", "likelihoods")):
        with_both = getattr(both, name)
        if np.array_equal(with_both, getattr(no_adapter, name)):
            raise RuntimeError(f"the generated adapter is not in use: the actor's {what} are the same without it")
        if words and np.array_equal(with_both, getattr(no_prompt, name)):
            raise RuntimeError(f"the written prompt is not in use: the actor's {what} are the same without it")
