"""Scores on unseen queries, before and after, and the controls that show whether prompt and adapter depend on the query."""

import numpy as np

from metatuner_jax import lora, tasks


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


def validate(passes, params, rows, tokens, score, for_all=None) -> dict:
    """Returns {mean, log_likelihood, n} on a split, with each query's own greedy prompt and own adapter.

    The mean strict score, and the mean log-likelihood of the reference answers in nats per token, which tells apart what scores the same.

    Args:
      for_all: as in `Passes.prompts`.
    """
    index = np.arange(len(rows))
    h, *prompts = passes.prompts(params, rows, index, for_all)
    answered = passes.answer(rows, index, *prompts, passes.adapter(params, h), what="validating", weigh=True)
    scores = [found.strict for found in tasks.score_all(score, tokens.answers(answered.tokens, answered.mask), rows.examples)]
    return {"mean": float(np.mean(scores)), "log_likelihood": float(np.mean(answered.likelihood)), "n": len(rows)}


def answer_before(passes, rows, tokens, score) -> list[dict]:
    """Returns what the bare actor says to each query under its initial prompt: {id, answer, score, flexible}."""
    answered = passes.answer(rows, np.arange(len(rows)), rows.initial, rows.initial_mask, what="before")
    texts = tokens.answers(answered.tokens, answered.mask)
    scores = tasks.score_all(score, texts, rows.examples)
    return [
        {"id": example.id, "answer": text, "score": s.strict, "flexible": s.flexible}
        for example, text, s in zip(rows.examples, texts, scores)
    ]


