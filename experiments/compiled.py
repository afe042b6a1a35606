"""The step as it is compiled for a mesh whose devices need not be there: what these send each other and, for TPUs and GPUs, memory and work."""

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

from experiments import roofline
from experiments import topology as topology_lib
from metatuner_jax import config as config_lib
from metatuner_jax import data, generator, networks, product, sharding, train

FEW = 2  # layers of each stack with which collectives are counted; once more with one more in each
OF_TOPOLOGY = ("arguments", "temporary", "bytes", "cycles", "seconds")  # what is known of a step besides, where it is compiled for one
SCATTERS = "all-reduce-scatter"  # how a TPU's compiler calls what is summed, and of which each device keeps a part
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LOWERED_FOR = {"gpu": "cuda", "tpu": "tpu"}  # as jax calls the platform of a topology where it lowers for it


def look_up(topology: str) -> dict:
    """Returns {"devices", "kind"} of a topology of TPUs or GPUs, such as "v5e:4x4" or "h100:8", none of which need be there.

    Raises:
      RuntimeError: there is none of that name, or no compiler for it.
    """
    return child([topology])[0]


def of_step(setup, lengths, mesh, topology: str | None = None) -> dict:
    """Returns what a compiler says of a step: {"by_kind": {kind: {"count", "bytes"}}, "compile_s", ...}, what the devices send each other.

    A count is of arrays, however many of them the compiler sends together; bytes are what each device has of them after it. Prompts are
    taken to be as long as they may be. It is compiled in a process of its own, for as many pretended CPU devices, or for a topology. For CPUs that is
    done with few layers, and again with one more in each of the stacks (the shared, the private, the actor's): what grows with each of them is
    scaled to the real depths, as a step is linear in them. CPUs move bfloat16 as float32 and do not scatter what they reduce: bytes are those
    of the type that it is computed in.

    Args:
      topology: of as many TPUs or GPUs as the mesh has devices. With it there are also "arguments", "temporary" and "bytes", those of a
        device's memory, and an estimate of its work by part: "cycles" of a TPU (see `read_cycles`), "seconds" of a GPU (see `roofline`).

    Raises:
      RuntimeError: it cannot be compiled.
    """
    if not setup.method.learns or (mesh.size == 1 and not topology):
        return {"by_kind": {}, "compile_s": None}
    began = time.perf_counter()
    true = (setup.num_shared, setup.generator.num_layers - setup.num_shared, setup.actor.num_layers)
    if topology:
        (found,) = in_child([(setup, lengths, mesh)], topology)
        depths = true
    else:
        depths = (FEW, FEW, FEW)
        tried = [depths, *(tuple(depth + (i == j) for j, depth in enumerate(depths)) for i in range(3))]
        first, *more = in_child([(with_depths(setup, *few), lengths, mesh) for few in tried])
        scaled = lambda base, *more: int(base + sum((depth - FEW) * (one - base) for depth, one in zip(true, more)))
        found = {name: first[name] for name in ("compile_s", "lower_s")}
        found["by_kind"] = jax.tree.map(scaled, first["by_kind"], *(one["by_kind"] for one in more))
    return {
        **found, "by_kind": {kind: sizes for kind, sizes in found["by_kind"].items() if sizes["count"]}, "compiled_for": mesh.size,
        "depths": list(depths), **{name: round(found[name], 1) for name in ("compile_s", "lower_s")}, "all_s": round(time.perf_counter() - began, 1),
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


def in_child(jobs, topology: str | None = None) -> list[dict]:
    """Returns what `compile_step` finds of each (setup, lengths, mesh), in a process with as many pretended devices as the largest mesh, or for a topology."""
    devices = 1 if topology else max(mesh.size for _, _, mesh in jobs)
    return child([{**as_json(*job), "topology": topology} for job in jobs], devices)


def child(jobs, devices: int = 1) -> list[dict]:
    """Returns what `main` says of jobs, in a process of its own with so many pretended CPU devices.

    Raises:
      RuntimeError: what is wrong, in one line.
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = flags if devices > 1 else f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # a topology is compiled for as a run there would be
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a program out of it says nothing of its collectives
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compiled"], input=json.dumps(jobs).encode(), check=False, capture_output=True, env=environment,
        cwd=pathlib.Path(__file__).parent.parent,
    )  # fmt: skip
    if done.returncode:
        found = f"the compiler's process died: {done.stderr.decode(errors='replace').strip()[-300:]}"
    else:
        found = json.loads(done.stdout.decode().strip().splitlines()[-1])
    if isinstance(found, str):
        raise RuntimeError(" ".join(found.split())[:400])
    return found


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


def compile_step(setup, lengths, mesh: config_lib.MeshConfig, topology: str | None = None) -> dict:
    """Returns what the compiler says of a step: its collectives, the bytes of its memory, the work of a TPU or GPU, and the seconds that it took.

    The mesh is of devices that are there, pretended or not, or of those of a topology. The step is that of the joint phase, and of its first
    turn where turns are taken.
    """
    assert mesh.data is not None  # it is that of a mesh, not of a config
    devices, platform = (topology_lib.devices(topology), topology_lib.platform(topology)) if topology else (jax.devices(), None)
    real = sharding.make_mesh(mesh, devices[: mesh.data * mesh.fsdp * mesh.tensor])
    began = time.perf_counter()
    lowered = lower_step(setup, lengths, real, platform)
    traced = time.perf_counter()
    program = lowered.compile()
    took, text = time.perf_counter() - traced, program.as_text()
    lines = run_lines(text, setup)
    work: dict[str, dict] = {}
    if topology:
        work = {"cycles": read_cycles(lines)} if platform == "tpu" else {"seconds": roofline.seconds(text, lines, topology_lib.gpu(topology))}
    return {"by_kind": read_collectives(lines, setup), **memory_of(program), **work, "lower_s": traced - began, "compile_s": took}


def memory_of(program) -> dict[str, int]:
    """Returns the bytes of a device that a compiled program takes: "arguments", "temporary", and "bytes" in all."""
    sizes = program.memory_analysis()
    ends = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {"arguments": sizes.argument_size_in_bytes, "temporary": sizes.temp_size_in_bytes, "bytes": ends + sizes.temp_size_in_bytes}


def lower_step(setup, lengths, mesh, platform: str | None = None):
    """Returns the step of the joint phase for shapes on a mesh, as it is given to the compiler; `platform`: that of a topology, if it is of one."""
    state, frozen = sharding.shapes_at(networks.shapes(setup), mesh)
    batch = sharding.shapes_at(batch_shapes(setup, lengths), mesh, lambda *_: PartitionSpec(sharding.ROWS))
    key = sharding.shapes_at(jax.eval_shape(lambda: jax.random.key(0)), mesh, lambda *_: PartitionSpec())
    phase = train.phases(setup)[-1]
    loss, parts = phase.turns[0]
    with train.uncollected(), product.written_for(platform or product.platform()):
        step = train.make_train_step(loss, setup.config.train, phase, parts)
        return step.trace(state, frozen, batch, key).lower(lowering_platforms=(LOWERED_FOR[platform],) if platform else None)


@dataclasses.dataclass(frozen=True)
class Line:
    """An instruction of a compiled program."""

    text: str
    computation: str  # that it stands in
    times: int  # how often it is run
    sampling: bool  # in the loop that samples prompts
    fused: bool  # in an instruction that stands for several, with a line of its own


def run_lines(text: str, setup) -> list[Line]:
    """Returns the instructions that a compiled program runs; what is in a loop runs as often as the loop is gone through."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            name = "ENTRY" if line.startswith("ENTRY") else head[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    found: list[Line] = []

    def walk(name, times, sampling, fused):
        for line in bodies[name]:
            found.append(Line(line, name, times, sampling, fused))
            loop = re.search(r"\bwhile\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)", line)
            if loop:
                turns = _turns(line, bodies[loop[1]])
                # No other loop of a step has a number of turns that is not known: sampling ends with the prompts.
                often = times * (max(setup.config.generator.max_prompt_tokens - 1, 1) if turns is None else turns)
                for part in loop.groups() if turns is None else (loop[2],):  # what is only counted is not asked for on a device
                    walk(part, often, sampling or turns is None, fused)
            for called in re.findall(r"(?: call\(.*to_apply|true_computation|false_computation)=%?([\w.-]+)", line):
                walk(called, times, sampling, fused)
            for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                for called in group.split(","):
                    walk(called.strip().lstrip("%"), times, sampling, fused)
            for called in re.findall(r"\bcalls=%?([\w.-]+)", line):
                if not called.startswith(SCATTERS):
                    walk(called, times, sampling, True)

    walk("ENTRY", 1, False, False)
    return found


def _turns(line, condition) -> int | None:
    """Returns how often a loop is gone through, None where that depends on what it computes: as the compiler notes it, or by what is counted up to."""
    noted = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
    if noted:
        return int(noted[1])
    counts = [re.search(r"= [su]32\[\]\S* constant\((\d+)\)", one) for one in condition]
    compares = any(" compare(" in one and "direction=LT" in one for one in condition)
    number = next((int(count[1]) for count in counts if count), None)
    return number if compares and not any("reduce" in one for one in condition) else None


def read_collectives(lines: list[Line], setup) -> dict:
    """Returns {kind: {"count", "bytes"}} of what a compiled program runs."""
    own = re.compile(r"jit\(_layer\)|vd->|->vd|/gather|scatter-add")  # what is computed in the type of the compute
    found = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for line in lines:
        text = re.sub(rf" fusion\((.*calls=%?{SCATTERS})", r" reduce-scatter(\1", line.text)
        moved = re.search(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(", text)
        # What a TPU sends beside several pieces of work stands in each of them: the first is marked by -1.
        again = "async_collective_fusion_config" in line.text and '"flag_start":"-1"' not in line.text
        if moved and not again:
            arrays = re.findall(r"\b([a-z]+)(\d+)\w*\[([\d,]*)\]", moved[1])
            arrays = arrays[len(arrays) // 2 :] if moved[3] and moved[2] != "all-reduce" else arrays
            op = re.search(r'op_name="([^"]*)"', line.text)
            narrow = setup.dtype.itemsize if op and own.search(op[1]) else 4
            for kind, bits, dims in arrays:
                size = min(int(bits) // 8, narrow) if kind in ("f", "bf") else max(int(bits) // 8, 1)
                found[moved[2]]["count"] += line.times
                found[moved[2]]["bytes"] += line.times * size * math.prod(int(n) for n in dims.split(",") if n)
    return found


def read_cycles(lines: list[Line]) -> dict[str, int]:
    """Returns a TPU's cycles for what a compiled program runs, by part, as its compiler estimates them.

    What is sent between devices or fetched ahead, beside the work, is not in them.
    """
    found = dict.fromkeys(roofline.PARTS, 0)
    for line in lines:
        cycles = None if line.fused else re.search(r'"estimated_cycles":"(\d+)"', line.text)
        if cycles:
            found[roofline.part_of(line.text, line.sampling)] += line.times * int(cycles[1])
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


def main(jobs) -> list[dict] | str:
    """Returns what `compile_step` finds of steps as JSON holds them, and what `look_up` does of names of topologies; or what is wrong."""
    found = []
    try:
        for job in jobs:
            if isinstance(job, str):
                devices = topology_lib.devices(job)
                found.append({"devices": len(devices), "kind": devices[0].device_kind})
            else:
                setup, lengths, mesh = from_json(job)
                found.append(compile_step(setup, lengths, mesh, job["topology"]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
