"""Frozen weights in 8 bits: a projection's kernel as whole numbers from -127 to 127, with a scale for each of its outputs. Imports no jax.

Of numpy's arrays these functions make numpy's, of jax's jax's.
"""

TINY = 1e-37  # smaller scales, whose inverse is not finite, are those of outputs that are zero


def quantise(kernel):
    """Returns (whole numbers, int8, as shaped as the kernel; scales, float32 `[*l, o]`), whose product is the kernel to half a scale.

    Args:
      kernel: `[*l, i, o]`, finite.
    """
    kernel = kernel.astype("float32")
    scale = abs(kernel).max(axis=-2) / 127
    scale = scale + (scale < TINY)
    return (kernel / scale[..., None, :]).round().astype("int8"), scale


def quantise_layers(layers: dict) -> dict:
    """Returns layers with the kernels of their projections as `quantise` makes them, each with its `scale` beside it."""
    return {
        name: {**leaves, **dict(zip(("kernel", "scale"), quantise(leaves["kernel"])))} if "kernel" in leaves else leaves
        for name, leaves in layers.items()
    }  # fmt: skip


def dense(projection: dict):
    """Returns the kernel `[*l, i, o]` of a projection, in 8 bits or not, as float32."""
    kernel = projection["kernel"].astype("float32")
    return kernel * projection["scale"][..., None, :] if "scale" in projection else kernel