def evaluate(passes, params, rows, train_rows, tokens, score, before, for_all=None) -> tuple:
    """Returns (results, predictions, mean adapter) on a split: the parts of results.json that are scores, one object a query, and a LoRA or None.

    `gains` are by how much the score after is above each of the others, query by query. `delta_norms` are those of the queries' own deltas, mean
    and, as `delta_norms_spread`, standard deviation over the queries in each layer.

    What a method does not have is not answered anew: without an adapter all four score the same, with a static one all but `none`. Nor
    is what stands in `before`: the bare actor under the initial prompt.

    Source: the four adapters and three prompts are this project's controls; the paper has none.

    Args:
      train_rows: the split whose first `eval.num_mean` queries make the mean adapter.
      before: what `answer_before` gave for the same rows.
      for_all: as in `Passes.prompts`.

    Raises:
      RuntimeError: the adapter or the prompt has no effect on the actor.
    """
    config, method = passes.setup.config, passes.setup.method
    index = np.arange(len(rows))
    other = derangement(len(rows), config.seed)
    h, prompt, prompt_mask = passes.prompts(params, rows, index, for_all)
    adapter = passes.adapter(params, h)
    check_in_use(passes, rows, prompt, prompt_mask, adapter)

    def run(what, adapter, prompts, which=index):
        answered = passes.answer(rows, which, *prompts, adapter, what=what)
        texts = tokens.answers(answered.tokens, answered.mask)
        return texts, tasks.score_all(score, texts, [rows.examples[i] for i in which])

    def differs(other, other_mask):
        return np.any(np.where(prompt_mask, prompt, -1) != np.where(other_mask, other, -1), axis=1)

    def run_some(what, adapter, tokens, mask, which, rest):
        """Answers anew only the queries where `which` is True; the others' scores are those in `rest`."""
        at, scores = np.flatnonzero(which), list(rest)
        if len(at):
            found = run(what, adapter and (lambda places: adapter(at[places])), (tokens[at], mask[at]), at)[1]
            for i, one in zip(at, found):
                scores[i] = one
        return scores

    own = (prompt, prompt_mask)
    rewritten = differs(rows.initial, rows.initial_mask)
    texts = [line["answer"] for line in before]
    bare = after = [tasks.Score(line["score"], line["flexible"]) for line in before]
    if method.learns or rewritten.any():
        texts, after = run("after", adapter, own)
    adapters = dict.fromkeys(("own", "shuffled", "mean", "none"), after)
    energy = mean_lora = None
    if method.adapter == "generated":
        train_h = passes.encode(params, train_rows, np.arange(min(config.eval.num_mean, len(train_rows))))
        mean_lora, energy = passes.mean_adapter(params["hyper"], train_h, config.hyper.rank)
        adapters["shuffled"] = run("adapter: shuffled", passes.adapter(params, h[other]), own)[1]
        repeated = lambda at: lora.repeat(mean_lora, len(at))  # as each row's own, which is compiled already
        adapters["mean"] = run("adapter: mean", repeated, own)[1]
    if adapter:
        anew = rewritten | bool(config.warmup.actor_steps)  # `before` is of the actor as it was before its warm-up
        adapters["none"] = run_some("adapter: none", None, *own, anew, bare)
    moved = prompt[other], prompt_mask[other]
    prompts = {
        "own": after,
        "shuffled": run_some("prompt: shuffled", adapter, *moved, differs(*moved), after),
        "initial": run_some("prompt: initial", adapter, rows.initial, rows.initial_mask, rewritten, after),
    }

    def summary(scores, which=index):
        return interval([scores[i] for i in which], config.eval.num_bootstrap, config.seed)

    strict = lambda scores: [s.strict for s in scores]
    gain = lambda scores: summary(np.subtract(strict(after), strict(scores)))
    written = [tokens.decode(p, m) for p, m in zip(prompt, prompt_mask)]
    first = [tokens.decode(p, m) for p, m in zip(rows.initial, rows.initial_mask)]
    base = [line["score"] for line in before]
    parts = dict.fromkeys(example.part for example in rows.examples)
    results = {
        "before": summary(base),
        "after": summary(strict(after)),
        "before_flexible": summary([line["flexible"] for line in before]),
        "after_flexible": summary([s.flexible for s in after]),
        "adapter": {name: summary(strict(scores)) for name, scores in adapters.items()},
        "prompt": {name: summary(strict(scores)) for name, scores in prompts.items()},
        "gains": {
            "before": gain(bare),
            "adapter": {name: gain(scores) for name, scores in adapters.items() if name != "own"},
            "prompt": {name: gain(scores) for name, scores in prompts.items() if name != "own"},
        },
        "mean_adapter_energy": energy,
        "prompts": {
            "distinct": len(set(written)),
            "share_initial": float(np.mean([one == start for one, start in zip(written, first)])),
            "mean_tokens": float(prompt_mask.sum(axis=1).mean()),
        },
        "scores": {example.id: s.strict for example, s in zip(rows.examples, after)},
    }
    if adapter:
        norms = passes.delta_norms(adapter, len(rows))
        results["delta_norms"] = {target: _rounded(found.mean(axis=1)) for target, found in norms.items()}
        results["delta_norms_spread"] = {target: _rounded(found.std(axis=1)) for target, found in norms.items()}
    if len(parts) > 1:
        which = {part: [i for i, example in enumerate(rows.examples) if example.part == part] for part in parts}
        results["parts"] = {
            part: {"before": summary(base, places), "after": summary(strict(after), places)} for part, places in which.items()
        }
    predictions = [
        {
            "id": example.id, "query": example.query, "prompt": written[i], "answer": texts[i], "reference": example.reference,
            "score": after[i].strict, "flexible": after[i].flexible,
        }
        for i, example in enumerate(rows.examples)
    ]  # fmt: skip
    return results, predictions, mean_lora


def _rounded(values):
    return [float(f"{value:.6g}") for value in values]


def check_in_use(passes, rows, prompt, prompt_mask, adapter) -> None:
    """Raises RuntimeError where taking the adapter or the prompt away leaves what the actor says as it was.

    A run whose adapter or prompt is not wired to the actor would otherwise report the base model's scores as its own. Both ways
    through the actor are looked at: the one that answers, by its first token's probability, and the one that weighs given answers in
    training and rollouts.
    """
    index = np.arange(min(len(rows), passes.batch_size))
    prompt, prompt_mask = prompt[index], prompt_mask[index]
    look = lambda mask, adapter: passes.answer(rows, index, prompt, mask, adapter, what="checking", weigh=True, max_tokens=1)
    both, no_adapter = look(prompt_mask, adapter), look(prompt_mask, None) if adapter else None
    words = (prompt_mask & (prompt != passes.setup.end_id)).any()
    no_prompt = look(np.zeros_like(prompt_mask), adapter) if words else None
    for name, what in (("first", "answers"), ("likelihood", "likelihoods")):
        with_both = getattr(both, name)
        if adapter and np.array_equal(with_both, getattr(no_adapter, name)):
            raise RuntimeError(f"the {passes.setup.method.adapter} adapter is not in use: the actor's {what} are the same without it")
        if words and np.array_equal(with_both, getattr(no_prompt, name)):
            raise RuntimeError(f"the {passes.setup.method.prompt} prompt is not in use: the actor's {what} are the same without it")
