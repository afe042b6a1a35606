"""What a run would take, without doing it: parameters, memory a device, FLOPs, and what the devices of a mesh say to each other.

    python -m experiments.run --plan --config FILE [--config.mesh.fsdp=8 ...] [--devices N | --topology h100:8] [--memory GIB] [--json FILE]

Memory and FLOPs are worked out from shapes and from the rules of `sharding`. Collectives are read from the step as it is compiled, with
few layers, for as many pretended devices; with `--topology` as the compiler of those TPUs or GPUs makes it, with its memory and
an estimate of its work (see `compiled`, `roofline`). No weights are loaded, and nothing is written but `--json`.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import sys

import jax

from experiments import compiled
from experiments import run as run_lib
from experiments import topology as topology_lib
from metatuner_jax import attention, data, decode, files, generator, methods, networks, pretrained, product, sharding, transformer
from metatuner_jax import config as config_lib
from metatuner_jax import job as job_lib
from metatuner_jax import memory as memory_lib
from metatuner_jax.config import ModelConfig, projection_widths

GIB = 2**30
MASTER = 4  # bytes of a number that learns, of its moments and of its gradient
PREFIX = 3  # tokens of a chat template before the prompt, where no tokenizer says how many: as in SmolLM2's and Qwen2.5's


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The shape of a mesh, of devices that need not be there: all that the rules of `sharding` look at."""

    data: int
    fsdp: int
    tensor: int

    @property
    def shape(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


def mesh_of(config: config_lib.MeshConfig, devices: int, topology: str | None = None) -> Mesh:
    """Returns the mesh of so many devices, as `sharding.make_mesh` makes it; `topology`: what says how many there are.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    rest = config.fsdp * config.tensor
    found = Mesh(config.data or max(devices // rest, 1), config.fsdp, config.tensor)
    if found.size != devices:
        raise ValueError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor} make {found.size} devices and "
            f"{f'--topology={topology} has {devices}' if topology else f'--devices={devices}'}: "
            "their product must be the number of devices (mesh.data=none takes what is left)"
        )
    return found


# --- the command line ---


def main(argv) -> int:
    """Plans what the command line says. Returns the exit code: 0 it fits, 1 it does not.

    Raises:
      run.Mistake, ValueError: the command line, the config or the models cannot be used.
    """
    names = ("--config", "--workdir", "--devices", "--topology", "--memory", "--json", *run_lib.OF_PROCESSES)  # as a run's, but for four
    options, assignments = run_lib.read_arguments(argv, names, ("--plan",))
    path = run_lib.config_path(options)
    devices = _number(options, "--devices", int)
    memory = _number(options, "--memory", float)
    config = run_lib.load_config(path, assignments)
    topology = topology_of(options["--topology"], devices, memory) if "--topology" in options else None
    name = topology["name"] if topology else None
    devices = topology["devices"] if topology else devices or jax.device_count()
    memory = (topology["memory"] if topology else memory or device_memory() / GIB) * GIB
    with product.written_for(topology["platform"] if topology else product.platform()):
        mesh = mesh_of(config.mesh, devices, name)
        setup, lengths, known = setup_of(config, mesh)
        plan = make_plan(setup, lengths, mesh)
        plan["lengths"]["from"] = "the rows" if known else "the config's limits, as there is no tokenizer"
        try:
            found = compiled.of_step(setup, lengths, mesh, name)
        except RuntimeError as error:  # the rest stands without it
            found = {"by_kind": {}, "failed": str(error)}
        plan["topology"] = {**topology, **{name: found.pop(name) for name in compiled.OF_TOPOLOGY if name in found}} if topology else None
        plan["collectives"] = found
        too_much = plan["memory"]["peak"] > memory
        refusal = refuse(setup, lengths, mesh, plan, memory) if too_much else refuse_compiled(config, mesh, plan, memory)
        if refusal and topology and topology["share"]:
            refusal += more_of_gpu(plan)
    plan["memory"] |= {"limit": int(memory), "fits": refusal is None}
    plan["refusal"] = refusal
    print(table(plan))
    if "--json" in options:
        files.write_json(pathlib.Path(options["--json"]), plan)
    if refusal:
        print(f"error: {refusal}", file=sys.stderr)
    return 1 if refusal else 0


def _number(options, name, kind):
    if name not in options:
        return None
    try:
        value = kind(options[name])
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise run_lib.Mistake(f"{name}={options[name]} must be a number above 0")
    return value


def topology_of(name: str, devices: int | None, memory: float | None) -> dict:
    """Returns {"name", "platform", "devices", "kind", "memory", "share", "variable", "ghz"} of a topology of TPUs or GPUs, none of which need be there.

    Memory is the GiB of a device that a run may take, of a GPU the share that a variable of the environment says; a clock that is not known is None.

    Raises:
      run.Mistake: there is no such topology, no compiler for it, or it has not as many devices as are asked for.
    """
    if not name:
        raise run_lib.Mistake("--topology= needs a kind of device and how many, such as v5e:4x4 or h100:8")
    jax.config.update("jax_platforms", "cpu")  # no device is needed, and those that are there may be at work
    platform = topology_lib.platform(name)
    try:
        found = compiled.look_up(name)
    except RuntimeError as error:
        text = str(error)
        if "not installed" in text or "not implemented for cuda" in text:
            what, extra = ("GPUs", "cuda") if platform == "gpu" else ("TPUs", "tpu")
            raise run_lib.Mistake(f"--topology={name} needs the compiler of {what}, which comes with `pip install -e .[{extra}]`") from None
        reason = re.search("(?:ValueError|INVALID_ARGUMENT): (.*)", text)
        if reason:
            raise run_lib.Mistake(f"--topology={name} is not one of TPUs, such as v5e:4x4, or GPUs, such as h100:8: {reason[1]}") from None
        raise run_lib.Mistake(f"--topology={name} cannot be looked up: {text}") from None
    if devices not in (None, found["devices"]):
        raise run_lib.Mistake(f"--topology={name} has {found['devices']} devices and --devices={devices}: leave --devices out")
    share, variable, ghz = None, None, None
    if platform == "tpu":
        memory_of_kind, ghz = topology_lib.TPUS.get(found["kind"], (None, None))
        memory = memory or memory_of_kind
    elif memory is None:
        share, variable = gpu_share()
        memory = share * topology_lib.gpu(name).memory
    if memory is None:
        raise run_lib.Mistake(f"--topology={name} is of {found['kind']}, of which no memory is known: say it with --memory")
    return {"name": name, "platform": platform, **found, "memory": memory, "share": share, "variable": variable, "ghz": ghz}


def gpu_share() -> tuple[float, str]:
    """Returns the share of a GPU's memory that jax takes, as the environment has it, and the variable that says so; raises run.Mistake where it says none."""
    name = next((name for name in topology_lib.SHARES if os.environ.get(name)), topology_lib.SHARES[0])
    said = os.environ.get(name) or topology_lib.PREALLOCATED
    with contextlib.suppress(ValueError):
        if 0 < float(said) <= 1:
            return float(said), name
    raise run_lib.Mistake(f"{name}={said} in the environment must be above 0 and at most 1")


def device_memory() -> float:
    """Returns the bytes of a device: what it says itself, or its share of the host's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return stats.get("bytes_limit") or host / jax.local_device_count()


def setup_of(config, mesh):
    """Returns (generator.Setup, data.Lengths, whether the rows were looked at): without a tokenizer, rows are as long as the config lets them."""
    paths = [job_lib.of_model(config, role, lambda name: pretrained.resolve(name, weights=False)) for role in ("generator", "actor")]
    if all(not path.is_dir() or (path / "tokenizer.json").is_file() for path in paths):
        job = job_lib.prepare(config, mesh=mesh)
        return job.setup, job.lengths, True
    config = methods.resolve(config)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=product.fastest_dtype())
    models = [job_lib.of_model(config, role, pretrained.load_config) for role in ("generator", "actor")]
    config_lib.check_model(config, *models)
    vocab_size = min(model.vocab_size for model in models)
    models = [dataclasses.replace(model, vocab_size=vocab_size) for model in models]
    lengths = data.Lengths(config.generator.max_query_tokens, config.generator.max_query_tokens, config.actor.max_answer_tokens)
    job_lib.check_lengths(config, *models, lengths, PREFIX)
    job_lib.check_rows(config, mesh)
    return generator.Setup(config, *models, 0, (0,) * PREFIX), lengths, False


# --- memory ---


def bytes_of(tree, mesh, prefix: str = "") -> int:
    """Returns the bytes that each device holds of a tree of shapes, where the rules put its leaves."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        spec = sharding.spec_at(prefix + sharding.path_text(path), leaf.shape, mesh)
        total += leaf.size * leaf.dtype.itemsize // math.prod(sharding.ways(axes, mesh) for axes in spec)
    return total


def count(tree) -> int:
    """Returns how many numbers a tree of shapes has."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- one model's share of a device ---


@dataclasses.dataclass(frozen=True)
class Share:
    """What a device computes of a model: widths split by `tensor`, weights brought together over `fsdp`."""

    model: ModelConfig
    tensor: int
    itemsize: int  # of the type that it computes in

    def _split(self, size):
        return size // self.tensor if size % self.tensor == 0 else size

    @property
    def heads(self) -> int:
        return self._split(self.model.num_heads)

    @property
    def kv(self) -> int:
        return self._split(self.model.num_kv_heads * self.model.head_width)

    @property
    def ff(self) -> int:
        return self._split(self.model.ff_width)

    @property
    def words(self) -> int:
        return self._split(self.model.vocab_size)

    def kept(self, tokens: int, seen: int, remat: str) -> int:
        """Returns the bytes that a layer keeps of a row for the backward pass: its input, and what `train.remat` does not make again."""
        d, q = self.model.width, self.heads * self.model.head_width
        found = d
        if remat != "all":
            found += d + q + 2 * self.kv + 2 * self.ff + (d if self.model.post_norms else 0)
        if remat == "none":  # norms, the gate's parts and the weights of attention, in float32 and as they go on
            found += 2 * d + self.ff if self.itemsize < MASTER else 0
            weights = seen * self.heads * (4 + self.itemsize) if attention.at_once(tokens) == tokens else 0
            return tokens * (found * self.itemsize + 4 * (2 * d + 3 * self.ff) + weights)
        return tokens * found * self.itemsize

    def cache(self, tokens: int) -> int:
        """Returns the bytes of a row's keys and values in a layer."""
        return tokens * 2 * self.kv * self.itemsize

    def at_work(self, tokens: int, seen: int) -> int:
        """Returns the bytes of a row that a layer takes while it is computed: scores and weights of attention, the gate's parts."""
        return attention.at_once(tokens) * self.heads * seen * (4 + self.itemsize) + tokens * 3 * self.ff * 4

    def head(self, mesh) -> int:
        """Returns the bytes of the head, or of the embedding in its place, where it is brought together: else its words stay where they are."""
        return 0 if sharding.divides_words(self.model.vocab_size, mesh) else self.words * self.model.width * self.itemsize

    def layer(self) -> int:
        """Returns the bytes of a layer's weights."""
        sizes = {name: math.prod(projection_widths(self.model, name)) for name in config_lib.PROJECTIONS}
        return sum(self._split(size) for size in sizes.values()) * self.itemsize

    def scores(self, tokens: int) -> int:
        """Returns the bytes of the scores of a row's next tokens, made for a few at a time (see `transformer.in_chunks`), forward and backward."""
        at_once = -(-tokens // -(-tokens // transformer.SCORED_TOKENS))
        return at_once * self.words * (8 + self.itemsize)


# --- memory and the whole ---


def make_plan(setup, lengths, mesh) -> dict:
    """Returns parameters, memory a device by part, and FLOPs of a step; bytes and counts, all by analysis."""
    state, frozen = _shapes_of(_Key(setup))
    config, method = setup.config, setup.method
    parameters = {f"learning: {name}": count(tree) for name, tree in state.params.items() if count(tree)}
    one = config.generator.model == config.actor.model and frozen.generator is not None
    frozen_parts = {"generator and actor, one checkpoint": frozen.actor} if one else {"generator": frozen.generator, "actor": frozen.actor}
    parameters |= {f"frozen: {name}": count(tree) for name, tree in frozen_parts.items() if tree is not None}
    phases = memory(setup, lengths, mesh)
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    largest = max(totals, key=totals.__getitem__)
    return {
        "method": config.method, "dtype": config.dtype, "weights": config.weights, "mesh": mesh.shape, "devices": mesh.size,
        "generator": {"model": config.generator.model, "train": config.generator.train, **dataclasses.asdict(setup.generator), "num_shared": setup.num_shared},
        "actor": {"model": config.actor.model, **dataclasses.asdict(setup.actor)},
        "batch_size": config.train.batch_size, "eval_batch_size": config.eval.batch_size, "remat": config.train.remat,
        "lengths": {**dataclasses.asdict(lengths), "prompt": config.generator.max_prompt_tokens, "prefix": len(setup.prefix)},
        "parameters": {**parameters, "learning": count(state.params), "frozen": sum(count(tree) for tree in frozen_parts.values())},
        "memory": {"phases": phases, "totals": totals, "largest": largest, "peak": totals[largest]},
        "flops": step_flops(setup, lengths) if method.learns else {},
    }  # fmt: skip


class _Key:
    """A setup, alike with others whose shapes are the same: what a refusal tries differs in mesh and batch."""

    def __init__(self, setup):
        self.setup, c = setup, setup.config
        same = c.generator.model == c.actor.model
        self.text = repr((c.method, c.dtype, c.weights, c.generator, c.hyper, c.warmup, c.train.prompt_gradient, setup.generator, setup.actor, same))

    def __hash__(self):
        return hash(self.text)

    def __eq__(self, other):
        return self.text == other.text


@functools.lru_cache(8)
def _shapes_of(key):
    return networks.shapes(key.setup)


def held(setup, mesh) -> dict[str, int]:
    """Returns the bytes a device holds all through a run, by part."""
    state, frozen = _shapes_of(_Key(setup))
    c = setup.config
    found = {}
    if c.generator.model == c.actor.model and frozen.generator is not None:
        found["generator and actor, frozen, one checkpoint"] = bytes_of(frozen.actor, mesh)
    else:
        found["generator, frozen"] = bytes_of(frozen.generator, mesh)
        found["actor, frozen"] = bytes_of(frozen.actor, mesh)
    found["what learns"] = bytes_of(state.params, mesh)
    found["copy of the prompt decoder"] = bytes_of(state.prompt_copy, mesh)
    found["moments of the optimiser"] = bytes_of(state.opt_state, mesh)
    return found


def memory(setup, lengths, mesh) -> dict[str, dict[str, int]]:
    """Returns the bytes a device holds when each phase holds most, by part: of the step, of rollouts and of evaluation."""
    kept = held(setup, mesh)
    phases = {"step": {**kept, **step_memory(setup, lengths, mesh)}} if setup.method.learns else {}
    if setup.config.rollout.every and (setup.method.prompt != "initial" or setup.method.preference):
        phases["rollouts"] = {**kept, **answer_memory(setup, lengths, mesh, evaluates=False)}
    phases["evaluation"] = {**kept, **answer_memory(setup, lengths, mesh, evaluates=True)}
    return {name: {part: size for part, size in parts.items() if size} for name, parts in phases.items()}


def step_memory(setup, lengths, mesh) -> dict[str, int]:
    """Returns the bytes a device takes in a step beside what it holds all through, by part, at the moment when they are most.

    There are two such moments: before the backward pass, when all that it needs is kept; and at the update, when all gradients are there.
    Both hold a second copy of the moments, which the compiler makes before the first layer (with jax 0.10 on CPUs). Where the terms take
    turns, it is the larger one's.
    """
    turns = [("task",), ("prompt",)] if setup.method.alternating else [("task", "prompt")]
    return max((_turn_memory(setup, lengths, mesh, terms) for terms in turns), key=lambda parts: sum(parts.values()))


def _turn_memory(setup, lengths, mesh, terms) -> dict[str, int]:
    state, _ = _shapes_of(_Key(setup))
    config, method, k = setup.config, setup.method, setup.num_shared
    itemsize, remat = setup.dtype.itemsize, config.train.remat
    rows = -(-config.train.batch_size // (config.train.accumulate * sharding.row_parts(mesh)))
    ours, theirs = (Share(model, mesh.tensor, itemsize) for model in (setup.generator, setup.actor))
    layers, query, prompt = setup.generator.num_layers, lengths.generator, config.generator.max_prompt_tokens
    full = config.generator.train == "full" and method.learns_generator
    learning = bytes_of(state.params, mesh)
    relaxed = config.train.prompt_gradient == "straight_through"
    samples = method.prompt == "written"
    learns_prompt, adapts = samples and "prompt" in terms, method.adapter is not None and "task" in terms
    writes = learns_prompt or (samples and relaxed)
    answered = actor_tokens(setup, lengths)
    pairs = 2 if method.preference else 1

    found = {"copies of the moments": 2 * learning, "gradients of the parts before": learning if config.train.accumulate > 1 else 0}
    if full:
        generator_parts = {name: tree for name, tree in state.params.items() if name in ("embed", "shared", "prompt", "encoder")}
        found["generator in the type of the compute"] = bytes_of(generator_parts, mesh) * itemsize // MASTER if itemsize < MASTER else 0
    at_update = {**found, "gradients": learning}

    of_generator = 0
    if method.learns_generator:
        read = layers if writes else k
        of_generator += rows * read * ours.kept(query, query, remat) + (0 if method.shared else rows * k * ours.kept(query, query, remat))
    if writes:
        segments = 1 + (relaxed and adapts)
        more = segments * (prompt - 1)
        of_generator += rows * layers * (ours.kept(more, query + prompt, remat) + ours.cache(query))
    found["kept activations of the generator"] = of_generator
    if adapts:
        found["kept activations of the actor"] = rows * pairs * setup.actor.num_layers * theirs.kept(answered, answered, remat)
    if method.adapter == "generated":
        found["LoRA of the rows, and its gradient"] = 2 * rows * lora_bytes(setup)
    found["scores of words"] = rows * max(theirs.scores(lengths.answer) * pairs if adapts else 0, ours.scores(prompt) if writes else 0)
    if mesh.fsdp > 1:
        used = [share for share, is_used in ((ours, method.learns_generator), (theirs, adapts)) if is_used]
        twice = 2 if full else 1  # the gradients of these weights come together too
        gathered = (max(share.head(mesh) for share in used) + max(share.layer() for share in used)) * twice
        found["weights brought together over fsdp"] = gathered
    found["at work in a layer"] = rows * max(
        ours.at_work(query, query) if method.learns_generator else 0, pairs * theirs.at_work(answered, answered) if adapts else 0
    )
    sampling = dict(found)
    if samples and adapts:
        # Sampling comes first: nothing of the actor is kept as yet.
        for name in ("kept activations of the actor", "LoRA of the rows, and its gradient"):
            sampling.pop(name, None)
        sampling["KV cache of sampling"] = rows * layers * (ours.cache(query + prompt) + ours.cache(query))
        sampling["scores of words"] = rows * ours.words * 3 * 4
        if decode.fastest_layers(True, config.weights) == "unroll":
            sampling["layers one by one"] = generator_layers(setup, mesh)
    return max((found, at_update, sampling), key=lambda parts: sum(parts.values()))


def lora_bytes(setup) -> int:
    """Returns the bytes of one row's LoRA of the actor, float32."""
    hyper = setup.config.hyper
    return setup.actor.num_layers * hyper.rank * MASTER * sum(sum(projection_widths(setup.actor, target)) for target in hyper.targets)


def actor_tokens(setup, lengths) -> int:
    """Returns how many tokens of a row the actor reads in a step: the last of the answer is predicted alone."""
    return len(setup.prefix) + setup.config.generator.max_prompt_tokens + lengths.query + lengths.answer - 1


def answer_memory(setup, lengths, mesh, evaluates: bool) -> dict[str, int]:
    """Returns the bytes a device takes in rollouts or evaluation beside what it holds all through, by part: prompts are written first, then answers."""
    config, method, unrolls = setup.config, setup.method, decode.fastest_layers(weights=setup.config.weights) == "unroll"
    itemsize, parts = setup.dtype.itemsize, sharding.row_parts(mesh)
    copies = 1 if evaluates else config.rollout.num_prompts
    ours, theirs = (Share(model, mesh.tensor, itemsize) for model in (setup.generator, setup.actor))
    state, frozen = _shapes_of(_Key(setup))
    per_device = lambda copies: -(-config.eval.batch_size // (copies * parts)) * copies
    query, prompt, answer = lengths.generator, config.generator.max_prompt_tokens, config.actor.max_answer_tokens
    cast = 0
    if config.generator.train == "full" and method.learns_generator:
        cast = bytes_of({name: state.params[name] for name in state.params if name in ("embed", "shared", "prompt")}, mesh) * itemsize // MASTER
    writing, answering = {}, {}
    if method.prompt != "initial":
        rows = per_device(copies)
        writing["generator in the type of the compute"] = cast
        writing["layers one by one"] = generator_layers(setup, mesh) if unrolls else 0
        writing["KV cache of the prompts"] = rows * setup.generator.num_layers * (ours.cache(query + prompt) + ours.cache(query))
        writing["scores of words"] = rows * ours.words * 3 * 4
        writing["at work in a layer"] = -(-rows // copies) * ours.at_work(query, query)
    rows, read = per_device(1), len(setup.prefix) + prompt + lengths.query
    some = -(-config.eval.batch_size // (4 * parts))
    answering["layers one by one"] = bytes_of(frozen.actor["layers"], mesh) if unrolls and answer > 1 else 0
    answering["KV cache of the answers"] = (rows + 2 * some) * setup.actor.num_layers * theirs.cache(read + answer)
    if method.adapter == "generated":
        answering["LoRA of the rows"] = (rows + some) * lora_bytes(setup) + rows * lora_bytes(setup) * itemsize // MASTER
        if evaluates:
            answering["LoRA of the mean adapter"] = mean_bytes(setup, parts)
    answering["scores of words"] = rows * max(theirs.words * 3 * 4, theirs.scores(lengths.answer))
    answering["at work in a layer"] = max(some * theirs.at_work(read, read), rows * theirs.at_work(read + lengths.answer, read + lengths.answer))
    if mesh.fsdp > 1:
        for found, share in ((writing, ours), (answering, theirs)):
            if found:
                found["weights brought together over fsdp"] = share.head(mesh) + share.layer()
    return max((writing, answering), key=lambda parts: sum(parts.values()))


def generator_layers(setup, mesh) -> int:
    """Returns the bytes of the generator's layers in the type of the compute, on a device: what it takes to have each of them by itself."""
    state, frozen = _shapes_of(_Key(setup))
    if frozen.generator is not None:
        return bytes_of(frozen.generator["layers"], mesh)
    return bytes_of({"shared": state.params["shared"], "prompt": state.params["prompt"]["layers"]}, mesh) * setup.dtype.itemsize // MASTER


def mean_bytes(setup, parts: int) -> int:
    """Returns the bytes a device takes for the LoRA of `eval.num_mean` queries, whose mean delta is found one projection after the other."""
    return -(-setup.config.eval.num_mean // parts) * lora_bytes(setup)


# --- FLOPs ---


def pass_flops(model: ModelConfig, rows: int, read: int, seen: int, scored: int, layers: int | None = None) -> int:
    """Returns the floating-point operations of the products of one forward pass.

    Args:
      read, seen, scored: tokens a row that go through the layers, that each of them attends to, and whose next token is scored.
      layers: how many of the model's; None: all.
    """
    weights = sum(math.prod(projection_widths(model, name)) for name in config_lib.PROJECTIONS)
    a_layer = read * (2 * weights + 4 * seen * model.num_heads * model.head_width)
    return rows * ((model.num_layers if layers is None else layers) * a_layer + scored * 2 * model.vocab_size * model.width)


def step_flops(setup, lengths) -> dict[str, int]:
    """Returns the floating-point operations of the products of a step of all devices together, by part, and their sum.

    Prompts are taken to be as long as they may be; where the terms take turns, both are counted. Weights that do not learn have no product of their own in the backward pass, and what
    the lowest layers read has no gradient, which is not counted off.
    """
    config, method, k = setup.config, setup.method, setup.num_shared
    rows, query, prompt = config.train.batch_size, lengths.generator, config.generator.max_prompt_tokens
    ours, theirs, layers = setup.generator, setup.actor, setup.generator.num_layers
    writes, adapts, full = method.prompt == "written", method.adapter is not None, config.generator.train == "full"
    relaxed = config.train.prompt_gradient == "straight_through"
    attends = lambda model, read, seen, layers: rows * layers * read * 4 * seen * model.num_heads * model.head_width
    scores = lambda model, tokens: rows * tokens * 2 * model.vocab_size * model.width
    again = lambda model, read, seen, layers: {  # what the backward pass makes again of the layers
        "none": 0, "products": attends(model, read, seen, layers), "all": pass_flops(model, rows, read, seen, 0, layers),
    }[config.train.remat]  # fmt: skip
    found: collections.Counter[str] = collections.Counter()
    back = 2 if full else 1
    if method.learns_generator:
        read = layers if writes else k
        forward = pass_flops(ours, rows, query, query, 0, read) + (0 if method.shared else pass_flops(ours, rows, query, query, 0, k))
        attended = attends(ours, query, query, read)
        more = (1 + (relaxed and adapts)) * (prompt - 1)
        if writes:
            forward += pass_flops(ours, rows, more, query + more, 0) + scores(ours, prompt)
            attended += attends(ours, more, query + more, layers)
            found["made again in the backward pass"] += scores(ours, prompt) + again(ours, more, query + more, layers)
        found["generator, forward"] = forward
        found["generator, backward"] = back * (forward - attended) + 2 * attended
        found["made again in the backward pass"] += again(ours, query, query, read)
    if writes and adapts:
        found["sampling"] = pass_flops(ours, rows, prompt - 1, query + prompt, prompt)
        if not relaxed:  # the copy of the prompt decoder reads the queries too
            found["sampling"] += pass_flops(ours, rows, query, query, 0, layers - k)
        else:
            found["straight-through gradient"] = 3 * scores(ours, prompt) + 3 * rows * prompt * 2 * theirs.vocab_size * theirs.width
    if method.adapter == "generated":
        state, _ = _shapes_of(_Key(setup))
        found["hypernetwork, forward and backward"] = 6 * rows * count(state.params["hyper"])
    if adapts:
        pairs, read = 2 if method.preference else 1, actor_tokens(setup, lengths)
        forward = pairs * pass_flops(theirs, rows, read, read, lengths.answer)
        attended = pairs * attends(theirs, read, read, theirs.num_layers)
        found["actor, forward"] = forward * pairs  # preferences have a reference beside the policy
        found["actor, backward"] = forward + attended
        found["made again in the backward pass"] += pairs * (scores(theirs, lengths.answer) + again(theirs, read, read, theirs.num_layers))
        deltas = sum(sum(projection_widths(theirs, target)) for target in config.hyper.targets) * config.hyper.rank * theirs.num_layers
        found["LoRA of the rows, forward and backward"] = pairs * 6 * rows * read * deltas
    return {**found, "all": sum(found.values())}


# --- when it does not fit ---


def changes(setup, mesh):
    """Yields (what to set, setup, mesh): one change each, of those that save memory, what costs least first."""
    config = setup.config

    def with_(**sections):
        changed = {name: dataclasses.replace(getattr(config, name), **leaves) for name, leaves in sections.items()}
        return dataclasses.replace(setup, config=dataclasses.replace(config, **changed))

    rows = sharding.row_parts(mesh)
    for ways in (2**i for i in range(1, 12)):
        if mesh.data % ways == 0:
            more = Mesh(mesh.data // ways, mesh.fsdp * ways, mesh.tensor)
            yield f"mesh.data={more.data} mesh.fsdp={more.fsdp}", setup, more
    if config.train.remat != "all" and setup.method.learns:
        yield "train.remat=all", with_(train={"remat": "all"}), mesh
    parts = 2 * config.train.accumulate
    while setup.method.learns and config.train.batch_size % (parts * rows) == 0:
        yield f"train.accumulate={parts}", with_(train={"accumulate": parts}), mesh
        parts *= 2
    if config.weights != "int8" and not config_lib.merges_actor(config):
        yield "weights=int8", dataclasses.replace(setup, config=dataclasses.replace(config, weights="int8")), mesh
    for section in ("train", "eval"):
        size = getattr(config, section).batch_size // 2
        while size and size % rows == 0:
            yield f"{section}.batch_size={size}", with_(**{section: {"batch_size": size}}), mesh
            size //= 2
    if config.generator.train == "full":
        yield "generator.train=lora", with_(generator={"train": "lora"}), mesh
    for ways in (2, 4, 8):
        for axis in ("data", "fsdp"):
            size = getattr(mesh, axis)
            whole = all(n % (mesh.tensor * ways) == 0 for m in (setup.generator, setup.actor) for n in (m.num_heads, m.num_kv_heads, m.ff_width))
            if size % ways == 0 and whole:
                more = dataclasses.replace(mesh, **{axis: size // ways}, tensor=mesh.tensor * ways)
                yield f"mesh.{axis}={getattr(more, axis)} mesh.tensor={more.tensor}", setup, more


def refuse(setup, lengths, mesh, plan, memory_limit: float) -> str:
    """Returns one line: what does not fit, the part that takes most, and the options with which it does, each tried by planning with it."""
    found = plan["memory"]
    parts = found["phases"][found["largest"]]
    part = max(parts, key=parts.get)
    gib = lambda size: f"{size / GIB:.2f} GiB"
    text = (
        f"the {found['largest']} takes {gib(found['peak'])} of each device's {gib(memory_limit)}; most is taken by the {part} "
        f"({gib(parts[part])}): "
    )
    peak_of = lambda setup, mesh: max(sum(parts.values()) for parts in memory(setup, lengths, mesh).values())
    taken: list[str] = []
    peak = found["peak"]
    while peak > memory_limit:
        tried = [(peak_of(other, there), name, other, there) for name, other, there in changes(setup, mesh)]
        fitting = [one for one in tried if one[0] <= memory_limit]
        # Fewer rows and less to learn come last: they change what is learnt.
        mild = [one for one in tried if not one[1].startswith(("train.batch", "eval.batch", "generator")) and one[0] < 0.95 * peak]
        best = fitting[0] if fitting else min(mild or tried, key=lambda one: one[0], default=None)
        if best is None or best[0] >= peak:
            help = f"{' and '.join(taken)} would bring it to {gib(peak)}, and no option further" if taken else "no option lowers it"
            return text + f"{help}: take more devices (--{'topology' if plan.get('topology') else 'devices'}), devices with more memory or smaller models"
        peak, name, setup, mesh = best
        taken = [*(one for one in taken if one.split("=")[0] not in {new.split("=")[0] for new in name.split()}), *name.split()]
    return text + f"{' '.join(f'--config.{one}' for one in taken)} brings it to {gib(peak)}"


def refuse_compiled(config, mesh, plan, memory_limit: float) -> str | None:
    """Returns one line where the step does not fit by the compiler, though it would by analysis: which settings need less. None where it fits."""
    found = plan["topology"] or {}
    if "RESOURCE_EXHAUSTED" not in plan["collectives"].get("failed", "") and found.get("bytes", 0) <= memory_limit:
        return None
    takes = f"{found['bytes'] / GIB:.2f} GiB" if "bytes" in found else "more than there is"
    help = ", ".join(memory_lib.options(config, "steps", sharding.row_parts(mesh)))
    return f"the step takes {takes} of each device's {memory_limit / GIB:.2f} GiB, by the compiler of {found['name']}: {help}"


def more_of_gpu(plan) -> str:
    """Returns what is added to a refusal where a GPU has the memory, but jax does not take it; else nothing."""
    found, most, rest = plan["topology"], 0.95, 1.0  # GiB that CUDA and its libraries may take beside it
    needs = max(plan["memory"]["peak"], found.get("bytes", 0)) / GIB
    if "RESOURCE_EXHAUSTED" in plan["collectives"].get("failed", "") or needs > most * found["memory"] / found["share"] - rest:
        return ""
    return f"; or set {found['variable']}={most}: jax takes {found['share']:.0%} of a GPU's memory"


# --- the table ---


def table(plan: dict) -> str:
    """Returns a plan as text."""
    mesh, ours, theirs, lengths = plan["mesh"], plan["generator"], plan["actor"], plan["lengths"]
    lines = [
        f"{plan['method']}, {plan['dtype']}{', frozen layers in int8' * (plan['weights'] == 'int8')}, on {plan['devices']} devices: " + ", ".join(f"{name}={size}" for name, size in mesh.items()),
        (
            f"generator: {ours['model']}, {ours['num_layers']} layers of {ours['width']}, {ours['num_shared']} shared, train={ours['train']}; "
            f"actor: {theirs['model']}, {theirs['num_layers']} layers of {theirs['width']}"
        ),
        (
            f"{plan['batch_size']} queries a step, {plan['eval_batch_size']} at once in rollouts and evaluation; remat={plan['remat']}; tokens: "
            f"{lengths['generator']} for the generator, {lengths['prompt']} in a prompt, {lengths['query']} and {lengths['answer']} in query "
            f"and answer" + (f" (from {lengths['from']})" if "from" in lengths else "")
        ),
        "",
        f"{'parameters':<52}{'millions':>12}",
        *(f"  {name:<50}{size / 1e6:>12.2f}" for name, size in plan["parameters"].items()),
    ]  # fmt: skip
    memory = plan["memory"]
    names = list(memory["phases"])
    lines += ["", f"{'memory of a device, GiB, at its most in':<52}" + "".join(f"{name:>12}" for name in names)]
    parts = dict.fromkeys(itertools.chain.from_iterable(memory["phases"].values()))
    for part in parts:
        cells = [memory["phases"][name].get(part) for name in names]
        lines.append(f"  {part:<50}" + "".join(f"{'-' if cell is None else f'{cell / GIB:.3f}':>12}" for cell in cells))
    lines.append(f"  {'all':<50}" + "".join(f"{memory['totals'][name] / GIB:>12.3f}" for name in names))
    if "limit" in memory:
        verdict = "fits" if memory["fits"] else "does not fit"
        topology = plan.get("topology") or {}
        of_gpu = f", the {topology['share']:.0%} of a GPU's that jax takes ({topology['variable']})" if topology.get("share") else ""
        lines.append(f"  the {memory['largest']} takes most; of {memory['limit'] / GIB:.2f} GiB a device{of_gpu}: {verdict}")
    if plan["flops"]:
        lines += ["", f"{'FLOPs of a step, all devices':<52}{'10^12':>12}"]
        lines += [f"  {name:<50}{size / 1e12:>12.3f}" for name, size in plan["flops"].items()]
    return "\n".join([*lines, *_compiled(plan)])


def _compiled(plan) -> list[str]:
    """Returns the lines of what a compiler says of the step."""
    topology, moved = plan.get("topology"), plan.get("collectives", {})
    lines = []
    if topology and "bytes" in topology:
        lines += ["", f"{'memory of a device in the step, by the compiler':<52}{'GiB':>12}"]
        lines += [f"  {name:<50}{topology[key] / GIB:>12.3f}" for name, key in (("arguments", "arguments"), ("temporary", "temporary"), ("all", "bytes"))]
        lines += _work(plan, topology)
    if "failed" in moved:
        lines += ["", f"not compiled: {moved['failed']}"]
    if moved.get("by_kind"):
        lines += ["", f"{'collectives of a step':<52}{'arrays':>12}{'MiB':>12}"]
        lines += [f"  {kind:<50}{sizes['count']:>12}{sizes['bytes'] / 2**20:>12.1f}" for kind, sizes in moved["by_kind"].items()]
    if moved.get("compile_s") is not None:
        what = f"the step, compiled for {topology['name']}" if topology else f"the step with {compiled.FEW} and {compiled.FEW + 1} layers a stack, compiled for {moved['compiled_for']} pretended devices"
        lines.append(f"  read from {what} in {moved['compile_s']} s (all {moved['all_s']} s)")
    return lines


def _work(plan, topology) -> list[str]:
    """Returns the lines of what is estimated of a device's work, in a TPU's cycles and in milliseconds where the clock is known."""
    ghz, cycles = topology["ghz"], topology.get("cycles")
    ms = {part: 1e3 * seconds for part, seconds in topology["seconds"].items()} if "seconds" in topology else {}
    if cycles:
        ms = {part: count / ghz / 1e6 for part, count in cycles.items()} if ghz else {}
    columns = [("10^6", "cycles", {part: count / 1e6 for part, count in cycles.items()})] if cycles else []
    columns += [("", "ms", ms)] if ms else []
    by, whose = ("the estimate of the", "compiler of a") if cycles else ("the roofline of an", "")
    heads = (f"work of a device in the step, by {by}", f"{whose} {topology['kind']}".strip())
    lines = ["", *(f"{head:<52}{''.join(f'{names[i]:>12}' for names in columns)}".rstrip() for i, head in enumerate(heads))]
    for part in (*columns[0][2], "all"):
        lines.append(f"  {part:<50}" + "".join(f"{of[part] if part in of else sum(of.values()):>12.1f}" for _, _, of in columns))
    if plan["method"] == "metatuner_i":
        lines.append("  of the task term, in whose turn the prompt term rests")
    elif ms:
        rate = plan["flops"]["all"] / plan["devices"] / sum(ms.values()) / 1e9
        lines.append(f"  {rate:.0f} TFLOP/s, were nothing waited for that is sent or fetched")
    return lines
