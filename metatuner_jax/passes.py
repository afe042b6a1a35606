"""The compiled passes that rollouts and evaluation share, run over any number of rows in batches of one shape."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from metatuner_jax import actor, data, decode, generator, lora, product, sharding, transformer


class Written(NamedTuple):
    """Prompts, and the states of their queries."""

    h: np.ndarray | None  # float32 [n, d]: state at layer k of each query; None where no LoRA is written from it
    tokens: np.ndarray  # int32 [n * copies, m]: the prompts of a query stand together
    mask: np.ndarray  # bool [n * copies, m]


class Answered(NamedTuple):
    """Answers of the actor."""

    tokens: np.ndarray  # int32 [n, m]
    mask: np.ndarray  # bool [n, m]
    first: np.ndarray  # float32 [n]: log-probability of the first token; it moves with all that the actor reads
    likelihood: np.ndarray | None  # float32 [n]: mean log-likelihood of the reference answer, nats per token; None if not asked for


STOP_EVERY = 16  # tokens that are written of each row between two looks for texts to stop before


class Passes:
    """Writes prompts and LoRA, answers, and scores answers, for rows of a split; numpy in, numpy out.

    Every method takes `rows` (see `data.Rows`) and `index`, the rows of it that are meant, in any order and number. `adapter` is a
    function from places in `index` to the LoRA of these rows, or None for the bare actor.
    """

    def __init__(self, setup, frozen, mesh, batch_size: int, progress, tokens=None):
        """Takes what the passes work with; `tokens` (`data.Tokens`) are needed where answers stop before certain texts."""
        self.setup, self.frozen, self.mesh, self.batch_size, self.progress = setup, frozen, mesh, batch_size, progress
        self.stopped_at = tokens.stopped_at if tokens is not None and tokens.stop else None

        self.tokens = 0  # real ones, read and written so far, each counted once in each model
        jit = functools.partial(jax.jit, compiler_options=product.compiler_options())
        self._encode = jit(functools.partial(_encode, setup))
        self.layers = decode.fastest_layers(weights=setup.config.weights)
        self._write = jit(functools.partial(_write, setup, self.layers), static_argnums=0)
        self._adapt = jax.jit(functools.partial(generator.adapt, setup))
        self._static = jax.jit(functools.partial(generator.static, scale=setup.config.hyper.scale))
        self._norms = jax.jit(lora.norms)
        self._unstack = jax.jit(transformer.unstack)
        self._begin = jit(functools.partial(_begin, setup, self.layers), static_argnums=0)
        self._vacant = jax.jit(lambda new, loras: _placed(mesh, *decode.vacant(new, loras, self._batch_size(1))))
        self._refill = jax.jit(lambda *args: _placed(mesh, *decode.refill(*args)), donate_argnums=(0, 1))
        most = None if self.stopped_at is None else STOP_EVERY
        self._advance = jit(functools.partial(_advance, setup, mesh, most), donate_argnums=3)
        self._end = jax.jit(lambda state, more: _placed(mesh, state.replace(ended=state.ended | more), None)[0], donate_argnums=0)
        self._weigh = jit(functools.partial(actor.log_likelihood, setup))

    def encode(self, params, rows, index) -> np.ndarray:
        """Returns the queries' states at layer k, float32 [n, d]."""
        self.tokens += int(rows.generator_mask[index].sum())
        run = lambda at, *batch: self._encode(params, self.frozen, *batch)
        return self._batched("reading queries", rows.generator_mask[index], self._queries(rows, index), run)

    def write(self, params, rows, index, key=None, temperature: float = 0.0, copies: int = 1) -> Written:
        """Returns prompts, greedy without a key, or `copies` samples a query, which is read once for all of them.

        A sample depends on the key, the place in `index` and its number among the copies alone.
        """
        size = self._batch_size(copies)

        def run(at, *batch):
            noise = () if key is None else (key, at.astype(np.int32), temperature)
            h, sampled = self._write(copies, params, self.frozen, *batch, *noise)
            return h, *(leaf.reshape(len(at), copies, -1) for leaf in (sampled.tokens, sampled.mask))

        h, tokens, mask = self._batched("writing prompts", rows.generator_mask[index], self._queries(rows, index), run, size)
        self.tokens += int(rows.generator_mask[index].sum()) * (2 if "encoder" in params else 1) + int(mask.sum())
        return Written(h, *(leaf.reshape(len(index) * copies, -1) for leaf in (tokens, mask)))

    def prompts(self, params, rows, index, for_all=None) -> Written:
        """Returns the prompt with which the method answers each query, greedy where it is written.

        Args:
          for_all: ids of the prompt of a whole task, end token included; None: each row's initial one.
        """
        method = self.setup.method
        if method.prompt == "written":
            return self.write(params, rows, index)
        h = self.encode(params, rows, index) if method.adapter == "generated" else None
        if for_all is None:
            return Written(h, rows.initial[index], rows.initial_mask[index])
        return Written(h, *data.pad([for_all] * len(index), rows.initial.shape[1], "right"))

    def adapter(self, params, h):
        """Returns the method's adapter for the queries with states h, as `answer` takes it."""
        if self.setup.method.adapter is None or "hyper" not in params:
            return None
        if self.setup.method.adapter == "generated":
            return lambda at: self.adapt(params["hyper"], h[at])
        loras = self._static(params["hyper"])
        return lambda at: loras

    def _queries(self, rows, index):
        return lambda at: {name: getattr(rows, name)[index[at]] for name in ("generator", "generator_mask", "own")}

    def adapt(self, hyper, h: np.ndarray):
        """Returns the LoRA that the hypernetwork writes for states h [n, d]."""
        return self._adapt(hyper, sharding.place_rows(h, self.mesh))

    def mean_adapter(self, hyper, h: np.ndarray, rank: int):
        """Returns the mean delta over states h [n, d] as one LoRA of that rank, and the share of its energy kept."""
        batches = [jax.tree.map(lambda leaf: leaf[:, :size], self.adapt(hyper, h[at])) for at, size in self._filled_up(len(h))]
        return lora.mean(batches, rank)

    def delta_norms(self, adapter, count: int) -> dict[str, np.ndarray]:
        """Returns the norms of an adapter's deltas by projection, float32 [l, n], for places 0 to count - 1; [l, 1] where it is one for all.

        Args:
          adapter: as the method `adapter` returns it.
        """
        if self.setup.method.adapter == "static":
            return {target: np.asarray(leaf)[:, None] for target, leaf in sharding.fetch(self._norms(adapter(None))).items()}
        batches = [jax.tree.map(lambda leaf: leaf[:, :size], sharding.fetch(self._norms(adapter(at)))) for at, size in self._filled_up(count)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *batches)

    def _filled_up(self, count):
        """Yields (places, how many of them count) of batches of one size, the last filled up with its last place."""
        for start in range(0, count, self.batch_size):
            yield np.minimum(np.arange(start, start + self.batch_size), count - 1), min(self.batch_size, count - start)

    def answer(
        self, rows, index, prompt, prompt_mask, adapter=None, what: str = "answering", weigh: bool = False,
        max_tokens: int | None = None, key=None, temperature: float = 0.0,
    ) -> Answered:
        """Returns answers, greedy without a key; a sample depends on the key and the place in `index` alone.

        Args:
          prompt, prompt_mask: [n, m], a prompt for each place in `index`.
          weigh: also say how likely the reference answers are.
          max_tokens: longest answer; None: actor.max_answer_tokens.
        """
        max_tokens = max_tokens or self.setup.config.actor.max_answer_tokens
        texts = {"prompt": prompt, "prompt_mask": prompt_mask, "query": rows.query[index], "query_mask": rows.query_mask[index]}
        answered = self._write_answers(what, texts, adapter, max_tokens, key, temperature)
        if weigh:
            texts |= {"answer": rows.answer[index], "answer_mask": rows.answer_mask[index]}

            def run(at, *batch):
                return self._weigh(self.frozen, adapter(at) if adapter else None, *batch)

            part = lambda at: {name: leaf[at] for name, leaf in texts.items()}
            answered = answered._replace(likelihood=self._batched(f"{what}, weighing", texts["query_mask"], part, run))
        words = int((prompt_mask & (prompt != self.setup.end_id)).sum())
        self.tokens += len(index) * len(self.setup.prefix) + words + int(rows.query_mask[index].sum()) + int(answered.mask.sum())
        return answered

    def _write_answers(self, what, texts, adapter, max_tokens, key, temperature) -> Answered:
        """Returns the answers to texts, arrays by name, not weighed.

        A batch of them is written at a time. Once a quarter of these have ended, others take their places, and need not wait for the
        longest.
        """
        count = len(texts["query"])
        found = Answered(np.zeros((count, max_tokens), np.int32), np.zeros((count, max_tokens), bool), np.zeros(count, np.float32), None)
        noise = {} if key is None else {"key": key, "temperature": temperature}
        unrolled = self.layers == "unroll" and max_tokens > 1
        layers = self._unstack(self.frozen.actor["layers"]) if unrolled else None

        def read(at, batch):
            """Returns texts with their first token, and their LoRA."""
            loras = adapter(at) if adapter else None
            numbers, *batch = sharding.place_rows((at.astype(np.int32), *batch), self.mesh)
            return self._begin(max_tokens, self.frozen, loras, {"rows": numbers, **noise}, *batch), loras

        with self.progress.task(what, count) as advance:
            for group in self._alike(texts["query_mask"], self._batch_size(1)):
                batch = data.trim({name: leaf[group] for name, leaf in texts.items()}, self.setup.config.data.buckets)
                begin = lambda some, group=group, batch=batch: read(group[some], [leaf[some] for leaf in batch.values()])
                for ended, tokens, sizes, first in self._as_they_end(len(group), begin, layers, noise):
                    at = group[ended]
                    if self.stopped_at is not None:
                        sizes = np.array([self.stopped_at(row[:n]) or n for row, n in zip(tokens, sizes)], np.int64)
                    found.tokens[at], found.mask[at], found.first[at] = tokens, np.arange(max_tokens) < sizes[:, None], first
                    advance(len(at))
        return found

    def _as_they_end(self, count: int, begin, layers, noise):
        """Yields (numbers, tokens, how many of these, first log-probabilities) of rows 0 to `count`, those that have ended at a time.

        Args:
          begin: from numbers of rows to the rows with their first token, and their LoRA.
        """
        slots, some = self._batch_size(1), self._batch_size(4)
        waiting, holds = np.arange(count), np.full(slots, -1)  # rows to come, and the one in each slot
        state: Any = None  # decode.Writing, once there are rows in the slots
        loras = None
        while len(waiting) or (holds >= 0).any():
            free = np.flatnonzero(holds < 0)
            while len(waiting) and len(free) >= min(some, len(waiting)):
                taken, waiting = waiting[:some], waiting[some:]
                places = np.full(some, slots)  # none, where `taken` is filled up
                places[: len(taken)], free = free[: len(taken)], free[len(taken) :]
                holds[places[: len(taken)]] = taken
                taken = taken[np.minimum(np.arange(some), len(taken) - 1)]
                new, its_loras = begin(taken)
                state, loras = self._fill(state, loras, new, its_loras, places)
            until = min(some, len(waiting)) or slots
            state = self._stop(state)
            while (found := sharding.fetch((state.ended, state.tokens, state.count, state.first)))[0].sum() < until:
                state = self._stop(self._advance(self.frozen, layers, loras, state, {"until": until, **noise}))
            has_ended, *written = found
            ended = np.flatnonzero((holds >= 0) & has_ended)
            yield holds[ended], *(leaf[ended] for leaf in written)
            holds[ended] = -1

    def _stop(self, state):
        """Returns rows of which those have ended, too, that hold a text to stop before."""
        if self.stopped_at is None:
            return state
        tokens, count, ended = sharding.fetch((state.tokens, state.count, state.ended))
        holds = [not over and self.stopped_at(row[:n]) is not None for row, n, over in zip(tokens, count, ended)]
        return self._end(state, np.array(holds)) if any(holds) else state

    def _fill(self, state, loras, new, its_loras, places):
        """Returns (state, LoRA) of all slots, with new rows in some of them; no state: with nothing in the others."""
        of_rows = its_loras is not None and jax.tree.leaves(its_loras)[0].ndim == 4
        for_all, its_loras = (None, its_loras) if of_rows else (its_loras, None)
        if state is None:
            state, loras = self._vacant(new, its_loras)
        state, loras = self._refill(state, loras if of_rows else None, new, its_loras, places)
        return state, loras if of_rows else for_all

    def _batch_size(self, parts: int) -> int:
        """Returns how many rows a part of a batch has, a multiple of what the mesh splits them into."""
        split = sharding.row_parts(self.mesh)
        return split * -(-self.batch_size // (parts * split))

    def _alike(self, masks, least: int) -> list[np.ndarray]:
        """Returns all places in groups of rows that are trimmed alike, short ones first, each of `least` rows or more where there are as many."""
        parts = data.parts_of("query", masks, self.setup.config.data.buckets)
        order, groups, start = np.argsort(parts, kind="stable"), [], 0
        for stop in (*(np.flatnonzero(np.diff(parts[order])) + 1), len(order)):
            if min(stop - start, len(order) - stop) >= least or stop == len(order):
                groups.append(order[start:stop])
                start = stop
        return groups

    def _batched(self, what, masks, part, run, batch_size=None):
        """Returns run(places, *part(places).values()) over all places, in batches of one size, the last filled up with its last row.

        Rows of a length go together, so that a batch of short ones is trimmed; what comes back is in the order of the places.

        Args:
          masks: bool [n, t], the real tokens of each place's query.
          part: from places to the arrays that `run` takes, by name.
        """
        batch_size, count, buckets = batch_size or self._batch_size(1), len(masks), self.setup.config.data.buckets
        order, outputs = np.argsort(masks.sum(axis=1), kind="stable"), []
        with self.progress.task(what, count) as advance:
            for start in range(0, count, batch_size):
                at = order[np.minimum(np.arange(start, start + batch_size), count - 1)]
                result = run(at, *sharding.place_rows(tuple(data.trim(part(at), buckets).values()), self.mesh))
                size = min(batch_size, count - start)
                outputs.append(jax.tree.map(lambda leaf: leaf[:size], sharding.fetch(result)))
                advance(size)
        back = np.argsort(order)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *outputs)


