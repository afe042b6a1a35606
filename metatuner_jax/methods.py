"""The methods that can be compared: what writes the actor's prompt, what adapts its weights, and what is learnt. Imports no jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of adapting the actor. All run through the same loop, on the same rows, and answer in the same way."""

    prompt: str  # 'initial': the hand-written one; 'searched': one for the whole task; 'written': by the generator, for each query
    adapter: str | None  # 'static': one LoRA for all queries; 'generated': one a query, by the hypernetwork; None: the bare actor
    summary: str
    shared: bool = True  # prompt decoder and hypernetwork read the same bottom layers
    alternating: bool = False  # steps of the task term and of the prompt term take turns
    preference: bool = False  # the adapter learns from pairs of answers, not from the reference answers

    @property
    def learns(self) -> bool:
        """Whether there are any steps to take."""
        return self.prompt == "written" or self.adapter is not None

    @property
    def learns_generator(self) -> bool:
        """Whether some of the generator's layers learn: else it proposes prompts as it is, or is not used at all."""
        return self.prompt == "written" or self.adapter == "generated"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the tree that learn."""
        found = ("embed", "shared") * self.learns_generator + ("prompt",) * (self.prompt == "written")
        return found + ("hyper",) * (self.adapter is not None) + ("encoder",) * (not self.shared)


METHODS = {
    "zero_shot": Method("initial", None, "the bare actor with the initial prompt"),
    "prompt_search": Method("searched", None, "one prompt for the whole task, proposed by the generator, selected on train rows"),
    "prompt_only": Method("written", None, "a prompt a query, no LoRA: MetaTuner without F"),
    "sft": Method("initial", "static", "supervised fine-tuning of one static LoRA"),
    "dpo": Method("initial", "static", "fine-tuning, then direct preference optimisation of one static LoRA", preference=True),
    "hyper_only": Method("initial", "generated", "a LoRA a query, the initial prompt: MetaTuner without P"),
    "unshared": Method("written", "generated", "prompt and LoRA a query, no layers shared: MetaTuner without S", shared=False),
    "better_together": Method("searched", "static", "prompt search and fine-tuning in turns (Soylu et al. 2024, arXiv 2407.10930)"),
    "metatuner_i": Method("written", "generated", "the two terms take turns: MetaTuner-I", alternating=True),
    "metatuner_j": Method("written", "generated", "both terms in every step: MetaTuner-J"),
    "metatuner_st": Method("written", "generated", "MetaTuner-J with the straight-through gradient of the prompts"),
}


def resolve(config):
    """Returns the config that a method really runs with: the few settings that its name decides."""
    method = METHODS[config.method]
    train, generator, warmup = config.train, config.generator, config.warmup
    if config.method == "metatuner_st":
        train = dataclasses.replace(train, prompt_gradient="straight_through")
    if method.alternating or method.prompt != "written":
        # In turns, the task term learns nothing of the prompt decoder; without written prompts there is nothing to relax.
        train = dataclasses.replace(train, prompt_gradient="none")
    if not method.learns_generator:
        generator = dataclasses.replace(generator, train="lora")  # of which there is none: the generator stays as it is
    if not method.learns:
        warmup = dataclasses.replace(warmup, actor_steps=0)
    if method.prompt != "written":
        warmup = dataclasses.replace(warmup, generator_steps=0)
    if method.preference and not warmup.actor_steps:
        half, hyper = train.num_steps // 2, config.hyper
        warmup = dataclasses.replace(  # the fine-tuning that `sft` is
            warmup, actor_steps=half, actor_train="lora", learning_rate=train.learning_rate, rank=hyper.rank, scale=hyper.scale,
            targets=hyper.targets,
        )  # fmt: skip
        train = dataclasses.replace(train, num_steps=train.num_steps - half)
    return dataclasses.replace(config, train=train, generator=generator, warmup=warmup)
