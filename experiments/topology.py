"""TPUs and GPUs that need not be there: which there are, and what is known of each kind beside its compiler."""

import dataclasses
import re
from typing import Any

from jax.experimental import topologies

# Of a kind of TPU, as its maker states it for a device of jax: GiB of memory, and GHz where it is stated.
TPUS = {"TPU v4": (32, None), "TPU v5 lite": (16, 1.5), "TPU v5": (95, 1.75), "TPU v6 lite": (32, None), "TPU7x": (96, None)}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as its compiler has to know it."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors, each with
    units: int  # units for float32,
    threads: int  # threads at most,
    shared: int  # and KiB of shared memory
    cache: int  # MiB of the second level
    ghz: float
    tflops: float  # of products of bfloat16, as NVIDIA states it, TFLOP/s
    bandwidth: float  # of the memory, TB/s
    memory: float  # GiB, as CUDA says it: a little less than on its box


GPUS = {
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 100, 48, 2.04, 121, 0.3, 22.0),
    "a10g": Gpu("NVIDIA A10G", (8, 6), 80, 128, 1536, 100, 6, 1.71, 70, 0.6, 22.0),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 128, 1536, 100, 96, 2.52, 362, 0.864, 44.3),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164, 40, 1.41, 312, 1.555, 39.4),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164, 40, 1.41, 312, 2.039, 79.2),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50, 1.98, 989, 3.352, 79.1),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 228, 50, 1.98, 989, 4.8, 139.8),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 228, 126, 1.965, 2250, 7.672, 178.3),
}
PREALLOCATED = 0.75  # of a GPU's memory, which jax takes where the environment does not say otherwise
SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the variables that do, the second one of old


def platform(topology: str) -> str:
    """Returns the platform of a topology's devices, "gpu" or "tpu"."""
    return "gpu" if topology.split(":")[0] in GPUS else "tpu"


def gpu(topology: str) -> Gpu:
    """Returns the kind of GPU that a topology is of."""
    return GPUS[topology.split(":")[0]]


def devices(topology: str):
    """Returns the devices of a topology, such as "v5e:4x4", "h100:8" or, of two hosts with eight each, "h100:2x8".

    Raises:
      ValueError: there is none of that name.
      NotImplementedError: there is no compiler for it.
    """
    kind = topology.split(":")[0]
    if platform(topology) == "gpu":
        found = re.fullmatch(r"[\w-]+:(?:([1-9]\d*)x)?([1-9]\d*)", topology)
        if not found:
            raise ValueError(f"of GPUs it is {kind}:8, or {kind}:2x8 of two hosts with eight each")
        shape = f"1x{found[1] or 1}x{found[2]}"
        return topologies.get_topology_desc(platform="cuda", target_config=target(gpu(topology)), topology=shape).devices
    if not re.match("(?i)v[2-9]|tpu", kind):
        near = [name for name in GPUS if kind and (name.startswith(kind.lower()) or kind.lower().startswith(name))]
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"{meant}GPUs are {', '.join(GPUS)}")
    said: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"\w+:1(x1)*", topology) else {}  # fewer than a host has otherwise
    said |= {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}  # both cores of a chip are one device, as jax has them
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **said).devices


def target(kind: Gpu) -> str:
    """Returns a kind of GPU as the text of XLA's message `GpuTargetConfigProto`."""
    major, minor = kind.capability
    return f"""
        gpu_device_info {{
          name: "{kind.name}"
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {kind.cores}
          fpus_per_core: {kind.units}
          clock_rate_ghz: {kind.ghz}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: {kind.threads}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_core: {kind.shared * 1024}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {(kind.shared - 1) * 1024}
          l2_cache_size: {kind.cache * 2**20}
          memory_bandwidth: {round(kind.bandwidth * 1e12)}
          device_memory_size: {round(kind.memory * 2**30)}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 8 }}
        device_description_str: "{kind.name}"
    """
