"""Fixtures shared by the suite: a tiny language model on disk, and one in memory."""

import gc
import importlib.metadata
import itertools
import json
import os
import random
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the suite spends its time on is compiling tiny models; code that is compiled quickly is fast enough for them.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have but one way to write a loop
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # compiles twice as quickly
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
gc.set_threshold(50_000)  # tracing makes objects by the million, most of which stay: looked through as often as by default they take a seventh of the time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

with install_import_hook("metatuner_jax", "beartype.beartype"):  # shape annotations are checked
    import metatuner_jax.actor
    import metatuner_jax.decode
    import metatuner_jax.generator
    import metatuner_jax.lora
    import metatuner_jax.losses
    import metatuner_jax.transformer  # noqa: F401

from small_runs import WORDS, write_rows

from metatuner_jax import config, generator, methods, pretrained, report, transformer


def pytest_configure(config):
    # The processes of the suite share a folder of compiled programs; what one of them is still writing, another one compiles for itself.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning")


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(folder, template=CHAT_TEMPLATE, extra=()):
    """Writes a small byte-level tokenizer laid out as the hub has it; returns its number of ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def save_model(folder, seed=0, template=CHAT_TEMPLATE, extra=(), **changes):
    """Writes a tiny random Llama, tied, three layers, with its tokenizer, laid out as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = save_tokenizer(folder, template, extra)
    shape = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": vocab + 5, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_theta": 10000.0, "hidden_act": "silu", **changes,
    }  # fmt: skip
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **shape}
    (folder / "config.json").write_text(json.dumps(settings))
    d, f = shape["hidden_size"], shape["intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": (shape["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(shape["num_hidden_layers"]):
        name = f"model.layers.{i}."
        tensors |= {name + "input_layernorm.weight": (d,), name + "post_attention_layernorm.weight": (d,)}
        for part, size in (("q", (d, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, d))):
            tensors[f"{name}self_attn.{part}_proj.weight"] = size
        for part, size in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            tensors[f"{name}mlp.{part}_proj.weight"] = size
    arrays = {
        name: (rng.normal(size=size) * (0.2 if len(size) == 2 else 0.1) + (len(size) == 1)).astype(np.float32)
        for name, size in tensors.items()
    }
    safetensors.numpy.save_file(arrays, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny model."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


# --- small runs ---

CONFIG = "from metatuner_jax import config\n\n\ndef get_config():\n    return config.to_tree(config.Config())\n"
SPLITS = {"train": 24, "validation": 8, "test": 8}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The folder of what XLA compiled, which the processes of the suite and those that its tests start share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def draw():
    """What writes a run's report, for tests that look at it: the other runs leave it out, as it takes a second of each."""
    write = report.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder: None)
        yield write


@pytest.fixture(scope="module")
def compiled(cache):
    """Runs of one config share what XLA compiled for the first of them, in whichever file that was.

    Processes that a test starts read it and add nothing, as one that is killed could leave half a program; but for those of test_processes.
    """
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, here, there in zip(names, (str(cache), 0.0), (str(cache), "1e9")):
            jax.config.update(name, here)
            patch.setenv(name.upper(), there)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def root(tmp_path_factory, tiny_model):
    """A folder with rows, a config file and models, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("root")
    rng = random.Random(0)
    lists = rng.sample(list(itertools.permutations(WORDS[1:10], 3)), sum(SPLITS.values()))
    for split, number in SPLITS.items():
        rows = [{"question": f"reverse the list: {' '.join(words)}", "answer": " ".join(words[::-1])} for words in lists[:number]]
        lists = lists[number:]
        write_rows(folder / f"{split}.jsonl", rows)
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "no_field.jsonl", [rows[0], {"question": "reverse", "reply": "esrever"}])
    write_rows(folder / "number.jsonl", [{"question": "six times seven", "answer": 42}])
    (folder / "config.py").write_text(CONFIG)
    (folder / "section.py").write_text(
        CONFIG.replace("config.to_tree(config.Config())", "{**config.to_tree(config.Config()).to_dict(), 'train': 3}")
    )
    (folder / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    shutil.copytree(tiny_model, folder / "model")
    for bad, missing in (("no_config", "config.json"), ("no_weights", "model.safetensors"), ("no_tokenizer", "tokenizer.json")):
        shutil.copytree(tiny_model, folder / bad)
        (folder / bad / missing).unlink()
    shutil.copytree(tiny_model, folder / "cut_short")
    weights = folder / "cut_short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(tiny_model, folder / "wrong_shape")
    settings = json.loads((folder / "wrong_shape" / "config.json").read_text())
    (folder / "wrong_shape" / "config.json").write_text(json.dumps({**settings, "intermediate_size": 44}))
    save_model(folder / "other_tokenizer", extra=("<|think|>",))
    save_model(folder / "short_window", max_position_embeddings=40)
    save_model(folder / "larger", seed=1, hidden_size=32, num_hidden_layers=2)
    save_model(folder / "divided", vocab_size=336)  # eight devices divide its words
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where a model's weights are loaded."""
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))


# --- the same in memory, for tests of single parts: sizes all different ---

GENERATOR = config.ModelConfig(
    "llama", vocab_size=61, num_layers=4, width=24, ff_width=36, num_heads=6, num_kv_heads=3, head_width=8, tied=True
)
ACTOR = config.ModelConfig(
    "qwen3", vocab_size=61, num_layers=3, width=20, ff_width=44, num_heads=4, num_kv_heads=2, head_width=10, qkv_bias=True, qk_norm=True
)
END = 2


def make_setup(method="metatuner_j", **sections):
    """Returns a Setup of the tiny models; sections as {"train": {"prompt_gradient": ...}}."""
    defaults = {
        "generator": {"num_shared": 3, "max_prompt_tokens": 5, "rank": 2},
        "hyper": {"rank": 2, "hidden": 7, "targets": ("q", "v", "down")},
        "train": {"batch_size": 3},
        "actor": {"max_answer_tokens": 4},
    }
    built = config.make(method=method, dtype="float32", **{name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}})
    return generator.Setup(methods.resolve(built), GENERATOR, ACTOR, END, (1, 7))


