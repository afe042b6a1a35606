"""What is exported, as PEFT and transformers load and compute it."""

import numpy as np
import peft
import pytest
import torch
import transformers
from small_gemma import save_gemma
from small_runs import command, own_logits, start

import metatuner_jax as mt
from experiments import export
from metatuner_jax import pretrained

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    # PEFT asks transformers for a name that it is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"),
]
TARGETS = "hyper.targets=q,k,v,o,gate,up,down"
WARM = ("warmup.actor_steps=2", "warmup.targets=q,o", "warmup.rank=3", "warmup.learning_rate=0.02")


@pytest.mark.parametrize("settings", [(TARGETS,), (*WARM, TARGETS), WARM, ("method=sft",)], ids=["all", "warm, all", "warm", "sft"])
def test_an_exported_adapter_gives_torch_our_logits(settings, root, tmp_path):
    run = tmp_path / "run"
    assert start(command(root, run, "hyper.scale=5", "train.learning_rate=0.02", "eval.num_bootstrap=10", *settings))[0] == 0
    tuner, query = mt.Tuner.load(run), "reverse the list: one two three"
    tokens = np.random.default_rng(0).integers(0, tuner.setup.actor.vocab_size, (3, 17))
    for name, loras, words in (("mean", tuner.mean_lora(), ()), ("own", tuner.lora(query), ("--query", query))):
        ours = own_logits(tuner, tokens, loras)
        for kind in ("peft", "merged"):
            out = tmp_path / f"{kind}-{name}"
            assert export.main(["--workdir", str(run), "--to", kind, "--out", str(out), *words]) == 0
            if kind == "peft":
                model = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            with torch.no_grad():
                theirs = model.eval()(torch.from_numpy(tokens)).logits.numpy()
            difference = np.abs(theirs - ours).max()
            print(f"{kind}, {name}: greatest difference {difference:.1e} of logits up to {np.abs(ours).max():.1f}")
            assert difference < 1e-4
        assert np.abs(ours - own_logits(tuner, tokens)).max() > 0.01
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"merged-{name}").chat_template


@pytest.mark.parametrize("sees", [False, True], ids=["gemma3_text", "gemma3"])
def test_what_is_exported_of_gemma_gives_torch_our_logits(sees, root, tmp_path):
    """Also where the base is a model that reads images, whose language model alone has a LoRA."""
    model = save_gemma(tmp_path / "model")
    if sees:
        text = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        whole = transformers.Gemma3Config(text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=300)
        whole = transformers.Gemma3ForConditionalGeneration(whole)
        whole.model.language_model.load_state_dict(text.model.state_dict())
        whole.save_pretrained(model)
    run, models = tmp_path / "run", (f"generator.model={model}", f"actor.model={model}")
    code, said = start(command(root, run, *models, TARGETS, "method=sft", "train.learning_rate=0.02", "eval.num_bootstrap=10"))
    assert code == 0, said
    tuner = mt.Tuner.load(run)
    assert tuner.setup.actor.family == ("gemma3" if sees else "gemma3_text")
    tokens = np.random.default_rng(0).integers(6, 300, (3, 17))
    ours = own_logits(tuner, tokens, tuner.mean_lora())
    assert np.abs(ours - own_logits(tuner, tokens)).max() > 0.01
    for kind, read in (("peft", peft.AutoPeftModelForCausalLM), ("merged", transformers.AutoModelForCausalLM)):
        assert export.main([f"--workdir={run}", f"--to={kind}", f"--out={tmp_path / kind}"]) == 0
        found = read.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = np.abs(found(torch.from_numpy(tokens)).logits.numpy() - ours).max()
        print(f"{kind}: greatest difference {difference:.1e} of logits up to {np.abs(ours).max():.1f}")
        assert difference < 1e-4
        adapted = [name for name, _ in found.named_modules() if name.endswith("lora_A")]
        assert len(adapted) == 7 * 3 * (kind == "peft")
    assert pretrained.load_config(tmp_path / "merged").family == "gemma3_text"
    assert found.generation_config.eos_token_id == [1, tuner.tokens.end_id]
