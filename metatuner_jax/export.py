"""What a run has trained, in other people's formats: PEFT's, transformers', a folder for a model hub."""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  gives numpy the name bfloat16
import numpy as np
import safetensors.numpy

from metatuner_jax import checkpoint, data, files, generator, int8, pretrained
from metatuner_jax.config import ModelConfig
from metatuner_jax.lora import Lora
from metatuner_jax.tuner import Tuner


def check_new(path: pathlib.Path) -> None:
    """Raises ValueError where there is something at `path` already."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"--out={path} is there already: name a new folder")


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder beside `path`, which becomes it once all is written; what was there before is never touched.

    Raises ValueError where there is something at `path` already, or it cannot be made.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ValueError(f"--out={path} cannot be made ({error.strerror}): name a folder where you may write") from None
    try:
        folder = scratch / path.name
        folder.mkdir()
        yield folder
        folder.rename(path)  # onto an empty folder at most
    finally:
        shutil.rmtree(scratch)


# --- PEFT ---


def whole_lora(tuner: Tuner, loras: dict[str, Lora]) -> dict[str, Lora]:
    """Returns a LoRA, and that of the actor's warm-up where there was one, as one LoRA of the base model, numpy float32.

    Raises:
      ValueError: the actor was warmed up in full, which no LoRA holds.
    """
    warmup = tuner.setup.config.warmup
    if tuner.warmed_up is None:
        return joined([loras])
    if warmup.actor_train == "full":
        raise ValueError("warmup.actor_train=full: all of the actor's weights were trained, which no LoRA holds: take --to merged")
    return joined([generator.static(tuner.warmed_up, warmup.scale), loras])


def joined(parts: list[dict[str, Lora]]) -> dict[str, Lora]:
    """Returns the sum of several deltas as one LoRA, numpy float32: of the sum of their ranks, the same for all projections."""
    factors = {}
    for target in dict.fromkeys(target for part in parts for target in part):
        own = [part[target] for part in parts if target in part]
        factors[target] = (np.concatenate([np.asarray(one.a, np.float32) for one in own], 2), np.concatenate([np.asarray(one.b, np.float32) for one in own], 1))
    rank = max((a.shape[2] for a, _ in factors.values()), default=0)
    fill = lambda array, axis: np.pad(array, [(0, (rank - array.shape[i]) * (i == axis)) for i in range(3)])
    return {target: Lora(fill(a, 2), fill(b, 1)) for target, (a, b) in factors.items()}


def write_peft(folder: pathlib.Path, model: ModelConfig, base: str, loras: dict[str, Lora]) -> None:
    """Writes a LoRA of all rows ([l, ...] leaves, scale included) as an adapter of PEFT.

    Args:
      base: name or folder of the model that it belongs to.
    """
    names = {leaf.path: leaf.names for leaf in pretrained.layout(model)}
    tensors, modules, rank = {}, [], 1
    for target, one in loras.items():
        weights = names[f"layers/{target}/kernel"]
        modules.append(weights[0].split(".")[-2])
        rank = one.a.shape[2]
        for i, name in enumerate(weights):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = np.ascontiguousarray(one.a[i].T, np.float32)
            tensors[f"{place}.lora_B.weight"] = np.ascontiguousarray(one.b[i].T, np.float32)
    modules = sorted(modules)
    # Where a model reads images, the part that sees them has modules of these names too.
    of_text = rf".*\.language_model\..*\.({'|'.join(modules)})" if model.family == "gemma3" else modules
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank,  # of ratio 1: scaled already
        "target_modules": of_text, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    _save(folder / "adapter_model.safetensors", tensors)
    files.write_json(folder / "adapter_config.json", settings)


# --- transformers ---


def merged(tuner: Tuner, loras: dict[str, Lora]) -> dict[str, np.ndarray]:
    """Returns the actor's weights, as they answered, with a LoRA of all rows added, float32, by the paths of `pretrained.layout`."""
    config, model = tuner.setup.config, tuner.setup.actor
    if tuner.warmed_up is not None and config.warmup.actor_train == "full":
        arrays = flat(tuner.warmed_up)
    else:
        arrays = {}
        pretrained.load(config.actor.model, "float32", lambda path, array: arrays.setdefault(path, np.array(array)), config.weights)
        for path in [path for path in arrays if path.endswith("/kernel") and path.replace("kernel", "scale") in arrays]:  # in 8 bits
            arrays[path] = int8.dense({"kernel": arrays[path], "scale": arrays.pop(path.replace("kernel", "scale"))})
        loras = whole_lora(tuner, loras)
    for path in ("embed/embedding", "head/kernel"):
        if path in arrays:
            arrays[path] = arrays[path][: model.vocab_size]
    for target, one in loras.items():
        arrays[f"layers/{target}/kernel"] += np.einsum("lir,lro->lio", one.a, one.b)
    return arrays


def flat(params: dict) -> dict[str, np.ndarray]:
    """Returns a model's parameters by their paths, numpy float32, its stacks of layers put together."""
    layers = params["layers"] if isinstance(params["layers"], tuple) else (params["layers"],)
    whole = {**params, "layers": jax.tree.map(lambda *parts: np.concatenate([np.asarray(part, np.float32) for part in parts]), *layers)}
    return {"/".join(key.key for key in path): np.array(leaf, np.float32) for path, leaf in jax.tree_util.tree_leaves_with_path(whole)}