def randomise(tree, seed, scale=0.3):
    """Returns the tree with every leaf drawn at random: no zero hides a missing path."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.array(scale * rng.normal(size=leaf.shape), jnp.float32), tree)


def make_networks():
    """Returns make(setup) -> (frozen, params), weights and parameters random."""
    base = transformer.init(GENERATOR, jax.random.key(1))
    base["norm"]["scale"] = 1 + 0.2 * jax.random.normal(jax.random.key(5), (GENERATOR.width,))
    base["embed"]["embedding"] *= 30  # scores far enough apart that samples follow them
    actor = transformer.init(ACTOR, jax.random.key(2))
    actor["head"]["kernel"] *= 30
    fresh = {}  # making parameters takes longer than using them

    def make(setup, random=True):
        k, layers = setup.num_shared, base["layers"]
        cut = {**base, "layers": (transformer.cut(layers, 0, k), transformer.cut(layers, k, GENERATOR.num_layers))}
        allowed = (jnp.arange(GENERATOR.vocab_size) >= 3) | (jnp.arange(GENERATOR.vocab_size) == END)
        key = repr((setup.config.method, setup.config.generator, setup.config.hyper, setup.config.warmup))
        if key not in fresh:
            fresh[key] = generator.init(setup, cut, jax.random.key(3), actor)
        params = jax.tree.map(jnp.copy, fresh[key])  # a step may take them as its own
        if random:
            learnt = ("hyper",) if setup.config.generator.train == "full" else ("hyper", "shared", "prompt", "encoder")
            params |= {part: randomise(params[part], 4 + i) for i, part in enumerate(learnt) if part in params}
        full = setup.config.generator.train == "full"
        return generator.Frozen(None if full else cut, actor, allowed), params

    return make


@pytest.fixture(scope="session")
def networks():
    """make(setup) -> (frozen, params)."""
    return make_networks()


@pytest.fixture(scope="session")
def batch():
    """The batch of `make_batch`."""
    return make_batch()


def make_batch():
    """Returns a batch of three rows with padding of every kind."""
    rng = np.random.default_rng(0)

    def ids(length, sizes, side):
        tokens, mask = np.zeros((3, length), np.int32), np.zeros((3, length), bool)
        for i, n in enumerate(sizes):
            at = slice(length - n, length) if side == "left" else slice(0, n)
            tokens[i, at], mask[i, at] = rng.integers(3, 61, n), True
        return tokens, mask

    generator_ids, generator_mask = ids(6, (6, 4, 5), "left")
    query, query_mask = ids(7, (5, 7, 6), "left")
    answer, answer_mask = ids(4, (4, 2, 3), "right")
    expert, expert_mask = ids(5, (3, 5, 4), "right")
    own = generator_mask.copy()
    own[:, -1] = False
    arrays = {
        "generator": generator_ids, "generator_mask": generator_mask, "own": own, "query": query,
        "query_mask": query_mask, "answer": answer, "answer_mask": answer_mask, "expert": expert, "expert_mask": expert_mask,
        "initial": np.tile(np.array([5, 6, END, 0, 0], np.int32), (3, 1)), "initial_mask": np.tile(np.arange(5) < 3, (3, 1)),
    }  # fmt: skip
    return {name: jnp.array(array) for name, array in arrays.items()}


forward = jax.jit(transformer.forward, static_argnums=0)


def scores_of(model, params, ids, loras=None):
    """Returns the scores after each token of one row, [len(ids), v]; rows of any length up to 20 share one compilation."""
    tokens, mask = np.zeros((1, 20), np.int32), np.arange(20)[None] < len(ids)
    tokens[0, : len(ids)] = ids
    return np.array(forward(model, params, tokens, mask, loras))[0, : len(ids)]


@pytest.fixture
def forget_traces():
    """For a test that changes what a layer does: a layer is traced once for all programs of a process."""
    jax.clear_caches()
    yield
    jax.clear_caches()
