"""Pairs of answers for direct preference optimisation: sampled from the actor, told apart by the task's score."""

import pathlib

import numpy as np

from metatuner_jax import data, files, rollout, tasks


class Pairs:
    """The pairs found so far, and their file: `step, id, samples, chosen, rejected, chosen_tokens, rejected_tokens`.

    `samples` are all answers to the query, each with its score; one that gave no pair has null in the place of both.
    """

    def __init__(self, path, ids, length: int):
        """Starts empty. `ids`: of the train rows; `length`: columns for an answer, its end token included."""
        self.path, self.length = pathlib.Path(path), length
        self.places = {row_id: i for i, row_id in enumerate(ids)}
        self.found: list[dict] = []
        self.calls = 0

    def add(self, lines: list[dict]) -> None:
        """Appends to the file and takes the pairs."""
        files.append_lines(self.path, lines)
        self._take(lines)

    def restore(self, step: int) -> None:
        """Reads back what was found before `step` and drops the file's other lines."""
        found = files.read_lines(self.path)
        if not found:
            return
        lines = [line for line in found if line["step"] < step]
        files.write_lines(self.path, lines)
        self.found, self.calls = [], 0
        self._take(lines)

    def _take(self, lines):
        self.calls += sum(len(line["samples"]) for line in lines)
        self.found += [line for line in lines if line["chosen"] is not None]

    def batch_at(self, done: int, rows, experts, batch_size: int, seed: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step: rows of `data.batch_of` with `chosen`, `rejected` and their masks beside them.

        Raises:
          RuntimeError: there are no pairs.
        """
        if not self.found:
            raise RuntimeError(
                "there is no pair of a right and a wrong answer to learn from: all sampled answers were right; raise "
                "rollout.num_queries, preference.num_samples or preference.temperature"
            )
        chosen = [self.found[i] for i in data.order_at(done, len(self.found), batch_size, seed)]
        batch = data.batch_of(np.array([self.places[line["id"]] for line in chosen]), rows, experts)
        for name in ("chosen", "rejected"):
            batch[name], batch[name + "_mask"] = data.pad([line[name + "_tokens"] for line in chosen], self.length, "right")
        return batch


def refresh(passes, params, key, rows, experts, pairs: Pairs, tokens, score, step: int, done: int, num_steps: int) -> dict:
    """Samples answers to some train queries with the current adapter, adds the pairs, and returns what came of it.

    Chosen is the first right sample or else the reference answer; rejected the first wrong one. A query without a wrong sample
    gives no pair.

    Source: pairs as Rafailov et al. 2023 (arXiv 2305.18290) sample them, from the policy itself, with the score as the judge.
    """
    config = passes.setup.config
    n = config.preference.num_samples
    wanted = rollout.affordable(config.rollout.budget, pairs.calls, config.rollout.num_queries, n)
    chosen = rollout.queries_at(done, len(rows), config, num_steps, wanted or 1)[:wanted]
    found = []
    if wanted:
        index = np.repeat(chosen, n)
        prompt, mask = experts.tokens_of(index)
        answered = passes.answer(
            rows, index, prompt, mask, passes.adapter(params, None), what="sampling answers", key=key,
            temperature=config.preference.temperature,
        )  # fmt: skip
        texts = tokens.answers(answered.tokens, answered.mask)
        scores = tasks.score_all(score, texts, [rows.examples[row] for row in index])
    for place, row in enumerate(chosen):
        example = rows.examples[row]
        sampled = []
        for i in range(place * n, (place + 1) * n):
            ids = [int(t) for t in answered.tokens[i][answered.mask[i]]]
            if ids[-1] != tokens.end_id:  # ran into a text to stop before, or into the length limit
                ids = [*tokens.before_stop(ids)[: pairs.length - 1], tokens.end_id]
            sampled.append((scores[i].strict, texts[i], ids))
        reference = (1.0, example.answer, [int(t) for t in rows.answer[row][rows.answer_mask[row]]])
        right = next((one for one in sampled if one[0] == 1), reference)
        wrong = next((one for one in sampled if one[0] < 1), None)
        samples = [{"answer": text, "score": worth} for worth, text, _ in sampled]
        line = {"step": step, "id": example.id, "samples": samples, "chosen": None, "rejected": None}
        if wrong is not None:
            line |= {"chosen": right[1], "rejected": wrong[1], "chosen_tokens": right[2], "rejected_tokens": wrong[2]}
        found.append(line)
    pairs.add(found)
    new = sum(line["chosen"] is not None for line in found)
    return {
        "what": f"{n} answers to each of {len(chosen)} queries: {new} pairs",
        "rollout_queries": len(chosen), "rollout_attempts": n * len(chosen), "rollout_changed": new,
    }  # fmt: skip
