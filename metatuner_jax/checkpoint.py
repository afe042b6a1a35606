"""A run's own state on disk (Orbax, asynchronous): the newest checkpoint, to resume from, and the best by validation score."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from metatuner_jax import sharding


def shapes(tree):
    """Returns the shape, type and placement of every array, without the arrays."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


class Checkpoints:
    """Checkpoints of a run folder, named by the number of updates done."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder).absolute()
        policies = [
            checkpoint_managers.LatestN(1),
            # Of equal scores the later one counts as better: it has seen more.
            checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics["validation"] + 1e-9 * metrics["step"], n=1),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics["validation"] + 1e-9 * metrics["step"],
            enable_async_checkpointing=True,
        )
        # Without the handler, a manager that has not saved yet cannot tell what a checkpoint holds.
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def latest(self) -> int | None:
        """Returns the newest whole checkpoint's step, None where there is none."""
        return self.manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the highest validation score, the later one of equals."""
        return self.manager.best_step()

    def save(self, step: int, state, validation: float) -> None:
        """Starts writing a checkpoint in the background; the error of an earlier write is raised here."""
        self.manager.save(step, args=ocp.args.StandardSave(state), metrics={"validation": validation, "step": step})

    def restore(self, step: int, like):
        """Returns the state of a checkpoint, placed as `like` is. Raises what `check` does."""
        self.check(step, like)
        return self.manager.restore(step, args=ocp.args.StandardRestore(shapes(like)))

    def check(self, step: int, like) -> None:
        """Raises ValueError where a checkpoint's arrays are not shaped as those of `like`: it belongs to another architecture."""
        saved = self.manager.item_metadata(step)
        found = {sharding.path_text(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
        wanted = {sharding.path_text(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
        for name in [*wanted, *found]:
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.folder / str(step)} is a checkpoint of another architecture: {name} is {found.get(name, 'missing')} there and "
                    f"{wanted.get(name, 'missing')} in this run; give another --workdir, or the settings that it was made with"
                )

    def close(self) -> None:
        """Waits until everything is on disk; raises what went wrong in the background."""
        self.manager.wait_until_finished()
        self.manager.close()
