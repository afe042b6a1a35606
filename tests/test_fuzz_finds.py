"""What fuzz.py and the properties have found, as small as it gets: bad files give one line that names them, bad texts a score, both soon."""

import json
import struct
import time

import gguf
import numpy as np
import pytest
from conftest import save_model
from test_pretrained import GOLDEN, load_numpy, setting, write_gguf

from metatuner_jax import config, data, pretrained, tasks
from metatuner_jax.tasks import Example, Score, competition_math, cosmosqa, jsonl, mixture


def tokens_of(path):
    return data.Tokens(pretrained.load_tokenizer(path), 300, "rewrite")


def refused(path, message, *readers):
    for read in readers:
        start = time.process_time()
        with pytest.raises(ValueError) as caught:
            read(path)
        assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert time.process_time() - start < 10  # what hung took minutes


def tensor(name, array):
    return lambda fields, tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensor("token_embd.weight", np.zeros(3, "f4")), "token_embd.weight has shape [3], expected [tokens, 24]"),
        (setting("llama.attention.head_count", 0), "llama.attention.head_count=0 is not supported: it must be a whole number of at least 1"),
        (setting("llama.embedding_length", "24"), "llama.embedding_length='24' is not supported: it must be a whole number"),
        (setting("llama.attention.head_count_kv", 5), "llama.attention.head_count_kv=5 is not supported: it must divide llama.attention.head_count="),
        (setting("llama.attention.key_length", 3), "llama.attention.key_length=3 is not supported: rotary positions need an even width"),
        (setting("llama.attention.layer_norm_rms_epsilon", "small"), "llama.attention.layer_norm_rms_epsilon='small' is not supported"),
        (setting("llama.attention.layer_norm_rms_epsilon", float("nan")), "llama.attention.layer_norm_rms_epsilon=nan is not supported"),
        (setting("llama.logit_scale", "one"), "llama.logit_scale='one' is not supported: only 1.0"),
        (setting("llama.block_count", 2**30), "llama.block_count=1073741824 is not supported: the file holds"),
        (setting("general.architecture", "llama\nor so"), r"general.architecture='llama\nor so' is not supported"),
        (tensor("rope_freqs.weight", np.zeros(2, "f4")), "rope_freqs.weight=[0.0, 0.0] is not supported"),
        (tensor("rope_freqs.weight", np.full(2, np.inf, "f4")), "rope_freqs.weight=[inf, inf] is not supported"),
    ],
)
def test_the_shape_of_a_bad_gguf_file_is_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", change)
    refused(path, message, pretrained.load_config, pretrained.check_weights, load_numpy)


def test_the_names_of_superfluous_tensors_stay_on_one_line(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", tensor("one\ntwo" + "x" * 900, np.zeros(3, "f4")))
    refused(path, r"superfluous: 'one\ntwoxxx", pretrained.check_weights, load_numpy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("tokenizer.ggml.merges", [1.5]), "tokenizer.ggml.merges=[1.5] is not supported: it must be a list of texts"),
        (setting("tokenizer.ggml.merges", ["he"]), "tokenizer.ggml.merges=['he'] is not supported: each must be two tokens with a space between"),
        (setting("tokenizer.ggml.merges", ["h zz"]), "the tokenizer cannot be read: "),
        (setting("tokenizer.ggml.tokens", "abc"), "tokenizer.ggml.tokens='abc' is not supported: it must be a list of texts"),
        (setting("tokenizer.ggml.token_type", [1, 1]), "tokenizer.ggml.token_type=[1, 1] is not supported: it must have one entry for each of the 259"),
        (setting("tokenizer.ggml.token_type", [5] * 259), "tokenizer.ggml.bos_token_id=257 lies beyond the vocabulary of 0"),
        (setting("tokenizer.ggml.eos_token_id", "</s>"), "tokenizer.ggml.eos_token_id='</s>' lies beyond the vocabulary of 259"),
        (setting("tokenizer.ggml.pre", ["smollm"]), "tokenizer.ggml.pre=['smollm'] is not supported"),
        (setting("tokenizer.chat_template", 3), "tokenizer.chat_template=3 is not supported: it must be text"),
        (setting("tokenizer.chat_template", "{% for %}"), "the chat template fails: "),
        (setting("tokenizer.chat_template", "hello"), "the chat template does not show the system message"),
    ],
)
def test_the_tokenizer_of_a_bad_gguf_file_is_refused(tmp_path, change, message):
    refused(write_gguf(tmp_path / "model.gguf", GOLDEN / "llama", change), message, tokens_of)


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.UINT8, gguf.GGUFValueType.FLOAT64, gguf.GGUFValueType.ARRAY])
def test_a_list_longer_than_the_file_is_not_read_to_its_end(tmp_path, kind):
    path = tmp_path / "model.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x"
    path.write_bytes(head + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, 2**60) + b"\0" * 64)
    refused(path, "is not a whole GGUF file: it ends at byte", pretrained.load_config, tokens_of, load_numpy)


# --- rows, templates and texts ---


def test_a_column_name_of_several_lines_that_occurs_twice_is_named_on_one(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"a\nb","a\nb"\n1,2\n')
    task = config.TaskConfig("jsonl", str(path), num_validation=1, num_test=1)
    refused(path, "rows.csv:1: the column name 'a\\nb' occurs twice: rename one", lambda _: tasks.load(task, 0))


def test_a_row_of_many_fields_is_refused_in_few_words(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({f"{'x' * i}{i}": i for i in range(3000)}))
    task = config.TaskConfig("jsonl", str(path), num_validation=1, num_test=1)
    refused(path, "no field 'question' among '0', 'x1', 'xx2'", lambda _: tasks.load(task, 0))
    refused(path, "'xxxxxxxxxxxxxxxxxxx19' and 2980 more; name the right one in task.options.question", lambda _: tasks.load(task, 0))


def test_the_meta_prompt_stands_before_the_users_turn_where_the_template_takes_no_system_message(tmp_path):
    strict = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}"
    tokens = tokens_of(save_model(tmp_path / "strict", template=strict))
    assert tokens.tokenizer.decode(tokens.generator_ids("say", "one two")[0]) == "rewrite\n\nInstruction:\nsay\nQuestion:\none two"


@pytest.mark.parametrize("text", ["answer is " + "*" * 3000, "it's" + " " * 3000, "the answer is " + "* " * 2000, "answer: " * 500, "\\boxed{" * 5000])
def test_texts_that_go_round_in_circles_are_soon_scored(text):
    start = time.process_time()
    assert cosmosqa.score(text, Example("x", "q", "A", "A", ("one", "two", "three", "four"))) == Score(0, 0)
    assert competition_math.last_box(text) is None
    assert time.process_time() - start < 10  # what hung took minutes


def test_a_reference_with_a_mark_of_its_own_is_right():
    text = "#### 5 of them"
    assert jsonl.number(text, Example("x", "q", text, text)) == Score(1, 1)


def test_weights_of_any_size_share_the_rows():
    assert mixture.shares(10, [1e308, 1e308]) == [5, 5] and mixture.shares(374146, [5e302]) == [374146]
