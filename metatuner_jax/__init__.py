"""MetaTuner (arXiv 2509.24245) in JAX and Flax: for every query, one network writes the prompt and another the LoRA.

Submodules load when first used, so that `import metatuner_jax` touches neither jax nor a device.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "checkpoint", "config", "data", "decode", "evaluate", "generator", "job", "lora", "losses", "methods", "networks", "plots", "pretrained",
    "report", "rollout", "search", "sharding", "tasks", "train", "transformer", "tuner",
)  # fmt: skip
_NAMES = ("Answer", "Tuner")  # of `tuner`


def __getattr__(name):
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.tuner"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_SUBMODULES, *_NAMES])
