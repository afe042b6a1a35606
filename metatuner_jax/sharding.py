"""The mesh, and where each array stands on it: a short list of path patterns."""

import functools
import math
import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from metatuner_jax.config import MeshConfig

ROWS = ("data", "fsdp")  # the mesh axes that split a batch

# First match wins. A path is the keys from the root, joined by slashes; a spec names the mesh axis of each array axis. An axis that
# the mesh does not divide evenly is left whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"hyper/.*(layer_embedding|projection_embedding|trunk_in|trunk_mid|shift|gain)$", ()),
    (r"embedding$|head/kernel$", ("tensor", "fsdp")),
    (r"(^|/)(q|k|v|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"(^|/)(o|down)/kernel$", (None, "tensor", "fsdp")),
    (r"(^|/)(q|k|v)/bias$", (None, "tensor")),
    (r"(^|/)(q|k|v|gate|up)/scale$", (None, "tensor")),
    (r"(^|/)(o|down)/scale$", (None, "fsdp")),
    (r"hyper/.*_down$", (None, "fsdp", None)),
    (r"hyper/.*_up$", (None, None, "fsdp")),
    (r"hyper/.*_bias$", (None, "fsdp")),
    (r"(^|/)(q|k|v|o|gate|up|down)/[ab]$", ()),
    (r"scale$", ()),
    (r"(^|/)(step|count|allowed|bad_steps)$", ()),
)


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """Returns the mesh over all devices, its axes data, fsdp and tensor.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    rest = config.fsdp * config.tensor
    data = config.data or max(count // rest, 1)
    if data * rest != count:
        raise ValueError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor} need {data * rest} devices and there are "
            f"{count}: their product must be the number of devices (mesh.data=none takes what is left)"
        )
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"), axis_types=types, devices=devices)


def spec_at(path: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """Returns the placement of one array.

    Raises:
      ValueError: no rule names the path.
    """
    for pattern, axes in RULES:
        if re.search(pattern, path):
            # Layers may or may not have their leading axis; specs are for the last axes.
            axes = axes[-len(shape) :] if shape else ()
            axes = (None,) * (len(shape) - len(axes)) + axes if axes else ()
            return PartitionSpec(*(a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(axes)))
    raise ValueError(f"no sharding rule names the parameter {path!r} of shape {shape}: add one to sharding.RULES")


def place(tree, mesh):
    """Returns the tree with every leaf where its rule puts it."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: place_one(path_text(path), leaf, mesh), tree)


def place_one(path: str, leaf, mesh):
    """Returns one array, of which each device is given its own part, where the rule of its path puts it."""
    return _put(leaf, NamedSharding(mesh, spec_at(path, np.shape(leaf), mesh)))


def shapes_at(tree, mesh, spec_of=spec_at):
    """Returns the shapes and types of a tree, of arrays that need not be there, with their placement: spec_of(path, shape, mesh)."""

    def one(path, leaf):
        where = NamedSharding(mesh, spec_of(path_text(path), leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, tree)


def _put(leaf, where):
    """Returns an array placed: of one that the host has, or that each of several hosts has."""
    if isinstance(leaf, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(leaf, where)  # a CPU takes no notice of device_put in a jitted function
    if getattr(leaf, "is_fully_addressable", True) and not where.is_fully_addressable:  # device_put would compare what the hosts have, all of it
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, where, lambda at: leaf[at])
    return jax.device_put(leaf, where)


def fetch(tree):
    """Returns the tree in numpy, whole, to every process."""
    apart = [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_fully_addressable]
    return jax.tree.map(np.asarray, _to_all(apart[0].sharding.mesh)(tree) if apart else tree)


@functools.cache
def _to_all(mesh):
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def row_parts(mesh) -> int:
    """Returns into how many parts the mesh splits the rows of a batch, which their number must be a multiple of."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def place_rows(batch, mesh, axis: int = 0, heads: bool = False):
    """Returns a batch with its rows, which stand along an axis, split over the mesh; with `heads` also the axis after it, where it can be.

    A number is the same for all rows.
    """

    def where(leaf):
        if np.ndim(leaf) == 0:
            return NamedSharding(mesh, PartitionSpec())
        split = heads and leaf.shape[axis + 1] % mesh.shape["tensor"] == 0
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ROWS, *["tensor"] * split))

    return jax.tree.map(lambda leaf: _put(leaf, where(leaf)), batch)


def split_rows(x):
    """Returns an array whose first axis is rows, split over the mesh that jit was given it on; as it is where there is no mesh.

    Rows come from a table that is split by width. Without this, the compiler keeps them so: each device then works on all rows of its
    `fsdp` group, with a part of each layer's weights, in place of its own rows with the layer's weights brought together.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not set(ROWS) <= set(mesh.axis_names) or row_parts(mesh) == 1 or x.shape[0] % row_parts(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS)))


def path_text(path) -> str:
    """Returns a tree path as text: its keys, joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
