"""The same step in PyTorch, as a user of today's tools would write it: the reference of `experiments.bench --against torch`.

transformers models, LoRA of each row by forward hooks, `generate` for sampling, autograd, AdamW. What costs nothing is done: one copy of
the weights for generator and actor, the static LoRA merged before sampling, scores of the needed columns only, float32 for what learns.
On a GPU, where launching a kernel takes longer than many take to run, models are compiled: layer by layer by `torch.compile` where they
are differentiated, one program for all layers, and by `generate`, with a static cache, where they write.
"""

import contextlib
import importlib.metadata

import numpy as np
import torch
import transformers

from experiments import bench
from metatuner_jax import pretrained

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILES = DEVICE == "cuda"
MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip


def tensor(array, dtype=None):
    """Returns a copy of a jax or numpy array."""
    array = np.asarray(array)
    if array.dtype == np.bool_ or np.issubdtype(array.dtype, np.integer):
        return torch.tensor(array.astype(np.int64), device=DEVICE)
    return torch.tensor(array.astype(np.float32), device=DEVICE).to(dtype or torch.float32)


def language_model(shape, params, dtype):
    """Returns a transformers model with the weights of ours."""
    import jax

    layers = params["layers"]
    if isinstance(layers, tuple):
        layers = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *layers)
    tree = {**params, "layers": layers}
    state = {}
    for leaf in pretrained.layout(shape):
        array = tree
        for key in leaf.path.split("/"):
            array = array[key]
        for i, name in enumerate(leaf.names):
            part = np.asarray(array[i] if leaf.stacked else array)
            state[name] = tensor(part.T if leaf.transposed else part, dtype)
    values = {key: value for key, value in pretrained.hf_config(shape).items() if key not in ("architectures", "model_type")}
    config = transformers.AutoConfig.for_model(shape.family, **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.to_empty(device=DEVICE)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(DEVICE)  # its buffers are not in the state
    return model.eval()


class Reference:
    """The joint step (MetaTuner-J, prompt_gradient='none') on the work's weights."""

    def __init__(self, work):
        self.setup, config = work.setup, work.setup.config
        self.dtype, self.full = getattr(torch, config.dtype), config.generator.train == "full"
        self.batch = {name: tensor(value) for name, value in work.batch.items()}
        self.actor = language_model(work.setup.actor, work.frozen.actor, self.dtype).requires_grad_(False)
        self.k = work.setup.num_shared
        self.hyper = {name: self.learns(leaf) for name, leaf in work.params["hyper"].items()}
        if self.full:
            self.generator = self.full_generator(work).requires_grad_(True)
            learning = list(self.generator.parameters())
            self.top = [*self.generator.model.layers[self.k :].parameters(), *self.generator.model.norm.parameters(), self.generator.lm_head.weight]
            self.copy = [p.detach().clone() for p in self.top]
        else:
            self.generator = self.actor
            self.static = {
                (part, target): {side: self.learns(leaf) for side, leaf in sides.items()}
                for part in ("shared", "prompt") for target, sides in work.params[part].items()
            }  # fmt: skip
            learning = [leaf for sides in self.static.values() for leaf in sides.values()]
            self.copy = {key: {side: leaf.detach().clone() for side, leaf in sides.items()} for key, sides in self.static.items()}
        self.adapted = {
            (i, target): layer.get_submodule(MODULES[target])
            for i, layer in enumerate(self.actor.model.layers) for target in {*config.hyper.targets, *config.generator.targets}
        }  # fmt: skip
        for module in self.adapted.values():
            module.register_forward_hook(add_lora)
        self.adapt({})
        self.generator.model.layers[self.k - 1].register_forward_hook(self.keep)
        for model in {self.actor, self.generator}:
            compile_layers(model)
        self.learning = [*learning, *self.hyper.values()]
        self.optimizer = torch.optim.AdamW(self.learning, lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True)

    def learns(self, leaf):
        return torch.nn.Parameter(tensor(leaf))

    def full_generator(self, work):
        """Returns a float32 generator whose head is its own; it computes in the work's type by autocast."""
        import dataclasses

        import jax

        p = work.params
        layers = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), p["shared"], p["prompt"]["layers"])
        shape = dataclasses.replace(work.setup.generator, tied=False)
        return language_model(shape, {"embed": p["embed"], "layers": layers, "norm": p["prompt"]["norm"], "head": p["prompt"]["head"]}, torch.float32)

    # --- LoRA ---

    def adapt(self, loras):
        """Has each projection of the actor's model add its LoRA, none where none is given."""
        for key, module in self.adapted.items():
            module.lora = loras.get(key)

    def keep(self, module, args, output):
        self.state = output[0] if isinstance(output, tuple) else output

    def static_loras(self):
        """Returns the generator's LoRA of each layer, in the compute type."""
        scale, loras = self.setup.config.generator.scale, {}
        for (part, target), sides in self.static.items():
            a, b = sides["a"].to(self.dtype), (scale * sides["b"]).to(self.dtype)
            first = 0 if part == "shared" else self.k
            loras |= {(first + i, target): (a[i], b[i]) for i in range(len(a))}
        return loras

    @contextlib.contextmanager
    def sampler(self):
        """Has the generator's weights be those that sample: the live shared layers and the copy of the others."""
        if self.full:
            live = [p.data for p in self.top]
            for p, old in zip(self.top, self.copy):
                p.data = old
            yield
            for p, data in zip(self.top, live):
                p.data = data
            return
        scale, before = self.setup.config.generator.scale, []
        for (part, target), sides in self.static.items():
            sides = self.copy[part, target] if part == "prompt" else sides
            deltas = torch.bmm(sides["a"], scale * sides["b"]).transpose(1, 2)
            first = 0 if part == "shared" else self.k
            for i, delta in enumerate(deltas):
                weight = self.actor.model.layers[first + i].get_submodule(MODULES[target]).weight
                before.append((weight, weight.clone()))
                weight.add_(delta.to(weight.dtype))  # in place: what is compiled knows where its weights are
        yield
        for weight, data in before:
            weight.copy_(data)

    # --- the step ---

    def computes(self):
        return torch.autocast(DEVICE, self.dtype, enabled=self.full and self.dtype != torch.float32)

    @torch.no_grad()
    def sample(self):
        """Returns a prompt for each query, [b, 16]."""
        with self.sampler(), self.computes():
            return generate(self.generator, self.batch["generator"], bench.PROMPT, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    def losses(self, prompts):
        """Returns (task loss, prompt loss) with these written prompts, [b, m]."""
        batch, config = self.batch, self.setup.config
        query, expert = batch["generator"], batch["expert"]
        self.adapt({} if self.full else self.static_loras())
        with self.computes():
            hidden = self.generator.model(torch.cat([query, expert[:, :-1]], 1), use_cache=False).last_hidden_state
            x = self.state[:, query.shape[1] - 1].float()
            prompt_loss = cross_entropy(self.generator.lm_head(hidden[:, query.shape[1] - 1 :]), expert)
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.setup.generator.norm_eps)
        self.adapt(self.row_loras(h))
        prefix = torch.tensor(self.setup.prefix, device=DEVICE).expand(len(query), -1)
        task_loss = answer_loss(self.actor, torch.cat([prefix, prompts, batch["query"]], 1), batch["answer"])
        self.adapt({})
        return task_loss, config.train.prompt_weight * prompt_loss

    def row_loras(self, h):
        """Returns the LoRA of each row by the paper's two-layer hypernetwork, in the compute type."""
        config, rank, loras = self.setup.config.hyper, self.setup.config.hyper.rank, {}
        for target in config.targets:
            factor = lambda side: torch.baddbmm(
                self.hyper[f"{target}_{side}_bias"][:, None], torch.relu(torch.matmul(h, self.hyper[f"{target}_{side}_down"])), self.hyper[f"{target}_{side}_up"]
            )
            a, b = factor("a"), config.scale * factor("b")
            a, b = a.unflatten(-1, (-1, rank)).to(self.dtype), b.unflatten(-1, (rank, -1)).to(self.dtype)
            loras |= {(i, target): (a[i], b[i]) for i in range(len(a))}
        return loras

    def step(self):
        """Does one whole step."""
        prompts = self.sample()
        loss = sum(self.losses(prompts))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, self.setup.config.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait()

    def row_gradient(self, loras):
        """Does the actor's pass and its gradient with a LoRA of each row, given as leaves."""

        def run():
            leaves = {key: tuple(side.detach().requires_grad_() for side in pair) for key, pair in loras.items()}
            self.adapt({key: tuple(side.to(self.dtype) for side in pair) for key, pair in leaves.items()})
            actor_gradient(self.actor, self.setup, self.batch)
            self.adapt({})

        return run