def write_model(folder: pathlib.Path, model: ModelConfig, arrays: dict[str, np.ndarray], tokenizer: Any, dtype: str = "float32") -> None:
    """Writes weights by the paths of `pretrained.layout` as a model of transformers."""
    model, tensors = pretrained.text_only(model), {}
    for leaf in pretrained.layout(model):
        array = arrays[leaf.path]
        for name, part in zip(leaf.names, array if leaf.stacked else [array]):
            tensors[name] = np.ascontiguousarray(part.T if leaf.transposed else part).astype(dtype)
    pretrained.write(model, tensors, tokenizer, folder, data.end_id(tokenizer))


# --- a folder for a model hub ---


def base_of(tuner: Tuner, base: str | None = None) -> str:
    """Returns the model that an adapter of this run belongs to, as PEFT takes it: an id of the hub or a folder.

    Raises:
      ValueError: it is a GGUF file, which PEFT cannot take.
    """
    name = base or tuner.setup.config.actor.model
    path = pathlib.Path(name).expanduser()
    if name.startswith("pypi:"):
        return str(pretrained.resolve(name).resolve())
    if path.is_file():
        raise ValueError(f"actor.model={name!r} is a GGUF file, to which no adapter of PEFT can belong: give --base, or take --to merged")
    return str(path.resolve()) if path.is_dir() else name


def write_hub(folder: pathlib.Path, tuner: Tuner, workdir: pathlib.Path, base: str, loras: dict[str, Lora]) -> None:
    """Writes the mean adapter in PEFT's layout, what `Tuner.load` needs for prompts and adapters of one's own, and a model card.

    Rows of the data are not in it.

    Args:
      loras: the mean adapter, as `whole_lora` returns it.
    """
    write_peft(folder, tuner.setup.actor, base, loras)
    inner = folder / "metatuner"
    inner.mkdir()
    for name in ("config.json", "results.json", "mean_adapter.safetensors"):
        if (workdir / name).exists():
            shutil.copyfile(workdir / name, inner / name)
    if tuner.step is not None:
        checkpoint.write_params(inner / "checkpoints", tuner.step, tuner.params)
    saved, results = (json.loads((workdir / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "results"))
    (folder / "README.md").write_text(card(saved, results, base, loras), encoding="utf-8")


def card(saved: dict, results: dict, base: str, loras: dict[str, Lora]) -> str:
    """Returns the model card of a run, with its own figures.

    Args:
      saved, results: its config.json and results.json.
      base: id of the model on the hub that the adapter belongs to.
    """
    config, adapter = saved["resolved"], results["adapter"]

    def percent(score: dict) -> str:
        low, high = score["ci95"]
        return f"{100 * score['mean']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"

    rows = [("before: the bare model, hand-written prompt", results["before"]), ("after: own prompt, own adapter", results["after"])]
    rows += [(f"own prompt, {name} adapter", adapter[name]) for name in ("mean", "shuffled", "none")]
    rows += [(f"{name} prompt, own adapter", results["prompt"][name]) for name in ("initial", "shuffled")]
    table = "\n".join(f"| {name} | {percent(score)} |" for name, score in rows)
    rank = next((one.a.shape[2] for one in loras.values()), 0)
    drop = 100 * (adapter["own"]["mean"] - adapter["mean"]["mean"])
    prompts = "\n".join(f"- {name + ': ' if name else ''}`{json.dumps(text, ensure_ascii=False)}`" for name, text in saved["initial_prompts"].items())
    source = f"The run's own base, by which the scores below were had, was `{config['actor']['model']}`." if config["actor"]["model"] != base else ""
    source += " The scores below were had with the layers of the base in 8 bits." if config.get("weights") == "int8" else ""
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, metatuner, prompt-optimization, hypernetwork]
---

# {base.split("/")[-1]}, adapted to {results["task"]} by {results["method"]}

Trained with [MetaTuner](https://arxiv.org/abs/2509.24245) in JAX (metatuner_jax {saved["versions"]["metatuner_jax"]}): for every query one network writes the prompt and
another the LoRA of the language model. {source}

- `adapter_model.safetensors`: **the mean of all queries' adapters**, as one LoRA of rank {rank} on {", ".join(loras)}, for PEFT and whatever reads its layout.
- `metatuner/`: what writes a prompt and an adapter for each query.

## Scores

On {results["after"]["n"]} unseen test queries, {results["metric"]}, mean and 95% interval by the bootstrap over queries; seed {results["seed"]}, {results["steps"]} steps.

| | score |
|---|---|
{table}

The mean adapter scores {abs(drop):.1f} points {"less" if drop > 0 else "more"} than each query's own: that is what is {"lost" if drop > 0 else "won"} by taking it, with the written prompts in both.

## Use

With PEFT, under the initial prompt as system message:

{prompts}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "<this folder>")
```

With a prompt and an adapter for each query:

```python
import metatuner_jax as mt

tuner = mt.Tuner.load("<this folder>/metatuner")
[answer] = tuner.answer(["..."])
```
"""


def _save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # written for its owner alone, unlike other files
