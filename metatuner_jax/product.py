"""Products of two arrays, summed in float32 whatever their type, forward and backward, and what the compiler is told for their sake.

An einsum of bfloat16 arrays that yields bfloat16 is left by some versions of jax's CPU backend to a path that converts both to float32
first; one that yields float32 is multiplied natively. An accelerator sums in float32 in either case. The backward pass is written out
for the same reason: autodiff's would multiply a float32 gradient with a bfloat16 array.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_written_for: list[str] = []


def platform() -> str:
    """Returns the platform that programs are written for, "cpu", "gpu" or "tpu": that of the devices that are there, or what `written_for` says."""
    return _written_for[-1] if _written_for else jax.default_backend()


@contextlib.contextmanager
def written_for(platform: str):
    """Has programs that are traced within it written for a platform that need not be there. jax keeps what it has traced before: see `jax.clear_caches`."""
    _written_for.append(platform)
    try:
        yield
    finally:
        _written_for.pop()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, x, y, dtype=None):
    """Returns jnp.einsum(spec, x, y) as `dtype`, by default that of x.

    The gradients are products of the incoming gradient, rounded to the type of x, with the other array.

    Args:
      spec: such as "bti,io->bto"; each index stands in two of its three terms at least.
      y: int8 too, which becomes of the type of x here, so that the backward pass keeps its 8 bits; it has no gradient then.
    """
    dtype = dtype or x.dtype
    y = y.astype(x.dtype) if y.dtype == jnp.int8 else y
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32 if platform() == "cpu" else dtype).astype(dtype)


def pack(x):
    """Returns bfloat16 numbers as their bits where they are to stand in a buffer that a loop reads and writes, all else as it is.

    Some versions of XLA's CPU backend write and read slices of bfloat16 by way of float32; integers they move as they are.
    """
    packs = x.dtype == jnp.bfloat16 and platform() == "cpu"
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if packs else x


def unpack(x):
    """Returns what was given to `pack`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _named(x, name):
    return unpack(checkpoint_name(pack(x), name))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def named(x, name: str):
    """Returns x, which a policy of `jax.checkpoint` may keep by its name, packed."""
    return _named(x, name)


@named.defjvp
def _named_jvp(name, primals, tangents):
    return _named(primals[0], name), tangents[0]  # not `named`: a policy does not see the names inside a function with its own rule


def _forward(spec, x, y, dtype):
    return einsum(spec, x, y, dtype), (x, y)


def _backward(spec, dtype, kept, gradient):
    (x, y), (terms, out) = kept, spec.split("->")
    of_x, of_y = terms.split(",")
    gradient = gradient.astype(x.dtype)
    for_x = einsum(f"{out},{of_y}->{of_x}", gradient, y, x.dtype)
    return for_x, None if y.dtype == jnp.int8 else einsum(f"{of_x},{out}->{of_y}", x, gradient, y.dtype)


einsum.defvjp(_forward, _backward)


def fastest_dtype(cpuinfo="/proc/cpuinfo") -> str:
    """Returns the type in which this machine's devices multiply fastest: "bfloat16", or "float32" on a CPU without instructions for it."""
    if platform() != "cpu":
        return "bfloat16"
    try:
        with open(cpuinfo, encoding="utf-8") as file:
            flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        flags = set()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


# Of a product with weights that several devices hold, TPUs' compiler would multiply one device's part after the other while the next is on its way,
# and round the sum to bfloat16 each time: by its own estimate, twice the work of a step. With these it brings the weights together beside the work
# that comes before, and makes one product. MaxText's recipes for training set the same.
TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def compiler_options() -> dict[str, str]:
    """Returns the `compiler_options` with which programs that scan over layers are jitted.

    On a CPU, nothing is hoisted out of the scan. Some versions of XLA's CPU backend slice bfloat16 as float32: hoisted, that is a float32 copy of
    all layers' weights, made in every call: with jax 0.10, 2.7 times the temporary memory of a step, and a tenth more time. On TPUs, see
    `TPU_OPTIONS`, of which those are taken that the compiler there knows.
    """
    if platform() == "cpu":
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    if platform() == "tpu":
        return TPU_OPTIONS if _written_for else known(tuple(TPU_OPTIONS.items()))
    return {}


@functools.cache
def known(options: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Returns those options that the compiler of jax's devices knows: from one version to another it may drop some."""

    def knows(name, value):
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options if knows(name, value)}