def add_lora(module, args, output):
    """Adds a projection's LoRA, which is read from the module: one hook for all layers, so that what one is compiled to serves every layer."""
    if module.lora is None:
        return output
    a, b = module.lora
    return output + args[0].matmul(a).matmul(b)  # [i, r] for all rows or [b, i, r], one a row


def compile_layers(model):
    """Has the layers be compiled on a GPU where they are differentiated, one program for all.

    Not where they write: with a cache a layer's number is part of its program, and `generate` compiles for itself.
    """
    if COMPILES:
        for layer in model.model.layers:
            layer.forward = differentiated(layer.forward)


def differentiated(forward):
    """Returns a layer's function, compiled where gradients are on."""
    compiled = torch.compile(forward, dynamic=False)
    return lambda *args, **kwargs: (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)


def generate(model, tokens, new_tokens, **how):
    """Returns the new tokens, exactly that many."""
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=bench.END, eos_token_id=bench.END,
        cache_implementation="static" if COMPILES else None, **how,
    )  # fmt: skip
    wait()
    return out[:, tokens.shape[1] :]


def cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def answer_loss(model, tokens, answer):
    """Returns the mean cross-entropy of the answers after the tokens."""
    hidden = model.model(torch.cat([tokens, answer[:, :-1]], 1), use_cache=False).last_hidden_state
    return cross_entropy(model.lm_head(hidden[:, tokens.shape[1] - 1 :]), answer)


