"""Fuzzing of the readers of other people's files, guided by the coverage of their code.

    pip install atheris
    python tests/fuzz.py gguf --minutes 5        # or jsonl, jsonl.gz, csv; --corpus FOLDER keeps what was interesting

A bad file must give a ValueError or an OSError with one line that names the file, within SECONDS of processor time and MIB of memory.
Anything else is a find: one JSON object each on standard output, with its least file in base64, and at last one with the counts.
"""

import argparse
import base64
import gzip
import json
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc

import atheris
import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(pathlib.Path(__file__).parent.parent)]
with atheris.instrument_imports(include=["metatuner_jax", "gguf"]):
    import gguf

    from metatuner_jax import config, data, pretrained, tasks
    from metatuner_jax.tasks import jsonl, rows  # noqa: F401

SECONDS, MIB = 5.0, 64
GOOD_ROW = {"question": "Which number follows one?", "answer": "2"}


class TooLong(BaseException):
    """Not an Exception, so that no reader takes it for an error of the file."""


# --- what is read ---


def tiny_gguf() -> tuple[dict, dict]:
    """Returns fields and tensors of a llama with one layer."""
    draw = np.random.default_rng(0).normal
    tokens = [*"abcdeh", "he", "<s>", "</s>", "[PAD]"]
    fields = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 32, "llama.embedding_length": 8,
        "llama.feed_forward_length": 12, "llama.attention.head_count": 2, "llama.attention.head_count_kv": [1],
        "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 4,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1, 1, 3, 3, 5], "tokenizer.ggml.merges": ["h e"], "tokenizer.ggml.bos_token_id": 7,
        "tokenizer.ggml.eos_token_id": 8, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
    }  # fmt: skip
    shapes = {"token_embd": (10, 8), "output_norm": (8,), "rope_freqs": (2,)}
    layer = {"attn_norm": (8,), "ffn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    layer |= {"ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    tensors = {f"{name}.weight": draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return fields, tensors | {"rope_freqs.weight": np.ones(2, np.float32)}


def write_gguf(path, fields: dict, tensors: dict) -> None:
    writer = gguf.GGUFWriter(path, str(fields.pop("general.architecture", "llama")))
    add = {str: writer.add_string, int: writer.add_int64, float: writer.add_float64, bool: writer.add_bool, list: writer.add_array}
    for name, value in fields.items():
        add[type(value)](name, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()


def make_gguf(content: bytes, path) -> None:
    """Writes the content as it stands where it begins as a GGUF file; else it says what to change in the tiny llama."""
    if content.startswith(b"GGUF"):
        path.write_bytes(content)
        return
    draw = atheris.FuzzedDataProvider(content)
    fields, tensors = tiny_gguf()
    for _ in range(draw.ConsumeIntInRange(1, 3)):
        of = fields if draw.ConsumeIntInRange(0, 3) else tensors
        name, text, number = draw.PickValueInList([*of, "x"]), draw.ConsumeUnicodeNoSurrogates(8), draw.ConsumeInt(8)
        numbers = [draw.ConsumeIntInRange(-2, 12) for _ in range(draw.ConsumeIntInRange(1, 12))]
        texts = [text, "a b", *[draw.ConsumeUnicodeNoSurrogates(3) for _ in numbers]]
        values = [text, number, numbers[0], draw.ConsumeFloat(), bool(number & 1), numbers, texts, [1.0, float("nan")], 2**31 - 1, 0, -1]
        arrays = [np.full(abs(numbers[0]) + 1, number, kind) for kind in ("f4", "i8", "f8")] + [np.zeros((2, 2, 2), "f4")]
        value, kind = draw.PickValueInList(values if of is fields else arrays), draw.ConsumeIntInRange(0, 5)
        old = of.pop(name, value)
        if kind == 1:  # renamed
            of[name.replace("llama", "qwen2") + text * (of is tensors)] = old
        elif kind == 2 and isinstance(old, list | str):  # cut
            of[name] = old[: numbers[0]] or old
        elif kind:
            of[name] = value
    write_gguf(path, fields, tensors)


def readers_of_gguf(path):
    """Yields what is done with a .gguf file: of shape, check and weights the last, which begins with the others."""
    yield lambda: data.Tokens(pretrained.load_tokenizer(path), 10, "rewrite").allowed
    yield lambda: pretrained.load(path, put=lambda name, array: array)


def readers_of_rows(path):
    """Yields the making of rows by each metric; the other splits are good."""
    others = [path.parent / f"{split}.jsonl" for split in ("validation", "test")]
    for other in others * (not others[0].exists()):
        other.write_text(json.dumps({"question": f"Is this {other}?", "answer": "2"}) + "\n")
    for metric in ("exact_match", "number"):
        task = config.TaskConfig("jsonl", str(path), *map(str, others), options={"metric": metric}, num_validation=1)
        yield lambda: rows_are_text(tasks.load(task, 0))


def rows_are_text(task):
    for example in task.train:
        assert example.query.strip() == example.query != "" != example.answer.strip() == example.answer
        (example.query + example.answer).encode()


def seeds(kind):
    lines = [GOOD_ROW, {"question": "wie\u00df \U0001f600?", "answer": "1,200", "more": [1, None, {"a": 1e5}]}]
    text = "".join(json.dumps(row) + "\n" for row in lines).encode()
    path = pathlib.Path(tempfile.mkdtemp()) / "x"
    write_gguf(path, *tiny_gguf())
    return {
        "gguf": [path.read_bytes(), *(bytes(range(i, 256)) for i in range(0, 256, 32))],
        "jsonl": [text, b"\xef\xbb\xbf" + text, text * 3],
        "jsonl.gz": [gzip.compress(text), gzip.compress(text)[:-8] + text],
        "csv": [b'question,answer\n"a, b",2\n"c\nd",1\n', b"question,answer\r\none,1\r\n"],
    }[kind]


# --- the contract ---


class Fuzzer:
    def __init__(self, kind, minutes, corpus):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.path, self.corpus, self.kind = self.folder / f"file.{kind}", corpus, kind
        self.finds, self.executions, self.refused, self.start, self.minutes = {}, 0, 0, time.monotonic(), minutes

    def failures(self, content: bytes) -> dict[str, str]:
        """Returns what breaks the contract: where, and in which words."""
        found = {}
        make_gguf(content, self.path) if self.kind == "gguf" else self.path.write_bytes(content)
        for read in (readers_of_gguf if self.kind == "gguf" else readers_of_rows)(self.path):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
                read()
                fault = None
            except (ValueError, OSError) as error:
                self.refused += 1
                message = str(error)
                one_line = "\n" not in message and str(self.folder) in message and len(message) < 1000
                fault = None if one_line else error
            except BaseException as error:
                fault = error
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if fault is None and tracemalloc.get_traced_memory()[1] - before > MIB * 2**20:
                fault = MemoryError(f"more than {MIB} MiB")
            if fault is not None:
                ours = [f for f in traceback.extract_tb(fault.__traceback__) if "metatuner_jax" in f.filename and "tests" not in f.filename]
                place = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].name}:{ours[-1].lineno}" if ours else "fuzz.py"
                found[f"{type(fault).__name__} {place}"] = str(fault)[:300]
        return found

    def one(self, content: bytes) -> None:
        self.executions += 1
        if time.monotonic() - self.start > 60 * self.minutes:
            self.finish()
        for what, message in self.failures(content).items():
            if what not in self.finds:
                self.finds[what] = message
                least = self.least(content, what)
                make_gguf(least, self.path) if self.kind == "gguf" else self.path.write_bytes(least)
                file = base64.b64encode(self.path.read_bytes()).decode()
                print(json.dumps({"find": what, "message": message, "input": least.hex()[:400], "file": file}), flush=True)

    def least(self, content, what):
        """Returns the content without every run of bytes that the find does not need."""
        size, end = len(content) // 2, time.monotonic() + 20
        while size and time.monotonic() < end:
            for at in range(0, len(content), size):
                shorter = content[:at] + content[at + size :]
                if time.monotonic() < end and what in self.failures(shorter):
                    content = shorter
            size //= 2
        return content

    def finish(self):
        """Prints the counts, with how many lines of our readers the corpus reaches of the functions that it enters, and ends."""
        reached, functions = set(), set()

        def trace(frame, event, arg):
            code = frame.f_code
            if pathlib.Path(code.co_filename).name in ("pretrained.py", "rows.py", "jsonl.py"):
                functions.add(code)
                reached.add((code, frame.f_lineno))
                return trace
            return None

        for path in pathlib.Path(self.corpus).iterdir():
            sys.settrace(trace)
            self.failures(path.read_bytes())
            sys.settrace(None)
        lines = {(code, line) for code in functions for _, _, line in code.co_lines() if line}
        counts = {"reader": self.kind, "executions": self.executions, "refused": self.refused, "finds": len(self.finds)}
        counts |= {"minutes": self.minutes, "corpus": len(os.listdir(self.corpus)), "lines": len(reached & lines), "of": len(lines)}
        print(json.dumps(counts), flush=True)
        os._exit(0)


def too_long(*_):
    raise TooLong(f"more than {SECONDS} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=("gguf", "jsonl", "jsonl.gz", "csv"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--corpus", default=None)
    args = parser.parse_args()
    args.corpus = args.corpus or tempfile.mkdtemp()
    os.makedirs(args.corpus, exist_ok=True)
    for i, content in enumerate(seeds(args.reader)):
        (pathlib.Path(args.corpus) / f"seed{i}").write_bytes(content)
    signal.signal(signal.SIGVTALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    fuzzer = Fuzzer(args.reader, args.minutes, args.corpus)
    assert not fuzzer.failures(seeds(args.reader)[0]) and not fuzzer.refused  # imports what is imported late, too
    tracemalloc.start()
    atheris.Setup([sys.argv[0], args.corpus, "-max_len=8192", "-timeout=1000", "-rss_limit_mb=0", f"-artifact_prefix={fuzzer.folder}/"], fuzzer.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
