"""The config tree and its checks, and the rows made from text."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers
from conftest import GENERATOR, save_model

from experiments import run
from metatuner_jax import config, data, pretrained
from metatuner_jax.tasks import Example

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "experiments" / "configs").glob("[a-z]*.py"))


def parsed(*assignments):
    tree = config.to_tree(config.Config())
    config.override(tree, [a.split("=", 1) for a in assignments])
    return config.from_tree(tree)


@pytest.mark.smoke
def test_the_tree_and_the_dataclasses_are_the_same():
    assert config.from_tree(config.to_tree(config.Config())) == config.Config()


def test_every_leaf_can_be_overridden_by_its_type():
    found = parsed(
        "task.options.question='0'", "train.num_steps=20", "train.learning_rate=3", "hyper.targets=q,down", "generator.num_shared=none", "hyper.standardize=true",
        "task.train=rows.jsonl", "task.options.min_words=3", "task.options.metric=contains", "seed=7", "mesh.data=2",
    )  # fmt: skip
    assert found.train.num_steps == 20 and found.train.learning_rate == 3.0 and found.hyper.targets == ("q", "down")
    assert found.generator.num_shared is None and found.hyper.standardize is True and found.task.train == "rows.jsonl"
    assert found.task.options == {"question": "0", "min_words": 3, "metric": "contains"} and found.seed == 7 and found.mesh.data == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.num_step=3", r"config.train.num_step is unknown: config.train has no 'num_step'; did you mean 'num_steps'"),
        ("tran.num_steps=3", r"config has no 'tran'; did you mean 'train'"),
        ("train.num_steps=ten", r"config.train.num_steps='ten' must be a whole number"),
        ("train.num_steps=none", r"must be a whole number"),
        ("hyper.standardize=maybe", r"must be true or false"),
        ("train=3", r"config.train is a section"),
        ("seed.x=3", r"config.seed is a value, not a section"),
        ("task.options=3", r"config.task.options is a section"),
        ("task.options.a.b=3", r"task.options holds single values"),
    ],
)
def test_wrong_settings_are_refused_by_name(assignment, message):
    with pytest.raises(ValueError, match=message):
        parsed(assignment)


def test_trees_with_unknown_missing_or_mistyped_keys_are_refused():
    values = dataclasses.asdict(config.Config())
    with pytest.raises(ValueError, match="config.train.stepz is unknown"):
        config.from_tree({**values, "train": {**values["train"], "stepz": 3}})
    with pytest.raises(ValueError, match="config.seed is missing"):
        config.from_tree({k: v for k, v in values.items() if k != "seed"})
    with pytest.raises(ValueError, match=r"config.hyper.targets=\[1\] must be names"):
        config.from_tree({**values, "hyper": {**values["hyper"], "targets": [1]}})
    with pytest.raises(ValueError, match="config.seed=True must be a whole number"):
        config.from_tree({**values, "seed": True})
    with pytest.raises(ValueError, match="train=3 must be a section"):
        config.from_tree({**values, "train": 3})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("method=metatuner_x", "method='metatuner_x' is not one of"),
        ("hyper.rank=0", "hyper.rank=0 must be at least 1"),
        ("generator.num_shared=0", "generator.num_shared=0 must lie strictly between"),
        ("train.prompt_gradient=straight", "did you mean 'straight_through'"),
        ("hyper.targets=q,qq", "hyper.targets='qq' is not one of"),
        ("train.remat=false", "train.remat='false' is not one of none, products, all"),
        ("hyper.targets=q,q", "each once"),
        ("train.learning_rate=nan", "train.learning_rate=nan must be a finite number above 0"),
        ("train.prompt_weight=-1", "train.prompt_weight=-1.0 must be"),
        ("seed=-1", "seed=-1 must be at least 0"),
    ],
)
def test_settings_that_no_run_could_use_are_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        config.check(parsed(assignment))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("generator.num_shared=4", r"generator.num_shared=4 must lie strictly between 0 and the generator's number of layers \(4\)"),
        ("hyper.rank=30", "hyper.rank=30 is above the rank of projection 'q'"),
    ],
)
def test_settings_that_do_not_suit_the_models_are_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        config.check_model(parsed(assignment), GENERATOR, GENERATOR)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_builds(path):
    if path.stem != "__init__":
        config.check(run.load_config(path, []))


def test_importing_the_package_touches_no_jax():
    code = "import sys, metatuner_jax, metatuner_jax.config, experiments.run; assert not {'jax', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- rows ---


@pytest.fixture(scope="module")
def tokens(tiny_model):
    tokenizer = pretrained.load_tokenizer(str(tiny_model))
    return data.Tokens(tokenizer, 400, "rewrite")


def test_the_prompt_is_spliced_into_the_template_as_ids(tokens):
    prompt, query = "say the words", "reverse one two"
    whole = tokens.tokenizer.apply_chat_template(
        [{"role": "system", "content": prompt}, {"role": "user", "content": query}], tokenize=False, add_generation_prompt=True
    )
    spliced = [*tokens.template.prefix, *tokens.plain(prompt), *tokens.query_ids(query)]
    assert tokens.tokenizer.decode(spliced) == whole
    assert spliced == tokens.encode(whole)
    assert tokens.tokenizer.decode([tokens.end_id]) == "<|im_end|>"


def test_pieces_are_cut_as_the_whole_text_where_words_have_sentencepiece_marks(tmp_path):
    """A tokenizer of Llama 2's kind marks the start of every text as the start of a word; pieces inside a text are none."""
    words = ["reverse", "one", "two", "say", "the", "words"]
    alphabet = sorted({c for w in words for c in w} | set("[]/INST:\n\x02"))
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "[INST]", "[/INST]", "\u2581", *alphabet])}
    model = tokenizers.models.BPE(vocab=vocab, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endfor %}"
    found = data.Tokens(fast, len(fast), "rewrite")
    whole = fast.apply_chat_template([{"role": "system", "content": "say the words"}, {"role": "user", "content": "reverse one two"}], tokenize=False)
    spliced = [*found.template.prefix, *found.plain("say the words"), *found.query_ids("reverse one two")]
    assert fast.convert_ids_to_tokens(spliced) == fast.convert_ids_to_tokens(fast.encode(whole, add_special_tokens=False))


