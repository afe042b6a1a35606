"""A run's own state on disk (Orbax, asynchronous): the newest checkpoints, to resume from, and the best by validation score.

Orbax restores flipped bytes without a word. So each checkpoint has a file of sums in a folder beside that of the checkpoints, written
once the checkpoint is whole, and what does not agree with its sums is set aside.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import sys
import threading
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from metatuner_jax import files, processes, sharding


def shapes(tree):
    """Returns the shape, type and placement of every array, without the arrays."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def sums_of(folder) -> dict[str, str]:
    """Returns the SHA-256 sum of every file below a folder, by its path there."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sums_path(folder, step: int) -> pathlib.Path:
    """Returns the file of sums of a checkpoint."""
    return pathlib.Path(folder).with_name("checkpoint_sums") / f"{step}.json"


def steps_in(folder) -> list[int]:
    """Returns the steps of the checkpoints in a folder, whole or not, in their order."""
    return sorted(int(path.name) for path in pathlib.Path(folder).glob("*") if path.name.isdigit())


def problem(folder, step: int) -> str | None:
    """Returns what is wrong with a checkpoint, None where it is as it was written."""
    path = sums_path(folder, step)
    if not path.parent.exists():
        return None  # of a version that wrote no sums
    try:
        wanted = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return "it has no sums: the run ended before they were written"
    except (OSError, ValueError, TypeError):
        return f"{path} cannot be read"
    found = sums_of(pathlib.Path(folder) / str(step))
    return next((f"{name} is not as it was written" for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)), None)


def problems(folder) -> dict[int, str | None]:
    """Returns `problem` of every checkpoint in a folder, by its step."""
    return {step: problem(folder, step) for step in steps_in(folder)}


def set_aside(folder, found: dict[int, str | None]) -> list[str]:
    """Moves the checkpoints that have problems to a folder beside. Returns a line about each.

    Args:
      found: what `problems` returned.
    """
    folder, lines = pathlib.Path(folder), []
    for step, wrong in found.items():
        if wrong:
            aside = folder.with_name("bad_checkpoints")
            aside.mkdir(exist_ok=True)
            number = sum(path.name.split("-")[0] == str(step) for path in aside.iterdir())
            place = (folder / str(step)).rename(aside / (f"{step}-{number}" if number else str(step)))
            lines.append(f"the checkpoint of step {step} is no good and was moved to {place}: {wrong}")
    drop_sums(folder)
    return lines


def drop_sums(folder) -> None:
    """Removes the sums of checkpoints that are gone."""
    steps = steps_in(folder)
    for path in sums_path(folder, 0).parent.glob("*.json"):
        if int(path.stem) not in steps:
            path.unlink()


def check(folder, step: int, like) -> None:
    """Raises ValueError where a checkpoint's arrays are not shaped as those of `like`: it belongs to another architecture."""
    place = pathlib.Path(folder).absolute() / str(step)
    check_like(place, ocp.StandardCheckpointHandler().metadata(place / "default").tree, like)