def actor_gradient(model, setup, batch):
    prefix = torch.tensor(setup.prefix, device=DEVICE).expand(len(batch["query"]), -1)
    answer_loss(model, torch.cat([prefix, batch["expert"], batch["query"]], 1), batch["answer"]).backward()
    wait()


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# --- for the benchmark ---


def make_runs(work, names):
    """Yields what is timed beside our parts of these names, as (name, run), and makes each when it is asked for."""
    setup, dtype = work.setup, getattr(torch, work.setup.config.dtype)
    torch.compiler.reset()  # torch compiles one function at most eight times: what was compiled of an earlier model counts, and goes
    samples = "step_lora" in names and not COMPILES  # plain sampling beside the reference's: on a GPU it takes a minute more to compile
    plain = language_model(setup.actor, work.frozen.actor, dtype).requires_grad_(False) if "decode" in names or samples else None
    if "decode" in names:
        tokens = tensor(bench.decode_tokens(setup.actor.vocab_size))
        yield "torch_decode", torch.no_grad()(lambda: generate(plain, tokens, bench.DECODE_NEW, do_sample=False))
    if not {"actor_lora_per_row", "step_lora", "step_full"} & {*names}:
        return
    reference = Reference(work)
    check_losses(work, reference)
    if "actor_lora_per_row" in names:
        import peft

        loras = bench.loras_of(work)
        rows = {(i, target): (tensor(lora.a[i]), tensor(lora.b[i])) for target, lora in loras.items() for i in range(len(lora.a))}
        yield "torch_actor_lora_per_row", reference.row_gradient(rows)
        targets = [MODULES[target].split(".")[-1] for target in setup.config.hyper.targets]
        shared = peft.get_peft_model(
            language_model(setup.actor, work.frozen.actor, dtype), peft.LoraConfig(r=setup.config.hyper.rank, lora_alpha=16, target_modules=targets),
            autocast_adapter_dtype=False,  # it computes in the model's type, as the hooks do
        )
        adapted = shared.base_model.model
        compile_layers(adapted)
        yield "torch_actor_lora_peft", lambda: (shared.zero_grad(), actor_gradient(adapted, setup, reference.batch))
    if "step_lora" in names:
        yield "torch_step_lora", reference.step
        yield "torch_sample", reference.sample
    if samples:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        yield "torch_generate", torch.no_grad()(lambda: generate(plain, reference.batch["generator"], bench.PROMPT, **how))
    if "step_full" in names:
        yield "torch_step_full", reference.step


def versions() -> dict:
    """Returns the versions of what is compared with."""
    return {name: importlib.metadata.version(name) for name in ("torch", "peft")}


def check_losses(work, reference) -> None:
    """Raises RuntimeError where the reference's losses are not ours, for the same prompts."""
    import jax

    from metatuner_jax import generator, losses

    batch = work.batch

    @jax.jit
    def ours(params, frozen, batch):
        query = generator.read(work.setup, params, frozen, batch["generator"], batch["generator_mask"], batch["own"])
        loras = generator.adapt(work.setup, params["hyper"], query.h)
        weights, _ = generator.language_model(work.setup, params, frozen)
        start = generator.start(work.setup, params, frozen, query)
        states = generator.packed(work.setup, params, frozen, start, [(batch["expert"], batch["expert_mask"])])
        task = losses.task_loss(work.setup, frozen, loras, batch, batch["initial"], batch["initial_mask"])
        return task, work.setup.config.train.prompt_weight * losses.prompt_loss(work.setup, weights, states[0], batch)

    found = [float(value) for value in ours(work.params, work.frozen, batch)]
    theirs = [float(value.detach()) for value in reference.losses(reference.batch["initial"])]
    limit = 1e-3 if reference.dtype == torch.float32 else 0.05
    print(f"losses of task and prompt: ours {found[0]:.4f}, {found[1]:.4f}; torch {theirs[0]:.4f}, {theirs[1]:.4f}")
    if max(abs(a - b) for a, b in zip(found, theirs)) > limit:
        raise RuntimeError(f"the reference in torch does not compute the same step: losses {theirs}, ours {found}")


def step_memory(model: str, dtype: str, batch_size: int, train: str, query_tokens: int) -> int:
    """Returns how many bytes more than just before its first step the process holds at most in two steps.

    The optimizer's moments, which torch makes in the first step, are made before, as ours are.
    """
    work = bench.make_work(model, dtype, batch_size, train, query_tokens)
    reference = Reference(work)
    del work.params, work.frozen
    for leaf in reference.learning:
        leaf.grad = torch.zeros_like(leaf)
        reference.optimizer.step()  # moves nothing: the gradient is zero, and so are all moments
        leaf.grad = None
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        first = torch.cuda.memory_allocated()
        reference.step()
        reference.step()
        return torch.cuda.max_memory_allocated() - first
    with bench.Peak() as peak:
        reference.step()
        reference.step()
    return peak.bytes
