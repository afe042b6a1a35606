"""The step is compiled for a TPU where there is none: its compiler comes with libtpu (`make tpu`)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from experiments import bench
from metatuner_jax import config as config_lib
from metatuner_jax import generator, sharding, train, transformer


def compiled(model, batch_size, mesh):
    """Returns the joint step of a model that generates and answers, compiled from shapes for the devices of a mesh."""
    config = config_lib.make(
        dtype="bfloat16", generator={"max_prompt_tokens": bench.PROMPT}, actor={"max_answer_tokens": bench.ANSWER},
        train={"batch_size": batch_size},
    )  # fmt: skip
    setup = generator.Setup(config, model, model, bench.END, (3, 4, 5))

    def make(key):
        weights, k = transformer.init(model, key, "bfloat16"), setup.num_shared
        halves = tuple(transformer.cut(weights["layers"], *ends) for ends in ((0, k), (k, model.num_layers)))
        weights = {**weights, "layers": halves}
        state = train.init_state(setup, generator.init(setup, weights, key))
        return state, generator.Frozen(weights, weights, jnp.ones(model.vocab_size, bool))

    def put(spec_of, tree):
        def one(path, leaf):
            where = jax.sharding.NamedSharding(mesh, spec_of(sharding.path_text(path), leaf.shape))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree_util.tree_map_with_path(one, tree)

    state, frozen = put(lambda path, shape: sharding.spec_at(path, shape, mesh), jax.eval_shape(make, jax.random.key(0)))
    batch = put(lambda *_: jax.sharding.PartitionSpec(sharding.ROWS), bench.make_batch(model.vocab_size, batch_size))
    key = put(lambda *_: jax.sharding.PartitionSpec(), jax.eval_shape(lambda: jax.random.key(0)))
    phase = train.phases(setup)[0]
    step = train.make_train_step(phase.turns[0][0], config.train, phase, phase.turns[0][1])
    return step.trace(state, frozen, batch, key).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1)])
def test_the_step_compiles_for_a_tpu_and_fits(shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = sharding.make_mesh(config_lib.MeshConfig(*shape), topology.devices)
    model, batch_size = bench.SHAPES["smollm2-135m"], 64
    program = compiled(model, batch_size, mesh)
    found = program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    print(f"\ndata, fsdp, tensor = {shape}: {held / 2**30:.2f} GiB a device, of these {found.temp_size_in_bytes / 2**30:.2f} temporary")
    assert held < 16 * 2**30  # of a v5e chip
    gathered = [
        (np.prod([int(n) for n in dims.split(",")]), name)
        for arrays, name in re.findall(r'= (.+) all-gather(?:-start)?\(.*op_name="([^"]*)"', program.as_text())
        for dims in re.findall(r"\w\[([\d,]+)\]", arrays)
    ]
    # The rows' LoRA are not brought together; nor, in the loop over layers within that over tokens, are any weights: a token of all rows is.
    loras = batch_size * model.num_layers * config_lib.Config().hyper.rank * model.width
    assert shape != (4, 1, 1) or max((size for size, _ in gathered), default=0) < loras
    assert max((size for size, name in gathered if "while/body/while/body" in name), default=0) == (batch_size * model.width if shape == (1, 4, 1) else 0)
