"""What is exported, as PEFT and transformers load and compute it."""

import numpy as np
import peft
import pytest
import torch
import transformers
from small_runs import command, own_logits, start

import metatuner_jax as mt
from experiments import export

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
