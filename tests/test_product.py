"""Products in mixed precision: their values, their gradients, and the type that a machine multiplies fastest."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from metatuner_jax import decode, product

SPECS = {
    "bti,io->bto": ((2, 3, 5), (5, 7)),
    "bti,bir->btr": ((2, 3, 5), (2, 5, 4)),
    "btr,ro->bto": ((2, 3, 4), (4, 7)),
    "bmgth,bmsh->bmgts": ((2, 3, 2, 4, 5), (2, 3, 6, 5)),
    "bmgts,bmsh->bmgth": ((2, 3, 2, 4, 6), (2, 3, 6, 5)),
    "btd,vd->btv": ((2, 3, 5), (11, 5)),
}


@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_those_of_einsum(spec):
    rng = np.random.default_rng(0)
    x, y = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in SPECS[spec])
    weights = jnp.array(rng.normal(size=jnp.einsum(spec, x, y).shape), jnp.float32)

    def loss(einsum):
        return jax.value_and_grad(lambda x, y: jnp.sum(weights * jnp.tanh(einsum(spec, x, y))), argnums=(0, 1))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), loss(product.einsum)(x, y), loss(jnp.einsum)(x, y))


def test_bfloat16_is_summed_in_float32_and_rounded_once():
    rng = np.random.default_rng(1)
    x, y, up = (jnp.array(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 3, 400), (400, 7), (2, 3, 7)))
    exact = [np.asarray(leaf, np.float32) for leaf in (x, y, up)]
    found, backward = jax.vjp(lambda x, y: product.einsum("bti,io->bto", x, y), x, y)
    expected = (
        (found, np.einsum("bti,io->bto", *exact[:2])),
        *zip(backward(up), (np.einsum("bto,io->bti", exact[2], exact[1]), np.einsum("bti,bto->io", exact[0], exact[2]))),
    )
    for ours, true in expected:
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), true, rtol=2**-8, atol=1e-5)


def test_scores_may_be_wanted_in_float32():
    x, y = jnp.full((1, 1, 3), 1.01, jnp.bfloat16), jnp.full((2, 3), 1.01, jnp.bfloat16)
    assert product.einsum("btd,vd->btv", x, y, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx512f avx512_bf16", "bfloat16"), ("fpu amx_bf16 amx_tile", "bfloat16"), ("fpu avx2 f16c", "float32"), (None, "float32")],
)
def test_a_cpu_is_given_the_type_that_it_can_multiply(tmp_path, flags, dtype):
    path = tmp_path / "cpuinfo"
    if flags:
        path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert product.fastest_dtype(path) == dtype


def test_packed_numbers_are_the_same_numbers_and_named_ones_keep_their_gradient(capsys):
    x = jax.random.normal(jax.random.key(0), (3, 5), jnp.bfloat16)
    assert product.pack(x).dtype == jnp.uint16 and product.pack(x.astype(jnp.float32)).dtype == jnp.float32
    np.testing.assert_array_equal(product.unpack(product.pack(x)), x)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(product.named(x, "kept")).astype(jnp.float32)))(x)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: jnp.sum(jnp.sin(x).astype(jnp.float32)))(x))
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    for name in ("kept", "other"):
        body = jax.checkpoint(lambda x: jnp.sum(jnp.sin(product.named(jnp.exp(x), name))), policy=policy)
        jax.ad_checkpoint.print_saved_residuals(body, x)
        assert ("u16[3,5]" in capsys.readouterr().out) == (name == "kept")


def test_programs_are_written_for_the_devices_that_are_there_or_for_those_that_are_named():
    assert product.platform() == "cpu" and "xla_disable_hlo_passes" in product.compiler_options()
    with product.written_for("tpu"):
        assert product.platform() == "tpu" and product.compiler_options() == product.TPU_OPTIONS
        assert product.fastest_dtype() == "bfloat16"
        assert product.pack(jnp.ones(1, jnp.bfloat16)).dtype == jnp.bfloat16
    assert product.platform() == "cpu"


def test_options_that_a_compiler_does_not_know_are_left_out():
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion", "xla_of_another_version": "true"}
    assert product.known(tuple(options.items())) == {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@pytest.mark.parametrize(("backend", "in_step", "weights", "layers"), [
    ("cpu", False, "dtype", "unroll"), ("cpu", True, "dtype", "scan"), ("gpu", True, "dtype", "unroll"), ("tpu", True, "dtype", "unroll"),
    ("tpu", False, "int8", "scan"),
])  # fmt: skip
def test_layers_are_unrolled_where_rows_are_written_faster_so(backend, in_step, weights, layers):
    with product.written_for(backend):
        assert decode.fastest_layers(in_step, weights) == layers
