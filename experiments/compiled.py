"""The step as it is compiled for a mesh whose devices need not be there, and what these send each other."""

import collections
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from metatuner_jax import config as config_lib
from metatuner_jax import data, generator, networks, sharding, train

FEW = 2  # layers of each stack with which collectives are counted; once more with one more in each
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(setup, lengths, mesh) -> dict:
    """Returns what the devices send each other in a step: {"by_kind": {kind: {"count", "bytes"}}, "compile_s", ...}.

    The step is compiled for as many pretended CPU devices with few layers, and again with one more layer in each of its stacks (the
    shared, the private, the actor's), in a process of its own. What grows with each of them is scaled to the real depths: a step is
    linear in them. A count is of arrays, however many of them the compiler sends together; bytes are what each device has of them after
    it. Prompts are taken to be as long as they may be. CPUs move bfloat16 as float32 and do not scatter what they reduce: bytes are those
    of the type that it is computed in.
    """
    if mesh.size == 1 or not setup.method.learns:
        return {"by_kind": {}, "compile_s": None}
    shared, private = setup.num_shared, setup.generator.num_layers - setup.num_shared
    depths = (FEW, FEW, FEW)
    tried = [depths, *(tuple(depth + (i == j) for j, depth in enumerate(depths)) for i in range(3))]
    began = time.perf_counter()
    found = in_child([(with_depths(setup, *few), lengths, mesh) for few in tried])
    first, *slopes = found
    true = (shared, private, setup.actor.num_layers)
    total: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        for what in ("count", "bytes"):
            base = first["by_kind"][kind][what]
            steps = [(depth - FEW) * (slope["by_kind"][kind][what] - base) for depth, slope in zip(true, slopes)]
            total.setdefault(kind, {})[what] = int(base + sum(steps))
    return {
        "by_kind": {kind: sizes for kind, sizes in total.items() if sizes["count"]},
        "compiled_for": mesh.size, "depths": list(depths), "compile_s": round(first["compile_s"], 1), "lower_s": round(first["lower_s"], 1),
        "all_s": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def with_depths(setup, shared: int, private: int, actor: int):
    """Returns a setup with so many layers in each stack."""
    config = setup.config
    section = dataclasses.replace(config.generator, num_shared=shared)
    # Of one checkpoint, the frozen weights are passed once: two depths need two names, and move the same.
    config = dataclasses.replace(config, generator=section)
    ours, theirs = (of_depth(model, count) for model, count in ((setup.generator, shared + private), (setup.actor, actor)))
    if config.generator.model == config.actor.model:
        config = dataclasses.replace(config, actor=dataclasses.replace(config.actor, model=config.actor.model + " of another depth"))
    return dataclasses.replace(setup, config=config, generator=ours, actor=theirs)


def of_depth(model, layers: int):
    """Returns a model with so many layers, in turns sliding and not as its own are."""
    turns = model.sliding_layers and tuple(itertools.islice(itertools.cycle(model.sliding_layers), layers))
    return dataclasses.replace(model, num_layers=layers, sliding_layers=turns)


def in_child(jobs) -> list[dict]:
    """Returns what `compile_step` finds of each (setup, lengths, mesh), in a process that has as many devices as the largest mesh."""
    devices = max(mesh.size for _, _, mesh in jobs)
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a program out of it says nothing of its collectives
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compiled"], input=json.dumps([as_json(*job) for job in jobs]).encode(), check=False, capture_output=True, env=environment,
        cwd=pathlib.Path(__file__).parent.parent,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the step could not be compiled: {done.stderr.decode(errors='replace').strip()[-2000:]}")
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def as_json(setup, lengths, mesh) -> dict:
    """Returns a step, and the mesh that it is for, as JSON holds them; `from_json` is the other way."""
    parts = {"config": setup.config, "generator": setup.generator, "actor": setup.actor, "lengths": lengths}
    return {**{name: dataclasses.asdict(part) for name, part in parts.items()}, "end_id": setup.end_id, "prefix": setup.prefix, "mesh": dict(mesh.shape)}


def from_json(found: dict):
    """Returns (setup, lengths, the settings of the mesh)."""

    def model(name):
        return config_lib.ModelConfig(**{field: tuple(value) if isinstance(value, list) else value for field, value in found[name].items()})

    setup = generator.Setup(config_lib.from_tree(found["config"]), model("generator"), model("actor"), found["end_id"], tuple(found["prefix"]))
    return setup, data.Lengths(**found["lengths"]), config_lib.MeshConfig(**found["mesh"])


def compile_step(setup, lengths, mesh: config_lib.MeshConfig) -> dict:
    """Returns what the compiler says of a step: its collectives, the bytes of its memory, and the seconds that it took.

    The mesh is of devices that are there, pretended or not. The step is that of the joint phase, and of its first turn where turns are taken.
    """
    assert mesh.data is not None  # it is that of a mesh, not of a config
    real = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    began = time.perf_counter()
    lowered = lower_step(setup, lengths, real)
    traced = time.perf_counter()
    program = lowered.compile()
    took, sizes = time.perf_counter() - traced, program.memory_analysis()
    ends = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {
        "by_kind": read_collectives(program.as_text(), setup), "arguments": sizes.argument_size_in_bytes, "temporary": sizes.temp_size_in_bytes,
        "bytes": ends + sizes.temp_size_in_bytes, "lower_s": traced - began, "compile_s": took,
    }  # fmt: skip


def lower_step(setup, lengths, mesh):
    """Returns the step of the joint phase for shapes on a real mesh, as it is given to the compiler."""
    state, frozen = sharding.shapes_at(networks.shapes(setup), mesh)
    batch = sharding.shapes_at(batch_shapes(setup, lengths), mesh, lambda *_: PartitionSpec(sharding.ROWS))
    key = sharding.shapes_at(jax.eval_shape(lambda: jax.random.key(0)), mesh, lambda *_: PartitionSpec())
    phase = train.phases(setup)[-1]
    loss, parts = phase.turns[0]
    with train.uncollected():
        return train.make_train_step(loss, setup.config.train, phase, parts).lower(state, frozen, batch, key)


def read_collectives(text: str, setup) -> dict:
    """Returns {kind: {"count", "bytes"}} of a compiled program; what is in a loop counts as often as the loop is gone through."""
    own = re.compile(r"jit\(_layer\)|vd->|->vd|/gather|scatter-add")  # what is computed in the type of the compute
    name = ""
    bodies: dict[str, list] = collections.defaultdict(list)  # [(kind, bytes)] of what a computation moves itself
    calls: dict[str, list] = collections.defaultdict(list)  # [(computation, how often)]
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            name = "ENTRY" if line.startswith("ENTRY") else head[1]
            continue
        loop = re.search(r"\bwhile\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)", line)
        if loop:
            trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
            # No other loop of a step has a number of turns that is not known: sampling ends with the prompts.
            times = int(trips[1]) if trips else max(setup.config.generator.max_prompt_tokens - 1, 1)
            calls[name] += [(loop[2], times), (loop[1], times)]
        for called in re.findall(r"(?:to_apply|true_computation|false_computation)=%?([\w.-]+)", line):
            calls[name].append((called, 1))
        for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
            calls[name] += [(called.strip().lstrip("%"), 1) for called in group.split(",")]
        moved = re.search(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(", line)
        if moved:
            arrays = re.findall(r"\b([a-z]+)(\d+)\w*\[([\d,]*)\]", moved[1])
            arrays = arrays[len(arrays) // 2 :] if moved[3] and moved[2] != "all-reduce" else arrays
            op = re.search(r'op_name="([^"]*)"', line)
            narrow = setup.dtype.itemsize if op and own.search(op[1]) else 4
            for kind, bits, dims in arrays:
                size = min(int(bits) // 8, narrow) if kind in ("f", "bf") else max(int(bits) // 8, 1)
                bodies[name].append((moved[2], size * math.prod(int(n) for n in dims.split(",") if n)))
    found = {kind: {"count": 0, "bytes": 0} for kind in KINDS}

    def walk(name, times):
        for kind, size in bodies[name]:
            found[kind]["count"] += times
            found[kind]["bytes"] += times * size
        for called, turns in calls[name]:
            walk(called, times * turns)

    walk("ENTRY", 1)
    return found



def batch_shapes(setup, lengths):
    """Returns the batch of a step whose rows are as long as they get."""
    config = setup.config
    rows, prompt = config.train.batch_size, config.generator.max_prompt_tokens
    widths = {"generator": lengths.generator, "query": lengths.query, "initial": prompt, "expert": prompt}
    widths |= dict.fromkeys(("chosen", "rejected") if setup.method.preference else ("answer",), lengths.answer)
    shape = jax.ShapeDtypeStruct
    batch = {"own": shape((rows, lengths.generator), bool)}
    for name, width in widths.items():
        batch |= {name: shape((rows, width), jnp.int32), f"{name}_mask": shape((rows, width), bool)}
    return batch


if __name__ == "__main__":
    print(json.dumps([compile_step(*from_json(job)) for job in json.load(sys.stdin)]))
