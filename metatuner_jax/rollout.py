"""Best-of-n prompts: the expert set, and its store on disk."""

import json
import os
import pathlib

import numpy as np

from metatuner_jax import config as config_lib
from metatuner_jax import data


class Experts:
    """The best prompt found so far for each train row, and the file of every attempt.

    A line of the file is one attempt: `step, id, prompt, answer, score, log_likelihood, best, tokens`. `best` marks the winner of its
    refresh, `tokens` are the prompt's ids, which are spliced as they are and never made again from the text.
    """

    def __init__(self, path, ids, initial_tokens, length: int):
        """Starts from the initial prompt for every row. `length`: columns for a prompt, its end token included."""
        self.path = pathlib.Path(path)
        self.places = {row_id: i for i, row_id in enumerate(ids)}
        self.ids = list(ids)
        self.tokens = np.zeros((len(ids), length), np.int32)
        self.mask = np.zeros((len(ids), length), bool)
        for place in range(len(ids)):
            self._set(place, initial_tokens)

    def tokens_of(self, index) -> tuple[np.ndarray, np.ndarray]:
        """Returns the expert prompts of train rows, (int32 tokens, bool mask), both [n, length]."""
        return self.tokens[index], self.mask[index]

    def add(self, attempts: list[dict]) -> None:
        """Appends attempts to the file, and makes the best ones experts."""
        with self.path.open("a", encoding="utf-8") as file:
            for attempt in attempts:
                file.write(json.dumps(attempt, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(attempts)

    def restore(self, step: int) -> None:
        """Reads back the attempts of refreshes before `step` and drops the file's other lines."""
        attempts = [attempt for attempt in read_lines(self.path) if attempt["step"] < step]
        write_lines(self.path, attempts)
        self._take(attempts)

    def _take(self, attempts):
        for attempt in attempts:
            if attempt["best"]:
                self._set(self.places[attempt["id"]], attempt["tokens"])

    def _set(self, place, tokens):
        self.mask[place] = np.arange(self.mask.shape[1]) < len(tokens)
        self.tokens[place] = 0
        self.tokens[place, : len(tokens)] = tokens


def read_lines(path) -> list[dict]:
    """Returns the objects of a JSON Lines file of ours, none where there is no file; a last line cut short is left out."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_lines(path, objects) -> None:
    """Replaces a JSON Lines file in one stroke: it is whole at any moment."""
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        for item in objects:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def best(attempts: list[dict]) -> int:
    """Returns the winner's place: the higher score, then the higher log-likelihood, then the first.

    The incumbent stands first, so that a full tie keeps it.
    """
    return max(range(len(attempts)), key=lambda i: (attempts[i]["score"], attempts[i]["log_likelihood"], -i))


def queries_at(step: int, num_rows: int, config: config_lib.Config) -> np.ndarray:
    """Returns the train rows that a refresh before `step` takes, a function of the step alone.

    They are drawn from the rows of the steps up to the next refresh, so that new experts are learnt from while they are new; others
    fill up where these are too few.
    """
    rng = np.random.default_rng([config.seed, 2, step])
    steps = range(step, min(step + config.rollout.every, config.train.num_steps))
    coming = np.unique([data.order_at(s, num_rows, config.train.batch_size, config.seed) for s in steps])
    others = np.setdiff1d(np.arange(num_rows), coming)
    return np.concatenate([rng.permutation(coming), rng.permutation(others)])[: config.rollout.num_queries]


def refresh(passes, params, key, rows, experts: Experts, tokens, score, step: int) -> dict:
    """Lets sampled prompts compete with the incumbents of some train queries, and returns what came of it.

    For each query, n prompts are sampled with the live generator; the actor answers greedily under each of them and under the
    incumbent, all with the query's own current LoRA. Prompts that occur twice are tried once.

    Args:
      tokens: the run's `data.Tokens`.
      score: the task's scoring function.
    """
    config = passes.setup.config
    chosen = queries_at(step, len(rows), config)
    n = config.rollout.num_prompts
    h, prompt, prompt_mask = passes.write(params, rows, chosen, key, config.rollout.temperature, copies=n)

    candidates = []  # (place in chosen, ids with the end token), the incumbent first
    for place, row in enumerate(chosen):
        incumbent, real = experts.tokens_of(row)
        if not real.any():
            raise RuntimeError(f"step {step}: the expert set is not in use: query {rows.examples[row].id!r} has no expert prompt")
        seen = {}
        for ids, mask in [(incumbent, real), *zip(prompt[place * n : (place + 1) * n], prompt_mask[place * n : (place + 1) * n])]:
            words = tuple(int(i) for i in ids[mask])
            if words[-1] != tokens.end_id:  # ran into the length limit: learn to end where it was cut
                words = (*words[:-1], tokens.end_id)
            seen.setdefault(words, None)
        candidates += [(place, words) for words in seen]

    owner = np.array([place for place, _ in candidates])
    width = experts.tokens.shape[1]
    tried = np.array([list(words) + [0] * (width - len(words)) for _, words in candidates], np.int32)
    tried_mask = np.array([[True] * len(words) + [False] * (width - len(words)) for _, words in candidates])
    index = chosen[owner]
    adapter = lambda at: passes.adapt(params["hyper"], h[owner[at]])
    answered = passes.answer(rows, index, tried, tried_mask, adapter, what="rollouts: answering", weigh=True)

    attempts = []
    for i, (place, words) in enumerate(candidates):
        text = tokens.decode(answered.tokens[i], answered.mask[i])
        example = rows.examples[chosen[place]]
        attempts.append(
            {
                "step": step, "id": example.id, "prompt": tokens.decode(words), "answer": text,
                "score": score(text, example).strict, "log_likelihood": round(float(answered.likelihood[i]), 6), "best": False,
                "tokens": list(words),
            }  # fmt: skip
        )
    changed = 0
    for place in range(len(chosen)):
        places = np.flatnonzero(owner == place)
        winner = best([attempts[i] for i in places])
        attempts[places[winner]]["best"] = True
        changed += winner != 0
    experts.add(attempts)
    winners = [attempt for attempt in attempts if attempt["best"]]
    for attempt in winners:
        ids, mask = experts.tokens_of(experts.places[attempt["id"]])
        if list(ids[mask]) != attempt["tokens"]:
            raise RuntimeError(f"the expert set does not hold the winning prompt of query {attempt['id']!r}: it is not in use")
    return {
        "rollout_queries": len(chosen), "rollout_attempts": len(attempts), "rollout_changed": int(changed),
        "rollout_score": float(np.mean([attempt["score"] for attempt in winners])),
    }  # fmt: skip
