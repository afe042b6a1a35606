"""Low-rank deltas of projections, applied beside the frozen weights and never formed as dense matrices."""

import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float

from metatuner_jax import product


@flax.struct.dataclass
class Lora:
    """Delta of one projection, `a @ b`, already scaled. Without the axis `b`, the same for every row."""

    a: Any  # [*l, *b, i, r]
    b: Any  # [*l, *b, r, o]


def delta(x: Float[Array, "b t i"], lora: Lora) -> Float[Array, "b t o"]:
    """Returns what `lora`, of one layer, adds to the projection of `x`, without forming the [b, i, o] matrix."""
    a, b = lora.a.astype(x.dtype), lora.b.astype(x.dtype)
    if a.ndim == 2:
        return product.einsum("btr,ro->bto", product.einsum("bti,ir->btr", x, a), b)
    return product.einsum("btr,bro->bto", product.einsum("bti,bir->btr", x, a), b)


def merge(layers: dict, loras: dict[str, Lora]) -> dict:
    """Returns stacked layers with the deltas of one row (leaves [l, i, r] and [l, r, o]) added to their kernels.

    The sum is made in float32 and cast back to the kernels' type.
    """
    merged = dict(layers)
    for target, lora in loras.items():
        kernel = layers[target]["kernel"]
        dense = jnp.einsum("lir,lro->lio", lora.a.astype(jnp.float32), lora.b.astype(jnp.float32))
        merged[target] = {**layers[target], "kernel": (kernel.astype(jnp.float32) + dense).astype(kernel.dtype)}
    return merged


def row(loras: dict[str, Lora], index: int) -> dict[str, Lora]:
    """Returns one row's LoRA out of a batch of them ([l, b, ...] leaves), for all rows ([l, ...] leaves)."""
    return jax.tree.map(lambda leaf: leaf[:, index], loras)


def repeat(loras: dict[str, Lora], count: int) -> dict[str, Lora]:
    """Returns one row's LoRA ([l, ...] leaves) for each of `count` rows ([l, b, ...] leaves)."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], count, axis=1), loras)


def save(path: pathlib.Path, loras: dict[str, Lora], **about: str) -> None:
    """Writes a LoRA of all rows ([l, ...] leaves) as safetensors, float32, with what is said about it; the file is whole at any moment."""
    arrays = {f"{target}.{name}": np.asarray(getattr(lora, name), np.float32) for target, lora in loras.items() for name in ("a", "b")}
    beside = path.with_name(path.name + ".new")
    safetensors.numpy.save_file(arrays, beside, metadata=about)
    beside.replace(path)


def load(path: pathlib.Path) -> tuple[dict[str, Lora], dict[str, str]]:
    """Returns what `save` wrote: the LoRA, numpy, and what is said about it."""
    with safetensors.safe_open(path, "numpy") as file:
        targets = dict.fromkeys(name.split(".")[0] for name in file.offset_keys())
        loras = {target: Lora(file.get_tensor(f"{target}.a"), file.get_tensor(f"{target}.b")) for target in targets}
        return loras, file.metadata()


def gram(loras: dict[str, Lora]) -> Float[Array, "b b"]:
    """Returns the inner products of all rows' deltas, summed over layers and projections; the squared norms stand on the diagonal."""

    def one(lora):
        products_a = jnp.einsum("lbir,lcis->lbcrs", lora.a, lora.a)
        products_b = jnp.einsum("lbro,lcso->lbcrs", lora.b, lora.b)
        return jnp.einsum("lbcrs,lbcrs->bc", products_a, products_b)

    return sum(one(lora) for lora in loras.values())


def norm(loras: dict[str, Lora]) -> Float[Array, ""]:
    """Returns the norm of one delta for all rows, over all layers and projections."""
    return jnp.sqrt(gram(jax.tree.map(lambda leaf: leaf[:, None], loras))[0, 0])


def norms(loras: dict[str, Lora]) -> dict[str, Any]:
    """Returns the norm of each delta alone, `[*l, *b]` by projection, from the inner products of its factors' columns and rows."""

    def one(lora):
        products_a = jnp.einsum("...ir,...is->...rs", lora.a, lora.a)
        products_b = jnp.einsum("...ro,...so->...rs", lora.b, lora.b)
        return jnp.sqrt(jnp.maximum(jnp.einsum("...rs,...rs->...", products_a, products_b), 0))

    return {target: one(lora) for target, lora in loras.items()}


def effective_rank(gram: Float[Array, "b b"]) -> Float[Array, ""]:
    """Returns how many directions the rows' deltas span: e to the entropy of the shares of the Gram matrix's eigenvalues.

    1 where all are multiples of one delta, b where they are orthogonal and of one size; 0 where all are zero.

    Source: Roy and Vetterli 2007, The effective rank, definition 1, of squared singular values.
    """
    values = jnp.maximum(jnp.linalg.eigvalsh(gram), 0.0)
    total = jnp.sum(values)
    shares = values / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)))
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)


def mean(loras: list[dict[str, Lora]], rank: int) -> tuple[dict[str, Lora], float]:
    """Returns the mean delta over all rows of several batches, cut back to `rank`, and the share of its energy kept.

    The mean of n products a_n @ b_n is one product of the stacked factors, of rank n r. Its singular values come
    from QR decompositions of the two stacks, so that no [i, o] matrix is formed. Energy is the squared Frobenius norm,
    summed over layers and projections.

    Args:
      loras: batches of per-row LoRA, leaves [l, b, i, r] and [l, b, r, o], numpy or jax.
    """
    kept, total, cut = 0.0, 0.0, {}
    for target in loras[0]:
        a = jnp.concatenate([jnp.asarray(batch[target].a, jnp.float32) for batch in loras], axis=1)
        b = jnp.concatenate([jnp.asarray(batch[target].b, jnp.float32) for batch in loras], axis=1)
        layers, rows, width_in, r = a.shape
        left = jnp.moveaxis(a, 1, 2).reshape(layers, width_in, rows * r) / rows
        right = b.reshape(layers, rows * r, b.shape[-1])
        q_left, r_left = jnp.linalg.qr(left)
        q_right, r_right = jnp.linalg.qr(jnp.swapaxes(right, 1, 2))
        u, s, vt = jnp.linalg.svd(r_left @ jnp.swapaxes(r_right, 1, 2), full_matrices=False)
        u, s, vt, rest = u[..., :rank], s[..., :rank], vt[:, :rank], s
        cut[target] = Lora((q_left @ u) * s[:, None], vt @ jnp.swapaxes(q_right, 1, 2))
        kept, total = kept + float(jnp.sum(s**2)), total + float(jnp.sum(rest**2))
    return cut, kept / total if total else 1.0