# --- what is compiled ---


def _encode(setup, params, frozen, tokens, mask, own):
    return generator.encode(setup, params, frozen, tokens, mask, own)


def _write(setup, layers, copies, params, frozen, tokens, mask, own, key=None, places=None, temperature=0.0):
    query = generator.read(setup, params, frozen, tokens, mask, own)
    prefill = generator.start(setup, params, frozen, query).repeat(copies)
    if places is not None:
        places = (places[:, None] * copies + np.arange(copies, dtype=np.int32)).reshape(-1)
    h = generator.state(setup, params, frozen, query, tokens, mask, own)
    return h, generator.write(setup, params, frozen, prefill, key, places, temperature, layers)


def _begin(setup, layers, max_tokens, frozen, loras, how, *rows):
    return actor.begin(setup, frozen, loras, *rows, max_tokens, layers=layers, **how)


def _advance(setup, mesh, most, frozen, layers, loras, state, how):
    return _placed(mesh, actor.advance(setup, frozen, loras, state, layers=layers, most=most, **how), None)[0]


def _placed(mesh, state, loras):
    """Returns (rows that are written, their LoRA) split over the mesh, always in the same way: else what takes them is compiled again."""
    of_rows = {name: sharding.place_rows(getattr(state, name), mesh) for name in (*decode.OF_ROWS, "column")}
    caches = jax.tree.map(lambda leaf: sharding.place_rows(leaf, mesh, leaf.ndim - 4, heads=True), state.caches)
    return state.replace(**of_rows, caches=caches), sharding.place_rows(loras, mesh, 1)
