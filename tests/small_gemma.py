"""A tiny model of Gemma 3's kind on disk, with a tokenizer as Gemma's are."""

import json

import numpy as np
import safetensors.numpy
import tokenizers
from small_runs import WORDS

from metatuner_jax import config, pretrained

# As Gemma 2's, which takes no system message, and Gemma 3's, which puts it before the user's words.
GEMMA2_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% set told = messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' if told else '' %}"
    "{% for m in (messages[1:] if told else messages) %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def save_gemma_tokenizer(folder, template=GEMMA3_TEMPLATE):
    """Writes a small tokenizer of Gemma's kind: SentencePiece's mark for a space and none before a text, bytes where a character is unknown.

    The markers of turns are special and, as in Gemma 3's, none of those that have a name.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    merges = list(dict.fromkeys((word[:i], word[i]) for word in WORDS for i in range(1, len(word))))
    letters = sorted({letter for word in WORDS for letter in word} | {"\n", "\N{LOWER ONE EIGHTH BLOCK}"})
    pieces = dict.fromkeys([*special, *(f"<0x{i:02X}>" for i in range(256)), *letters, *("".join(pair) for pair in merges)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    parts = tokenizers.decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
    tokenizer.decoder = tokenizers.decoders.Sequence(list(parts))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return len(vocab)


def save_gemma(folder, seed=0, template=GEMMA3_TEMPLATE):
    """Writes a tiny random Gemma 3 whose window is shorter than rows, with its tokenizer, laid out as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = config.ModelConfig(
        "gemma3_text", vocab_size=save_gemma_tokenizer(folder, template), num_layers=3, width=24, ff_width=40, num_heads=4, num_kv_heads=2,
        head_width=8, rope_theta=1000.0, rope_stretch=2.0, norm_eps=1e-6, tied=True, qk_norm=True, sliding_window=7, sliding_layers=(True, False, True),
        sliding_rope_theta=100.0, max_positions=512, activation="gelu_tanh", norm_offset=1.0, post_norms=True, scaled_embedding=True, query_scale=9.0,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(pretrained.hf_config(model)))
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32) for leaf in pretrained.layout(model) for name in leaf.names}
    safetensors.numpy.save_file(arrays, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
