"""What to change where the memory of a device does not suffice."""

import contextlib
import re

from metatuner_jax import config as config_lib


class OutOfMemory(RuntimeError):
    """The memory does not suffice; says for what, and which settings need less."""


@contextlib.contextmanager
def watched(config: config_lib.Config, doing, ways: int = 1):
    """Raises OutOfMemory in the place of what jax or numpy raise where there is no more memory.

    Args:
      doing: returns what is being done: "start", "steps", "rollouts", "evaluation" or "answers", those to queries after training.
      ways: into how many parts the mesh splits the rows of a batch.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise named(error, config, doing(), ways) from error.__cause__


def named(error: Exception, config: config_lib.Config, doing: str, ways: int = 1) -> Exception:
    """Returns OutOfMemory for an error of jax or numpy that means it, and any other error as it is."""
    is_it = re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)) and "No space left" not in str(error)
    if not isinstance(error, MemoryError) and not is_it:
        return error
    found = re.search(r"allocat\w* ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", str(error))
    size = f" of {_size(found[1])} more" if found else ""
    plan = "" if doing == "answers" else "; --plan says what a run takes"
    return OutOfMemory(f"the memory does not suffice for the {doing}, for want{size}: {', '.join(options(config, doing, ways))}{plan}")


def options(config: config_lib.Config, doing: str, ways: int = 1) -> list[str]:
    """Returns the settings that need less memory for what is done, what costs least first."""
    found, rows = [], config.train.batch_size
    if doing == "steps":
        parts = next((parts for parts in range(config.train.accumulate + 1, rows + 1) if rows % (parts * ways) == 0), None)
        found += [f"raise train.accumulate={config.train.accumulate} to {parts}"] if parts else []
        found += [f"set train.remat=all in the place of {config.train.remat}"] if config.train.remat != "all" else []
        found += [f"lower train.batch_size={rows}"] if rows > 1 else []
    if doing in ("rollouts", "evaluation", "answers"):
        found += [f"lower eval.batch_size={config.eval.batch_size}"] if config.eval.batch_size > 1 else []
        found += [f"lower actor.max_answer_tokens={config.actor.max_answer_tokens}"]
    found += ["set generator.train=lora"] if config.generator.train == "full" and doing != "answers" else []
    found += ["set weights=int8"] if config.weights == "dtype" and not config_lib.merges_actor(config) else []
    return [*found, "split the weights over more devices with mesh.fsdp", "take smaller models"]


def _size(text):
    """Returns a size as it is said in GiB, of one in bytes, and others as they are."""
    return f"{int(text.split()[0]) / 2**30:.2f} GiB" if text.endswith("bytes") else text
