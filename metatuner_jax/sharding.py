"""The mesh, and where each array stands on it: a short list of path patterns."""

import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from metatuner_jax.config import MeshConfig

ROWS = ("data", "fsdp")  # the mesh axes that split a batch
WEIGHTS = ("tensor", "fsdp")  # those that split weights

# First match wins. A path is the keys from the root, joined by slashes; a spec names the mesh axis of each array axis. An axis that
# the mesh does not divide evenly is left whole; one that two mesh axes do not, to the next rule.
RULES: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = (
    (r"hyper/.*(layer_embedding|projection_embedding|trunk_in|trunk_mid|shift|gain)$", ()),
    (r"embedding$|head/kernel$", (WEIGHTS, None)),
    (r"embedding$|head/kernel$", ("tensor", "fsdp")),
    (r"(^|/)(q|k|v|gate|up)/kernel$", (None, None, WEIGHTS)),
    (r"(^|/)(q|k|v|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"(^|/)(o|down)/kernel$", (None, WEIGHTS, None)),
    (r"(^|/)(o|down)/kernel$", (None, "tensor", "fsdp")),
    (r"(^|/)(q|k|v)/bias$", (None, "tensor")),
    (r"(^|/)(q|k|v|gate|up)/scale$", (None, "tensor")),
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
    shape, names, types = (data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    except NotImplementedError:  # of some TPUs, jax splits a side of their torus only where it is told to
        return jax.sharding.Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), names, axis_types=types)


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
            divides = [size % ways(a, mesh) == 0 for a, size in zip(axes, shape)]
            if all(ok or not isinstance(a, tuple) for a, ok in zip(axes, divides)):
                return PartitionSpec(*(a if ok else None for a, ok in zip(axes, divides)))
    raise ValueError(f"no sharding rule names the parameter {path!r} of shape {shape}: add one to sharding.RULES")


def ways(axes: str | tuple[str, ...] | None, mesh) -> int:
    """Returns into how many parts an array's axis is split by one or several mesh axes, or by none."""
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))


def place(tree, mesh):
    """Returns the tree with every leaf where its rule puts it."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: place_one(path_text(path), leaf, mesh), tree)


def placed_in_jit(tree):
    """Returns what is computed for each leaf of a tree, such as its gradient, where the leaf's rule puts it; as it is where jit was given no mesh.

    A compiler that is free to choose may have the update of a weight done elsewhere than where weight and moments are, and send these there and back.
    """

    def one(path, leaf):
        mesh = _mesh_of(leaf)
        return leaf if mesh is None else _constrain(leaf, mesh, *spec_at(path_text(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


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
    return ways(ROWS, mesh)


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

    Rows that come from a table that is split are of no device. Without this, the compiler may keep them so, and have each device work on all
    rows of its `fsdp` group, with a part of each layer's weights, where its own rows with the layer's weights brought together are less to send.
    """
    mesh = _mesh_of_rows(x)
    return x if mesh is None else _constrain(x, mesh, ROWS)


def rows_together(x):
    """Returns rows [b, ...] of which each device has those of its whole `fsdp` group: what several kernels multiply in place, sent round once."""
    mesh = _mesh_of_rows(x)
    return x if mesh is None else _constrain(x, mesh, "data")


