"""MetaTuner (arXiv 2509.24245) in JAX and Flax: for every query, one network writes the prompt and another the LoRA.

Submodules load when first used, so that `import metatuner_jax` touches neither jax nor a device.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "checkpoint", "config", "data", "decode", "evaluate", "generator", "lora", "losses", "methods", "pretrained", "rollout", "search",
    "sharding", "tasks", "train", "transformer",
)  # fmt: skip


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_SUBMODULES])
