"""The server answers as the run does, to the official client of its protocol, and refuses what it cannot do."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
from small_runs import STRONG, assert_one_line, command, killed_at_last, read_lines, served, start

import metatuner_jax as mt
from experiments import serve

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    assert start(command(root, folder, *STRONG))[0] == 0
    return folder


@pytest.fixture(scope="module")
def tuner(folder):
    return mt.Tuner.load(folder)


@pytest.fixture(scope="module")
def batcher(tuner):
    return serve.Batcher(tuner)


@pytest.fixture(scope="module")
def url(batcher):
    with served(serve.make_app(batcher, "run")) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def predictions(folder):
    return read_lines(folder / "predictions.jsonl")


def ask(client, query, model="run", **more):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": query}], **more)


def test_the_official_client_gets_the_runs_answers(client, tuner, predictions):
    assert [model.id for model in client.models.list()] == ["run", "run:mean", "run:none", "run:base"]
    for line in predictions[:3]:
        found = ask(client, line["query"], temperature=0)
        (choice,) = found.choices
        assert choice.message.content == line["answer"] and choice.message.role == "assistant" and found.metatuner == {"prompt": line["prompt"]}
        (answer,) = tuner.answer([line["query"]])
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (answer.num_read, len(answer.ids))
        assert choice.finish_reason == ("stop" if answer.ids[-1] == tuner.setup.end_id else "length")
    query = predictions[0]["query"]
    for model, how in (("run:mean", ("mean", "own")), ("run:none", ("none", "own")), ("run:base", ("none", "initial"))):
        assert ask(client, query, model).choices[0].message.content == tuner.answer([query], *how)[0].text


def test_a_system_message_is_the_prompt(client, tuner, predictions):
    query = predictions[0]["query"]
    messages = [{"role": "system", "content": "say words"}, {"role": "user", "content": [{"type": "text", "text": query}]}]
    found = client.chat.completions.create(model="run", messages=messages)
    (answer,) = tuner.answer([query], prompts=["say words"])
    assert found.metatuner == {"prompt": "say words"} and found.choices[0].message.content == answer.text and answer.prompt == "say words"
    rows, passes = tuner._rows([query], None), tuner._passes_for(1)
    h, tokens, mask = passes.prompts(tuner.params, rows, np.arange(1))
    given, given_mask = tuner._given("say words")
    first = [passes.answer(rows, np.arange(1), *prompt, passes.adapter(tuner.params, h)).first for prompt in ((tokens, mask), (given[None], given_mask[None]))]
    assert first[0] != first[1]  # it is read


def test_answers_are_cut_where_asked_and_streamed(client, tuner, predictions):
    line = max(predictions, key=lambda line: len(line["answer"]))
    (answer,) = tuner.answer([line["query"]])
    assert len(answer.ids) > 2
    short = ask(client, line["query"], max_tokens=2)
    assert short.choices[0].message.content == tuner.tokens.decode(answer.ids[:2]) and short.choices[0].finish_reason == "length"
    stop = line["answer"][2:4]
    stopped = ask(client, line["query"], stop=[stop]).choices[0]
    assert stopped.message.content == line["answer"][: line["answer"].index(stop)] and stopped.finish_reason == "stop"
    pieces = list(ask(client, line["query"], stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == line["answer"] and pieces[-1].choices[0].finish_reason


def test_requests_that_come_together_are_answered_together_each_under_its_own_adapter(client, batcher, predictions):
    before = batcher.largest
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):  # while one batch is worked on, the others wait together
            found = list(pool.map(lambda line: ask(client, line["query"]).choices[0].message.content, predictions))
            assert found == [line["answer"] for line in predictions]
    assert batcher.largest > max(before, 1) or before > 1


def test_the_page_gets_prompt_answers_and_norms(url, tuner, predictions):
    query = predictions[0]["query"]
    found = httpx.post(f"{url}/api/answer", json={"query": query}).json()
    (base,) = tuner.answer([query], "none", "initial")
    assert (found["prompt"], found["answer"], found["base"]["answer"]) == (predictions[0]["prompt"], predictions[0]["answer"], base.text)
    loras = tuner.lora(query)
    for target, norms in found["norms"].items():
        dense = loras[target].a @ loras[target].b
        assert norms == pytest.approx([float((layer**2).sum() ** 0.5) for layer in dense], rel=1e-4)
    page = httpx.get(url)
    assert page.status_code == 200 and "<title>run</title>" in page.text and "http" not in page.text.replace("<!doctype html>", "")


MESSAGES = [{"role": "user", "content": "one"}]
REFUSED = {
    "no model": ({"messages": MESSAGES}, 404, "model None is not one of run, run:mean"),
    "another model": ({"model": "gpt", "messages": MESSAGES}, 404, "model 'gpt' is not one of"),
    "no messages": ({"model": "run"}, 400, "messages must be a list"),
    "a conversation": ({"model": "run", "messages": [*MESSAGES, {"role": "assistant", "content": "two"}, *MESSAGES]}, 400, "each query stands alone"),
    "a picture": ({"model": "run", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content must be text"),
    "samples": ({"model": "run", "messages": MESSAGES, "temperature": 0.7}, 400, "temperature=0.7 is not supported"),
    "several answers": ({"model": "run", "messages": MESSAGES, "n": 2}, 400, "n=2 is not supported"),
    "tools": ({"model": "run", "messages": MESSAGES, "tools": [{}]}, 400, "tools=[{}] is not supported"),
    "no tokens": ({"model": "run", "messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens=0 must be"),
    "a stop that is no text": ({"model": "run", "messages": MESSAGES, "stop": [3]}, 400, "stop must be text"),
    "an empty query": ({"model": "run", "messages": [{"role": "user", "content": " "}]}, 400, "query ' ' is empty"),
    "a long query": ({"model": "run", "messages": [{"role": "user", "content": "two " * 600}]}, 400, "above generator.max_query_tokens"),
    "a long prompt": ({"model": "run", "messages": [{"role": "system", "content": "two " * 60}, *MESSAGES]}, 400, "above generator.max_prompt_tokens"),
    "no object": ([1], 400, "no JSON object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_the_protocols_words(case, url):
    body, status, text = REFUSED[case]
    found = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert found.status_code == status and text in found.json()["error"]["message"]


def test_a_bad_request_spoils_no_other_and_foreign_pages_get_nothing(url, client, predictions):
    assert httpx.post(f"{url}/v1/chat/completions", content=b"{" * 10**5).status_code == 400
    assert httpx.post(f"{url}/api/answer", content=b'"' + b"x" * 2**21).status_code == 413
    assert httpx.post(f"{url}/api/answer", json={"query": 3}).json()["error"]["param"] == "query"
    assert httpx.get(url, headers={"Host": "elsewhere.example"}).status_code == 400
    assert httpx.get(f"{url}/../../etc/passwd").status_code == 404
    bad = lambda: httpx.post(f"{url}/api/answer", json={"query": "two " * 600}).status_code
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(bad), *(pool.submit(ask, client, line["query"]) for line in predictions[:3])]
        assert futures[0].result() == 400
        assert [future.result().choices[0].message.content for future in futures[1:]] == [line["answer"] for line in predictions[:3]]


def test_the_command_serves_until_it_is_stopped(folder, predictions):
    words = [sys.executable, "-m", "experiments.serve", "--workdir", str(folder), "--port", "0"]
    with killed_at_last(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)) as process:
        line = process.stdout.readline()
        assert line.startswith(f"serving {folder}, step "), process.stderr.read()
        found = httpx.post(f"{line.split()[-1]}/api/answer", json={"query": predictions[0]["query"]}, timeout=60).json()
        assert found["answer"] == predictions[0]["answer"]
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        process.wait(30)
        assert time.monotonic() - began < 10 and "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "--workdir is missing"),
        (("--workdir=none",), "--workdir=none holds no run"),
        (("--workdir={folder}", "--port=many"), "--port=many must be a number below 65536"),
        (("--workdir={folder}", "--port={taken}"), "cannot listen there"),
        (("--workdir={folder}", "--host=999.1.1.1"), "cannot listen there"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(arguments, text, folder, capfd):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        filled = [argument.format(folder=folder, taken=taken.getsockname()[1]) for argument in arguments]
        assert serve.main([*filled, *([] if any("port" in one for one in filled) else ["--port=0"])]) == 2
    assert_one_line(capfd.readouterr().err, text)
    assert json.loads((folder / "config.json").read_text())