def test_an_answer_is_cut_before_the_first_text_to_stop_before(tokens):
    stopping = data.Tokens(tokens.tokenizer, 400, "rewrite", ("two", "\nthree"))
    ids = stopping.plain("one, two\nthree four")
    assert stopping.answers([ids], [None]) == ["one, "] and tokens.answers([ids], [None]) == ["one, two\nthree four"]
    assert tokens.stopped_at(ids) is None and tokens.before_stop(ids) == ids and stopping.stopped_at(stopping.plain("one, ")) is None
    end = stopping.stopped_at(ids)
    assert stopping.decode(ids[:end]).endswith("two") and "two" not in stopping.decode(ids[: end - 1])
    before = stopping.before_stop(ids[:end])
    assert before == ids[: len(before)] and "one, ".startswith(stopping.decode(before)) and stopping.decode(before).strip() == "one,"


@pytest.mark.parametrize(("text", "texts"), [
    ("Question: ", ("Question: ",)), ("[END]", ("[END]",)), ("a, b", ("a, b",)), ('"', ('"',)), ("", ()), ("\n", ("\n",)), ('["Q:", "\\n\\n"]', ("Q:", "\n\n")),
])  # fmt: skip
def test_texts_to_stop_before_are_taken_as_they_are(text, texts):
    tree = config.to_tree(config.Config())
    config.override(tree, [("actor.stop", text)])
    assert config.from_tree(tree).actor.stop == texts


def test_templates_without_a_system_role_take_the_prompt_before_the_users_turn(tmp_path):
    strict = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict += "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    folder = save_model(tmp_path / "strict", template=strict)
    found = data.make_template(pretrained.load_tokenizer(str(folder)))
    assert (len(found.prefix), found.between, found.suffix) == (1, "\n\n", "<|im_end|>")


def test_the_name_of_a_special_token_in_a_query_is_only_text(tokens):
    plain = [i for i in tokens.query_ids("stop here") if i == tokens.end_id]
    assert [i for i in tokens.query_ids("stop <|im_end|> here") if i == tokens.end_id] == plain
    assert tokens.end_id not in tokens.plain("stop <|im_end|> here")
    assert tokens.decode(tokens.plain("stop <|im_end|> here")) == "stop <|im_end|> here"


def test_only_words_and_the_end_token_may_be_sampled(tokens):
    allowed = set(np.flatnonzero(tokens.allowed))
    assert tokens.end_id in allowed and len(tokens.allowed) == 400
    assert not allowed & (set(tokens.tokenizer.all_special_ids) - {tokens.end_id})
    assert max(allowed) == len(tokens.tokenizer) - 1


def rows_for(tokens, too_long="drop", limit=60):
    settings = parsed(f"generator.max_query_tokens={limit}", "actor.max_answer_tokens=4", f"data.too_long={too_long}")
    queries = ("one two", "three " * 30, "four five six")
    examples = tuple(Example(f"r{i}", q.strip(), "one" if i != 2 else "one two three four five", "one") for i, q in enumerate(queries))
    return data.make_rows(tokens, settings, "say", {"train": examples, "test": examples})


def test_long_rows_are_dropped_and_counted(tokens):
    rows, lengths, too_long = rows_for(tokens)
    assert too_long == {"train": (1, 1), "test": (1, 0)}
    assert [e.id for e in rows["train"].examples] == ["r0"] and [e.id for e in rows["test"].examples] == ["r0", "r2"]
    part = rows["test"]
    assert part.generator.shape[1] == lengths.generator and part.generator_mask[:, -1].all() and part.query_mask[:, -1].all()
    own = part.generator[0][part.own[0]]
    assert tokens.tokenizer.decode(own) == "one two"


def test_long_rows_are_cut_and_counted(tokens):
    rows, lengths, too_long = rows_for(tokens, "cut")
    assert too_long == {"train": (1, 1), "test": (1, 0)} and len(rows["train"]) == 3
    assert lengths.generator == 60 and lengths.answer == 4
    kept = tokens.tokenizer.decode(rows["train"].generator[1][rows["train"].own[1]])
    assert ("three " * 30).strip().endswith(kept) and 0 < len(kept) < 170
    query = tokens.tokenizer.decode(rows["train"].query[1][rows["train"].query_mask[1]])
    assert f"user\n{kept}<|im_end|>" in query


def test_a_split_with_no_row_left_is_refused(tokens):
    with pytest.raises(ValueError, match="no test row is left of 1: 1 have a query above generator.max_query_tokens=60"):
        long = (Example("a", "three " * 40, "x", "x"),)
        data.make_rows(tokens, parsed("generator.max_query_tokens=60"), "say", {"train": (Example("b", "one", "x", "x"),), "test": long})
