"""The compiled passes that rollouts and evaluation share, run over any number of rows in batches of one shape."""

import jax
import numpy as np

from metatuner_jax import actor, generator, lora, sharding


class Passes:
    """Writes prompts and LoRA, answers, and scores answers, for rows of a split; numpy in, numpy out.

    Every method takes `rows` (see `data.Rows`) and `index`, the rows of it that are meant, in any order and number. `adapter` is a
    function from places in `index` to the LoRA of these rows, or None for the bare actor.
    """

    def __init__(self, setup, frozen, mesh, batch_size: int, progress):
        self.setup, self.frozen, self.mesh, self.batch_size, self.progress = setup, frozen, mesh, batch_size, progress

        def compiled(function):
            return jax.jit(lambda *args: function(setup, *args))

        self._encode = compiled(generator.encode)
        self._write = compiled(generator.write)
        self._adapt = compiled(generator.adapt)
        self._answer = compiled(actor.answer)
        self._log_likelihood = compiled(actor.log_likelihood)

    def encode(self, params, rows, index) -> np.ndarray:
        """Returns the queries' states at layer k, float32 [n, d]."""
        part = lambda at: (rows.generator[index[at]], rows.generator_mask[index[at]], rows.own[index[at]])
        return self._batched("reading queries", len(index), part, lambda at, *batch: self._encode(params, self.frozen, *batch))

    def write(self, params, rows, index, key=None, temperature: float = 0.0):
        """Returns prompts (tokens, mask), greedy without a key. A sample depends on the key and the place in `index` alone."""

        def run(at, tokens, mask, numbers):
            if key is None:
                return self._write(params, self.frozen, tokens, mask)
            return self._write(params, self.frozen, tokens, mask, key, numbers, temperature)

        part = lambda at: (rows.generator[index[at]], rows.generator_mask[index[at]], at.astype(np.int32))
        sampled = self._batched("writing prompts", len(index), part, run)
        return sampled.tokens, sampled.mask

    def adapt(self, hyper, h: np.ndarray):
        """Returns the LoRA that the hypernetwork writes for states h [n, d]."""
        return self._adapt(hyper, sharding.place_rows(h, self.mesh))

    def mean_adapter(self, hyper, h: np.ndarray, rank: int):
        """Returns the mean delta over states h [n, d] as one LoRA of that rank, and the share of its energy kept."""
        batches = []
        for start in range(0, len(h), self.batch_size):
            at = np.minimum(np.arange(start, start + self.batch_size), len(h) - 1)
            size = min(self.batch_size, len(h) - start)
            batches.append(jax.tree.map(lambda leaf: leaf[:, :size], self.adapt(hyper, h[at])))
        return lora.mean(batches, rank)

    def answer(self, rows, index, prompt, prompt_mask, adapter=None, what: str = "answering"):
        """Returns greedy answers (tokens, mask). `prompt` and its mask: [n, m]."""

        sampled = self._answers(rows, index, prompt, prompt_mask, adapter, what)
        return sampled.tokens, sampled.mask

    def first_token(self, rows, index, prompt, prompt_mask, adapter=None) -> np.ndarray:
        """Returns the log-probability of the first token of each greedy answer, [n]: it moves with all that the actor reads."""
        return self._answers(rows, index, prompt, prompt_mask, adapter, "checking").first

    def _answers(self, rows, index, prompt, prompt_mask, adapter, what):
        def run(at, *batch):
            return self._answer(self.frozen, adapter(at) if adapter else None, *batch)

        part = lambda at: (prompt[at], prompt_mask[at], rows.query[index[at]], rows.query_mask[index[at]])
        return self._batched(what, len(index), part, run)

    def log_likelihood(self, rows, index, prompt, prompt_mask, adapter=None) -> np.ndarray:
        """Returns the mean log-likelihood of the reference answers, nats per token, [n]."""

        def run(at, *batch):
            return self._log_likelihood(self.frozen, adapter(at) if adapter else None, *batch)

        part = lambda at: (
            prompt[at], prompt_mask[at], rows.query[index[at]], rows.query_mask[index[at]], rows.answer[index[at]],
            rows.answer_mask[index[at]],
        )  # fmt: skip
        return self._batched("weighing prompts", len(index), part, run)

    def _batched(self, what, count, part, run):
        """Returns run(places, *part(places)) over all places, in batches of one size, the last filled up with its last row."""
        outputs = []
        with self.progress.task(what, count) as advance:
            for start in range(0, count, self.batch_size):
                at = np.minimum(np.arange(start, start + self.batch_size), count - 1)
                result = run(at, *sharding.place_rows(part(at), self.mesh))
                size = min(self.batch_size, count - start)
                outputs.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:size], result))
                advance(size)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)