def multiplied(multiply, x, kernel, path: str, together=None):
    """Returns multiply(x, kernel), the product of rows [b, t, i] with a kernel [i, o], for which what is less is sent round: rows or kernel.

    With the kernel in place, each device multiplies the tokens of all rows of its `fsdp` group with its own part of the kernel, and is given its
    own rows of what all devices made: so it is for each token that is sampled. With many tokens the kernel is brought together. Of its gradient,
    each device is given the sum of its own part alone.

    Args:
      path: that which the kernel's rule goes by.
      together: what `rows_together` makes of x, where it has been called.

    Source: Pope et al. 2022 (arXiv 2211.05102), section 3.2, weight-stationary and weight-gathered layouts.
    """
    mesh = _mesh_of_rows(x)
    if mesh is None or mesh.shape["fsdp"] == 1:
        return multiply(x, kernel)
    into, out = spec_at(path, kernel.shape, mesh)
    if kernel.dtype != np.int8:  # which has none
        kernel = _with_gradient_at(kernel, NamedSharding(mesh, PartitionSpec(into, out)))
    by_rows = lambda x, axes: _constrain(x, mesh, ROWS, None, "tensor" if "tensor" in (axes or ()) else None)
    # Of a token, each device is sent all numbers along an axis that is whole, and of one that is split its own part.
    tokens = x.shape[0] * x.shape[1] // mesh.shape["data"]
    sent = tokens * sum(size // ways(axes, mesh) for size, axes in zip(kernel.shape, (into, out)))
    if sent >= kernel.size // mesh.shape["tensor"] or not any("fsdp" in (axes or ()) for axes in (into, out)):
        return by_rows(multiply(by_rows(x, into), kernel), out)
    x = by_rows(x, into) if together is None or into else together
    return by_rows(_constrain(multiply(_constrain(x, mesh, "data", None, into), kernel), mesh, "data", None, out), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_gradient_at(x, where):
    """Returns x, whose gradient is placed as said. Were x placed so itself, a scan would keep a copy of what it then is for its backward pass."""
    return x


_with_gradient_at.defvjp(lambda x, where: (x, None), lambda where, _, gradient: (jax.lax.with_sharding_constraint(gradient, where),))


def with_features_in_place(make, x, features: int, into: str | None = None):
    """Returns make(x), [l, b, features], of which each device makes its features for all rows of its `fsdp` group, and is given its own rows.

    The hypernetwork's weights, which are far more than the LoRA of a device's rows, and their gradients are not brought together so.

    Args:
      x: [..., b, d].
      into: the mesh axis that splits the first weights by their inputs d.
    """
    mesh = _mesh_of_rows(x, -2)
    if mesh is None or mesh.shape["fsdp"] == 1 or features % mesh.shape["fsdp"]:
        return make(x)
    made = make(_constrain(x, mesh, *(None,) * (x.ndim - 2), "data", None if x.shape[-1] % ways(into, mesh) else into))
    return _constrain(_constrain(made, mesh, None, "data", "fsdp"), mesh, None, ROWS)


def looked_up(table, tokens):
    """Returns the rows [b, t, d] of a table [v, d] for tokens [b, t], each on the device of its row.

    Of a table that is split by words, each device finds some of the rows of its whole `fsdp` group, all of which are summed. Of many tokens that is
    more than the table, which then is split by width before it is looked up in.
    """
    mesh = _mesh_of_rows(tokens)
    if mesh is None:
        return table[tokens]
    words, width = table.shape
    if tokens.size // mesh.shape["data"] >= words // ways(WEIGHTS, mesh) and width % mesh.shape["fsdp"] == 0 and words % mesh.shape["tensor"] == 0:
        table = _constrain(table, mesh, "tensor", "fsdp")
    return split_rows(table[tokens])


def for_words(x, words: int):
    """Returns states [b, t, d] as a head [v, d] multiplies them that is split by words: those of all rows of the `fsdp` group."""
    mesh = _mesh_of_words(x, words)
    return x if mesh is None else _constrain(x, mesh, "data")


def split_words(scores):
    """Returns scores [b, t, v], or their gradient, split by words as the head is, so that neither it nor its gradient is brought together.

    Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3, the parallel cross-entropy.
    """
    mesh = _mesh_of_words(scores, scores.shape[-1])
    return scores if mesh is None else _constrain(scores, mesh, "data", None, WEIGHTS)


def divides_words(words: int, mesh) -> bool:
    """Returns whether embedding and head are split by words alone: otherwise by width (see RULES), and the head is brought together."""
    return words % ways(WEIGHTS, mesh) == 0


def _mesh_of_words(x, words):
    mesh = _mesh_of_rows(x)
    return mesh if mesh is not None and divides_words(words, mesh) else None


def _mesh_of_rows(x, axis: int = 0):
    """Returns the mesh that jit was given an array on, None where none is or where it does not split the array's rows, along an axis, evenly."""
    mesh = _mesh_of(x)
    return mesh if mesh is not None and row_parts(mesh) > 1 and x.shape[axis] % row_parts(mesh) == 0 else None


def _mesh_of(x):
    """Returns the mesh that jit was given an array on, None where none is."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if set(ROWS) <= set(mesh.axis_names) else None


def _constrain(x, mesh, *spec):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def path_text(path) -> str:
    """Returns a tree path as text: its keys, joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