def check_like(place, saved, like, way_out: str = "give another --workdir, or the settings that it was made with") -> None:
    """Raises ValueError where the arrays of a saved tree are not shaped as those of another one."""
    found = {sharding.path_text(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    wanted = {sharding.path_text(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{place} is a checkpoint of another architecture: {name} is {found.get(name, 'missing')} there and "
                f"{wanted.get(name, 'missing')} in this run; {way_out}"
            )


def best_in(folder) -> int | None:
    """Returns the step of the checkpoint in a folder that has the highest validation score, the later one of equals, None where there is none."""

    def score(step):
        content = json.loads((pathlib.Path(folder) / str(step) / "metrics" / "metrics").read_text(encoding="utf-8"))
        return content["validation"], step

    return max(steps_in(folder), key=score, default=None)


def saved_params(folder, step: int, way_out: str = "take another --step, or none") -> dict:
    """Returns what had been learnt at a checkpoint, as shapes alone. Raises ValueError where there is no such checkpoint or it is damaged."""
    place = pathlib.Path(folder).absolute() / str(step)
    wrong = problem(folder, step) if place.exists() else f"there are those of the steps {', '.join(map(str, steps_in(folder))) or 'none'}"
    if wrong:
        raise ValueError(f"{place} cannot be loaded: {wrong}; {way_out}")
    return ocp.StandardCheckpointHandler().metadata(place / "default").tree["params"]


def load_params(folder, step: int, like):
    """Returns what had been learnt at a checkpoint, without the optimiser's state.

    Args:
      like: the parts of the tree `params` of that state that are wanted, as shapes with their placement.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or of another architecture.
    """
    saved = saved_params(folder, step)
    check_like(pathlib.Path(folder).absolute() / str(step), {part: tree for part, tree in saved.items() if part in like}, like)
    return restore_params(folder, step, like)


def restore_params(folder, step: int, like):
    """Returns what `load_params` does, of a checkpoint that is known to be whole and to have these parts: its files are not summed again."""
    place = pathlib.Path(folder).absolute() / str(step)
    how = ocp.checkpoint_utils.construct_restore_args({"params": like})
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(place / "default", args=ocp.args.PyTreeRestore({"params": like}, restore_args=how, partial_restore=True))["params"]


def write_params(folder, step: int, params) -> None:
    """Writes a checkpoint of what had been learnt alone, with its sums, in a folder that is not there yet: for `load_params`."""
    folder = pathlib.Path(folder).absolute()
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / str(step) / "default", {"params": params})
    sums_path(folder, step).parent.mkdir()
    files.write_json(sums_path(folder, step), sums_of(folder / str(step)))


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, but not with an error on its way: they wait for what has failed, and would only learn of it after minutes."""
    failure = sys.exc_info()[1]
    if isinstance(failure, Exception):  # `Stopped`, for which all save, is none
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _reason(error: Exception) -> str:
    """Returns why something could not be written: in the system's words where they are known."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else str(error)


def _report(plain, unraisable) -> None:
    error, trace = unraisable.exc_value, unraisable.exc_traceback
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not (closed and trace and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"):
        plain(unraisable)


def _hush() -> None:
    """Keeps traces of what was still being written when one write failed from standard error, where there would be hundreds.

    Orbax has closed the event loop by then that tensorstore's threads report to.
    """
    if getattr(sys.unraisablehook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


class Checkpoints:
    """Checkpoints of a run folder, named by the number of updates done."""

    def __init__(self, folder, keep: int = 2, sound=(), say=lambda text: None):
        """Opens a folder, which need not be there.

        Args:
          keep: newest checkpoints that are kept; the best one is in any case.
          sound: steps of checkpoints that are known to be as they were written.
          say: takes a line when a checkpoint is begun and when it is whole.
        """
        self.folder, self.sound, self.say = pathlib.Path(folder).absolute(), set(sound), say
        policies = [
            checkpoint_managers.LatestN(keep),
            # Of equal scores the later one counts as better: it has seen more.
            checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics["validation"] + 1e-9 * metrics["step"], n=1),
        ]
        several = {}
        if processes.group.count > 1:
            # Told who they are, processes wait for one another by messages; else by a sum over their devices, which meets those of the step
            # from another thread, in an order that not all have.
            all_of_them = ocp.options.MultiprocessingOptions(active_processes=set(range(processes.group.count)))
            several = {"async_options": ocp.AsyncOptions(barrier_sync_fn=_barrier), "multiprocessing_options": all_of_them, "create": False}
            self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics["validation"] + 1e-9 * metrics["step"],
            enable_async_checkpointing=True,
            **several,
        )
        # Without the handler, a manager that has not saved yet cannot tell what a checkpoint holds.
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler())
        self.writer: threading.Thread | None = None  # of the newest checkpoint
        self.failure: RuntimeError | None = None  # what went wrong in it

    def tend(self) -> None:
        """Raises what went wrong in the background, such as a full disk. To be called often."""
        if self.failure:
            raise self.failure

    def wait(self) -> None:
        """Waits until what was saved is on disk with its sums; raises what went wrong."""
        if self.writer:
            self.writer.join()
        self.tend()

    def _finish(self, step: int) -> None:
        try:
            self.manager.wait_until_finished()
            self._write_sums()
        except Exception as error:
            self.failure = RuntimeError(f"the checkpoint of step {step} could not be written: {_reason(error)}; those before it are kept")
            self.failure.__cause__ = error
            warnings.filterwarnings("ignore", r"coroutine '.*write_fragment' was never awaited", RuntimeWarning)  # of what had not begun

    def _write_sums(self) -> None:
        if processes.group.index:
            return
        for step in steps_in(self.folder):
            path = sums_path(self.folder, step)
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                files.write_json(path, sums_of(self.folder / str(step)))
                self.say(f"checkpoint {step} is whole")
        drop_sums(self.folder)

    def latest(self) -> int | None:
        """Returns the newest whole checkpoint's step, None where there is none."""
        self.wait()
        return self.manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the highest validation score, the later one of equals."""
        self.wait()
        return self.manager.best_step()

    def save(self, step: int, state, validation: float) -> None:
        """Starts writing a checkpoint, and then its sums, in the background; the error of an earlier write is raised here."""
        self.wait()
        self.say(f"checkpoint {step} is being written")
        _hush()
        self.manager.save(step, args=ocp.args.StandardSave(state), metrics={"validation": validation, "step": step})
        self.writer = threading.Thread(target=self._finish, args=(step,))
        self.writer.start()

    def restore(self, step: int, like):
        """Returns the state of a checkpoint, placed as `like` is. Raises what `check` does, and RuntimeError where it was damaged."""
        self.wait()
        wrong = None if step in self.sound else processes.group.from_first(lambda: problem(self.folder, step))
        if wrong:
            raise RuntimeError(f"the checkpoint of step {step} is no good: {wrong}; the same command sets it aside and goes on from another")
        check(self.folder, step, like)
        return self.manager.restore(step, args=ocp.args.StandardRestore(shapes(like)))

    def close(self) -> None:
        """Waits until everything is on disk; raises what went wrong in the background."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception) if self.failure else contextlib.nullcontext():  # it would raise the same again, in its own words
                self.manager.close()
