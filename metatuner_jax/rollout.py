"""Best-of-n prompts: the expert set, its store on disk, and the rollouts that fill it."""

import pathlib

import numpy as np

from metatuner_jax import config as config_lib
from metatuner_jax import data, files, tasks


class Experts:
    """The best prompt found so far for each train row, and the file of every attempt.

    A line of the file is one attempt: `step, id, prompt, answer, score, log_likelihood, best, tokens`. `best` marks the winner of its
    refresh, `tokens` are the prompt's ids, which are spliced as they are and never made again from the text. A line whose `id` is null
    is the outcome of a search: its prompt is that of all rows, its score a mean.
    """

    def __init__(self, path, ids, initial, initial_mask, keeps: bool = False):
        """Starts from each row's initial prompt, int32 and bool [rows, p], its end token included.

        Args:
          keeps: whether answers that were once decoded still stand later: for an actor that does not change.
        """
        self.keeps = keeps
        self.path = pathlib.Path(path)
        self.places = {row_id: i for i, row_id in enumerate(ids)}
        self.initial, self.initial_mask = np.array(initial), np.array(initial_mask)
        self._clear()

    def _clear(self):
        self.tokens, self.mask = self.initial.copy(), self.initial_mask.copy()
        self.scores = np.full(len(self.places), np.nan)  # of the best prompts, as of their refresh
        self.found = []  # (step, ids) of the prompts for all rows
        self.known = {}  # (row id, prompt's ids) -> the attempt that still stands
        self.calls = 0  # answers decoded so far

    def tokens_of(self, index) -> tuple[np.ndarray, np.ndarray]:
        """Returns the expert prompts of train rows, (int32 tokens, bool mask), both [n, p]."""
        return self.tokens[index], self.mask[index]

    def for_all(self, step: int | None = None) -> list[int] | None:
        """Returns the ids of the best prompt for the whole task, end token included, None where no search has found one.

        Args:
          step: leave out what was found at this step or later.
        """
        found = [ids for at, ids in self.found if step is None or at < step]
        return found[-1] if found else None

    def summary(self) -> dict:
        """Returns how many rows have another expert than their initial prompt, and the mean score of all experts that have one."""
        same = (self.mask == self.initial_mask).all(axis=1) & (np.where(self.mask, self.tokens == self.initial, True)).all(axis=1)
        scored = self.scores[~np.isnan(self.scores)]
        return {"expert_size": int((~same).sum()), **({"expert_score": float(scored.mean())} if len(scored) else {})}

    def add(self, attempts: list[dict]) -> None:
        """Appends attempts to the file, and makes the best ones experts."""
        files.append_lines(self.path, attempts)
        self._take(attempts)

    def restore(self, step: int) -> None:
        """Reads back the attempts of refreshes before `step` and drops the file's other lines."""
        attempts = [attempt for attempt in files.read_lines(self.path) if attempt["step"] < step]
        files.write_lines(self.path, attempts)
        self._clear()
        self._take(attempts)

    def _take(self, attempts):
        for attempt in attempts:
            ids = attempt["tokens"]
            if attempt["id"] is None:
                self.found.append((attempt["step"], ids))
                self.tokens[:], self.mask[:] = data.pad([ids], self.tokens.shape[1], "right")
                self.scores[:] = attempt["score"]
                continue
            self.calls += not attempt.get("known")
            if self.keeps:
                self.known[attempt["id"], tuple(ids)] = attempt
            if attempt["best"]:
                place = self.places[attempt["id"]]
                (self.tokens[place],), (self.mask[place],) = data.pad([ids], self.tokens.shape[1], "right")
                self.scores[place] = attempt["score"]


def best(attempts: list[dict]) -> int:
    """Returns the winner's place: the higher score, then the higher log-likelihood, then the first.

    The incumbent stands first, so that a full tie keeps it.
    """
    return max(range(len(attempts)), key=lambda i: (attempts[i]["score"], attempts[i]["log_likelihood"], -i))


def queries_at(done: int, num_rows: int, config: config_lib.Config, num_steps: int, count: int | None = None) -> np.ndarray:
    """Returns the train rows that a refresh takes after `done` steps of a phase of `num_steps`, a function of these alone.

    They are drawn from the rows of the steps up to the next refresh, so that new experts are learnt from while they are new; others
    fill up where these are too few.
    """
    rng = np.random.default_rng([config.seed, 2, done])
    steps = range(done, min(done + config.rollout.every, num_steps))
    batches = [data.order_at(step, num_rows, config.train.batch_size, config.seed) for step in steps]
    coming = np.unique(batches).astype(np.int64)
    others = np.setdiff1d(np.arange(num_rows), coming)
    return np.concatenate([rng.permutation(coming), rng.permutation(others)])[: count or config.rollout.num_queries]


