"""A page and an HTTP endpoint for what a run has trained: each query is answered under its own prompt and adapter, many at a time.

    python -m experiments.serve --workdir runs/quickstart     # http://127.0.0.1:8000
"""

import asyncio
import concurrent.futures
import contextlib
import html
import importlib.resources
import json
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from experiments import predict, run
from metatuner_jax import config as config_lib
from metatuner_jax import memory

USAGE = """usage: python -m experiments.serve --workdir FOLDER [--host NAME] [--port N] [--step N] [--config.NAME=VALUE ...]

Shows a page at http://HOST:PORT/ where a query gets its prompt, its answer beside the base model's, and the norm of its adapter by layer; and answers
POST /v1/chat/completions as OpenAI's clients ask it. The last message is the query. A system message, where there is one, is the prompt in the place
of the one that would be written. Models are named in GET /v1/models: with the query's own adapter, with the mean one, with none, and the base model.

  --workdir FOLDER  of the run
  --host NAME       where to listen (default: 127.0.0.1, this machine alone)
  --port N          (default: 8000; 0: any that is free)
  --step N          another checkpoint than the best one
  --help            this text
"""
MAX_BYTES = 2**20  # of a request
KINDS = {"": ("own", "own"), ":mean": ("mean", "own"), ":none": ("none", "own"), ":base": ("none", "initial")}  # of models: (adapter, prompt)
GREEDY = {"temperature": (0, None), "n": (1, None), "tools": ([], None), "functions": ([], None), "logprobs": (False, None), "response_format": (None, {"type": "text"})}


def main(argv=None) -> int:
    """Returns the exit code: 0 stopped, 2 bad input."""
    return run.answered(argv, USAGE, serve)


