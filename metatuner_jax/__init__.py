"""MetaTuner (arXiv 2509.24245) in JAX and Flax: for every query, one network writes the prompt and another the LoRA.

Submodules load when first used, so that `import metatuner_jax` touches neither jax nor a device.
"""

import importlib
import os

__version__ = "0.1.0"

_SUBMODULES = (
    "attention", "checkpoint", "config", "data", "decode", "evaluate", "generator", "int8", "job", "lora", "losses", "memory", "methods", "metrics", "networks", "plots",
    "pretrained", "report", "rollout", "search", "sharding", "tasks", "train", "transformer", "tuner",
)  # fmt: skip
_NAMES = ("Answer", "Tuner")  # of `tuner`


if os.environ.get("METATUNER_CACHE") and "HF_HOME" not in os.environ:  # one setting for all that is fetched; the hub's own ones come first
    for _name, _folder in (("HF_HUB_CACHE", "hub"), ("HF_DATASETS_CACHE", "datasets")):
        os.environ.setdefault(_name, os.path.join(os.path.expanduser(os.environ["METATUNER_CACHE"]), _folder))


def __getattr__(name):
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.tuner"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_SUBMODULES, *_NAMES])