def affordable(budget: int | None, calls: int, wanted: int, each: int) -> int:
    """Returns how many queries or prompts, of the wanted number, a budget still pays for at `each` actor calls apiece."""
    return wanted if budget is None else max(min(wanted, (budget - calls) // each), 0)


def candidates_of(incumbent, sampled, sampled_mask, end_id: int) -> list[tuple[int, ...]]:
    """Returns the prompts to be tried, ids with the end token: the incumbent first, then each new one once."""
    seen = {tuple(int(i) for i in incumbent): None}
    for ids, mask in zip(sampled, sampled_mask):
        words = tuple(int(i) for i in ids[mask])
        if words[-1] != end_id:  # ran into the length limit: learn to end where it was cut
            words = (*words[:-1], end_id)
        seen.setdefault(words, None)
    return list(seen)


def attempt(passes, rows, index, prompts, adapter, tokens, score, step: int, known: dict) -> list[dict]:
    """Returns what the actor's greedy answers are worth, one attempt for each place in `index`, as they stand in the store.

    A prompt that stands twice for one row is answered once.

    Args:
      index: rows of the split, one for each prompt.
      prompts: ids with the end token, one for each row in `index`.
      adapter: from places in `index` to LoRA, or None.
      known: attempts whose answers still stand (see `Experts.known`); these are not made again.
    """
    keys = [(rows.examples[place].id, words) for place, words in zip(index, prompts)]
    first: dict[tuple, int] = {}  # key -> its first place
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    new = np.array([i for key, i in first.items() if key not in known], np.int64)
    answers = {}
    if len(new):
        tried, mask = data.pad([prompts[i] for i in new], rows.initial.shape[1], "right")
        answered = passes.answer(
            rows, index[new], tried, mask, adapter and (lambda at: adapter(new[at])), what="rollouts: answering", weigh=True
        )
        texts = tokens.answers(answered.tokens, answered.mask)
        scores = tasks.score_all(score, texts, [rows.examples[index[i]] for i in new])
        answers = dict(zip(new, zip(texts, scores, answered.likelihood)))
    attempts: list[dict] = []
    for i, (key, words) in enumerate(zip(keys, prompts)):
        example = rows.examples[index[i]]
        if i in answers:
            text, found, likelihood = answers[i]
            outcome = {"answer": text, "score": found.strict, "log_likelihood": round(float(likelihood), 6)}
        else:
            before = known[key] if key in known else attempts[first[key]]
            outcome = {name: before[name] for name in ("answer", "score", "log_likelihood")}
        attempts.append({"step": step, "id": example.id, "prompt": tokens.decode(words), **outcome, "best": False, "tokens": list(words)})
        if i not in answers:
            attempts[-1]["known"] = True
    return attempts


def refresh(passes, params, key, rows, experts: Experts, tokens, score, step: int, done: int, num_steps: int) -> dict:
    """Lets sampled prompts compete with the incumbents of some train queries, and returns what came of it.

    For each query, n prompts are sampled with the live generator; the actor answers greedily under each of them and under the
    incumbent, all with the query's own current LoRA. Prompts that occur twice are tried once, and where the actor has no adapter those
    tried in an earlier refresh are not tried again.

    Args:
      tokens: the run's `data.Tokens`.
      score: the task's scoring function.
      step: of the run; done, num_steps: of the phase.
    """
    config = passes.setup.config
    n = config.rollout.num_prompts
    wanted = affordable(config.rollout.budget, experts.calls, config.rollout.num_queries, n + 1)
    if not wanted:
        what = f"no rollouts: rollout.budget={config.rollout.budget} actor calls are spent"
        return {"what": what, "rollout_queries": 0, "rollout_attempts": 0}
    chosen = queries_at(done, len(rows), config, num_steps, wanted)
    h, prompt, prompt_mask = passes.write(params, rows, chosen, key, config.rollout.temperature, copies=n)

    candidates = []  # (place in chosen, ids with the end token), the incumbent first
    for place, row in enumerate(chosen):
        incumbent, real = experts.tokens_of(row)
        if not real.any():
            raise RuntimeError(f"step {step}: the expert set is not in use: query {rows.examples[row].id!r} has no expert prompt")
        at = slice(place * n, (place + 1) * n)
        candidates += [(place, words) for words in candidates_of(incumbent[real], prompt[at], prompt_mask[at], tokens.end_id)]

    owner = np.array([place for place, _ in candidates])
    adapter = passes.adapter(params, h)
    attempts = attempt(
        passes, rows, chosen[owner], [words for _, words in candidates], adapter and (lambda at: adapter(owner[at])), tokens, score,
        step, experts.known,
    )  # fmt: skip
    changed = 0
    for place in range(len(chosen)):
        places = np.flatnonzero(owner == place)
        winner = best([attempts[i] for i in places])
        attempts[places[winner]]["best"] = True
        changed += winner != 0
    experts.add(attempts)
    winners = [attempt for attempt in attempts if attempt["best"]]
    for won in winners:
        ids, mask = experts.tokens_of(experts.places[won["id"]])
        if list(ids[mask]) != won["tokens"]:
            raise RuntimeError(f"the expert set does not hold the winning prompt of query {won['id']!r}: it is not in use")
    mean = float(np.mean([attempt["score"] for attempt in winners]))
    calls = sum(not attempt.get("known") for attempt in attempts)
    start, start_mask = (np.repeat(leaf[chosen], n, axis=0) for leaf in (rows.initial, rows.initial_mask))
    same = np.all(np.where(prompt_mask, prompt, -1) == np.where(start_mask, start, -1), axis=1)
    return {
        "what": f"rollouts for {len(chosen)} queries, {calls} attempts: {changed} new experts, mean score {mean:.2f}",
        "rollout_queries": len(chosen), "rollout_attempts": calls, "rollout_changed": int(changed), "rollout_score": mean,
        "rollout_initial_share": float(same.mean()),
    }  # fmt: skip