def serve(argv) -> None:
    """Does what the command line says, until the process is asked to stop."""
    options, assignments = run.read_arguments(argv, ("--workdir", "--host", "--port", "--step"))
    run.need(options, "--workdir")
    workdir, step, host, port = run.path_of(options, "--workdir"), predict.step_of(options), options.get("--host", "127.0.0.1"), options.get("--port", "8000")
    if not port.isdecimal() or int(port) >= 2**16:
        raise run.Mistake(f"--port={port} must be a number below 65536")
    with listening(host, int(port)) as listener:
        import uvicorn

        found = predict.load(workdir, step, assignments)
        found.answer(["hello"])  # what is wrong with weights or devices shows now
        host, port = listener.getsockname()[:2]
        print(f"serving {workdir}, step {found.step}, at http://{host}:{port}", flush=True)
        app = make_app(Batcher(found), workdir.resolve().name, any_host=not host.startswith("127."))
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def listening(host, port):
    """Returns a socket that listens; raises Mistake where there can be none."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise run.Mistake(f"--host={host} --port={port}: cannot listen there ({error.strerror}): give another --port, or 0 for any that is free") from None


class Batcher:
    """Answers queries that come at any time from any thread, those that wait together."""

    def __init__(self, tuner):
        self.tuner, self.waiting = tuner, queue.SimpleQueue()
        self.largest = 0  # batch so far
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, query: str, adapter: str = "own", prompt: str = "own", given: str | None = None, then=lambda answer: answer) -> concurrent.futures.Future:
        """Returns the future of then(answer); its exception is a ValueError where there can be no answer.

        Args:
          given: the prompt to answer under, in the place of the method's.
        """
        return self._put(_Question(query, (adapter, prompt), given, then))

    def do(self, make) -> concurrent.futures.Future:
        """Returns the future of make(), which uses the models or the tokenizer: one thread alone does."""
        return self._put(make)

    def _put(self, work):
        future = concurrent.futures.Future()
        self.waiting.put((work, future))
        return future

    def _work(self):
        size = self.tuner.setup.config.eval.batch_size
        while True:
            items = [self.waiting.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < size:
                    items.append(self.waiting.get(timeout=0.005))  # those that come together
            groups = {}
            for work, future in items:
                with _told(future):
                    if isinstance(work, _Question):
                        self.tuner.check([work.query], given=work.given)  # so that it spoils no others' batch
                        groups.setdefault(work.how, []).append((work, future))
                    else:
                        future.set_result(work())
            for how, group in groups.items():
                self.largest = max(self.largest, len(group))
                with _told(*(future for _, future in group)):
                    answers = self.tuner.answer([one.query for one, _ in group], *how, prompts=[one.given for one, _ in group])
                    for (one, future), answer in zip(group, answers, strict=True):
                        future.set_result(one.then(answer))


class _Question(NamedTuple):
    query: str
    how: tuple[str, str]  # adapter and prompt
    given: str | None
    then: Callable


@contextlib.contextmanager
def _told(*futures):
    """Gives the exception that ends what is done while this is entered to those of the futures that wait yet."""
    try:
        yield
    except Exception as error:
        for future in futures:
            if not future.done():
                future.set_exception(error)


class Refused(Exception):
    """A request that is answered with an error: (status, message, the field that it is about)."""


def make_app(batcher: Batcher, name: str, any_host: bool = False):
    """Returns the ASGI application.

    Args:
      name: of the model, as clients ask for it.
      any_host: whether it may be reached by any name, not by this machine's own alone, which keeps other people's pages from asking it.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route

    tuner = batcher.tuner
    page = importlib.resources.files("experiments").joinpath("serve.html").read_text(encoding="utf-8")
    page = page.replace("{{name}}", html.escape(name)).replace("{{base}}", "Actor after its warm-up" if "actor" in tuner.params else "Base model")
    kinds = [kind for kind, (adapter, _) in KINDS.items() if not (adapter == "mean" and isinstance(mean_of(tuner), str))]

    async def body(request):
        text = b""
        async for chunk in request.stream():
            text += chunk
            if len(text) > MAX_BYTES:
                raise Refused(413, f"the request is larger than {MAX_BYTES} bytes", None)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise Refused(400, "the request is no JSON", None) from None
        if not isinstance(found, dict):
            raise Refused(400, "the request is no JSON object", None)
        return found

    async def refused(request, error):
        status, message, field = error.args
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": field, "code": None}}, status)

    async def wrong(request, error):
        return await refused(request, Refused(400, str(error), "messages"))

    async def too_large(request, error):
        return JSONResponse({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}}, 503)

    async def index(request):
        return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"})

    async def both(request):
        query = (await body(request)).get("query")
        if not isinstance(query, str):
            raise Refused(400, "query must be text", "query")
        parts = batcher.ask(query), batcher.ask(query, "none", "initial"), batcher.do(lambda: norms_of(tuner, query))
        own, base, norms = await asyncio.gather(*map(asyncio.wrap_future, parts))
        return JSONResponse({"prompt": own.prompt, "answer": own.text, "base": {"prompt": base.prompt, "answer": base.text}, "norms": norms})

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": name + kind, "object": "model", "created": 0, "owned_by": "metatuner_jax"} for kind in kinds]})

    async def complete(request):
        asked = read_request(await body(request), {name + kind: KINDS[kind] for kind in kinds})
        answer = batcher.ask(asked["query"], *asked["how"], asked["prompt"], then=lambda answer: completion(asked, answer, tuner))
        result = await asyncio.wrap_future(answer)
        return StreamingResponse(chunks(result), media_type="text/event-stream") if asked["stream"] else JSONResponse(result)

    return Starlette(
        routes=[
            Route("/", index), Route("/api/answer", both, methods=["POST"]), Route("/v1/models", models),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        exception_handlers={Refused: refused, ValueError: wrong, memory.OutOfMemory: too_large},
        middleware=[] if any_host else [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    )  # fmt: skip


def mean_of(tuner):
    """Returns the mean adapter, or a text that says why there is none."""
    try:
        return tuner.mean_lora()
    except ValueError as error:
        return str(error)


def norms_of(tuner, query) -> dict[str, list[float]]:
    """Returns the norm of a query's delta in each layer, by projection; none where the method has no adapter."""
    from metatuner_jax import lora

    if tuner.setup.method.adapter is None:
        return {}
    return {target: found.tolist() for target, found in lora.norms(tuner.lora(query)).items()}


# --- OpenAI's chat completions ---


def read_request(body, models) -> dict:
    """Returns what a request asks for: {query, prompt or None, how, model, stream, max_tokens or None, stop}.

    Args:
      models: {name: (adapter, prompt)}.

    Raises:
      Refused: it asks for what there is not.
    """
    model, messages = body.get("model"), body.get("messages")
    if model not in models:
        raise Refused(404, f"model {config_lib.short(model)} is not one of {', '.join(models)}", "model")
    for field, values in GREEDY.items():
        if field in body and body[field] not in values:
            raise Refused(400, f"{field}={config_lib.short(body[field])} is not supported: answers are text, one a request, and the likeliest; leave it out", field)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "messages must be a list of objects", "messages")
    roles = [message.get("role") for message in messages]
    if roles not in (["user"], ["system", "user"], ["developer", "user"]):
        raise Refused(400, f"messages must be one of the user, with one of the system before it or none, not {config_lib.short(roles)}: each query stands alone", "messages")
    *system, query = map(text_of, messages)
    limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    if not all(isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 for limit in limits):
        raise Refused(400, f"max_tokens={config_lib.short(limits[0])} must be a whole number above 0", "max_tokens")
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise Refused(400, "stop must be text or a list of texts", "stop")
    return {
        "query": query, "prompt": system[0] if system else None, "how": models[model], "model": model, "stream": bool(body.get("stream")),
        "max_tokens": min(limits, default=None), "stop": stop,
    }  # fmt: skip


def text_of(message) -> str:
    """Returns a message's content as text."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused(400, "content must be text", "messages")
    return content


def completion(asked, answer, tuner) -> dict:
    """Returns an answer as a chat completion."""
    ids, text = answer.ids, answer.text
    reason = "stop" if ids and (ids[-1] == tuner.setup.end_id or tuner.tokens.stopped_at(ids)) else "length"
    if asked["max_tokens"] is not None and len(ids) > asked["max_tokens"]:
        ids, reason = ids[: asked["max_tokens"]], "length"
        (text,) = tuner.tokens.answers([ids], [None])
    found = [text.index(stop) for stop in asked["stop"] if stop in text]
    if found:
        text, reason = text[: min(found)], "stop"
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()), "model": asked["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": reason}],
        "usage": {"prompt_tokens": answer.num_read, "completion_tokens": len(ids), "total_tokens": answer.num_read + len(ids)},
        "metatuner": {"prompt": answer.prompt},
    }  # fmt: skip


async def chunks(result):
    """Yields a completion as server-sent events: the whole answer in one, as it is written together with others'."""
    (choice,) = result.pop("choices")
    usage = result.pop("usage")
    for delta, reason in (({**choice["message"]}, None), ({}, choice["finish_reason"])):
        event = {**result, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        yield f"data: {json.dumps({**event, **({'usage': usage} if reason else {})})}\n\n"
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    sys.exit(main())
