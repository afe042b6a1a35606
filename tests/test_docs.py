"""The commands that the documentation shows: those of docs/your_data.md are run, all others are read."""

import contextlib
import importlib
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys

import httpx
import pytest
from small_runs import killed_at_last, read_lines

from experiments import run
from metatuner_jax import config

pytestmark = pytest.mark.usefixtures("compiled")
ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "RESULTS", "CONTRIBUTING", "CHANGELOG")), *sorted((ROOT / "docs").glob("**/*.md"))]
OURS = "python -m experiments."


def blocks(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page in one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Returns the words of each of our commands in a text, lines that go on put together; what is not ours is left out."""
    joined = re.sub(r" *\\\n\s*", " ", text)
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.startswith(OURS)]


# --- docs/your_data.md, run ---


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's text; the test is in an empty folder, with `python` on the path, and a tiny model in the place of SmolLM2."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return (ROOT / "docs" / "your_data.md").read_text()


@contextlib.contextmanager
def serving(words):
    """Yields the address at which a server command listens, on any free port, until it is stopped."""
    process = subprocess.Popen([sys.executable, *words[1:], "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with killed_at_last(process):
        line = process.stdout.readline()
        assert line.startswith("serving "), process.stderr.read()
        yield line.split()[-1]
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def post(words, address):
    """Returns the response to a curl command, sent to another address."""
    url, header, body = words[1], words[words.index("-H") + 1], words[words.index("-d") + 1]
    return httpx.post(re.sub(r"http://[^/]*", address, url), content=body, headers=dict([header.split(": ")]), timeout=60)


def test_the_page_on_your_data_goes_from_a_file_to_a_served_model(page, tiny_model, capsys):
    small = [
        f"--config.{setting}"
        for setting in (
            f"generator.model={tiny_model}", f"actor.model={tiny_model}", "generator.max_query_tokens=256", "generator.max_prompt_tokens=100", "hyper.hidden=5",
            "train.num_steps=2", "train.batch_size=4", "task.num_train=16", "task.num_validation=4", "task.num_test=4", "rollout.every=0",
            "actor.max_answer_tokens=20", "eval.batch_size=8", "eval.num_mean=8", "eval.num_bootstrap=50", "dtype=float32", "data.buckets=1",
        )
    ]  # fmt: skip
    said, served = [], None
    for block in blocks(page, "bash"):
        ours = commands(block)
        if block.startswith("curl "):
            with serving(served) as address:
                found = post(shlex.split(block), address)
            said.append("curl")
            assert found.status_code == 200 and found.json()["choices"][0]["message"]["role"] == "assistant", found.text
            continue
        if not block.startswith(OURS):
            script = block if not ours else block[: block.index(OURS)]
            subprocess.run(["bash", "-euo", "pipefail", "-c", script], check=True, capture_output=True)
        for _, _, module, *words in ours:
            if module == "experiments.serve":
                served = ["python", "-m", module, *words]
                continue
            code = importlib.import_module(module).main([*words, *(small if "--config" in words else [])])
            assert code == 0, capsys.readouterr().err
            said.append(module)
    (example,) = blocks(page, "python")
    pathlib.Path("example.py").write_text(example)
    runpy.run_path("example.py")
    kinds = ("choose_prompt", "run", "predict", "predict", "score", "score", "export", "export")
    assert said == [*(f"experiments.{kind}" for kind in kinds), "curl"]
    assert len(read_lines(pathlib.Path("later-answers.jsonl"))) == 40
    assert {path.name for path in pathlib.Path("exported/adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


# --- all pages, read ---


def shown():
    """Yields (page, words) of each of our commands in blocks and in indented lines of the documentation."""
    for path in PAGES:
        text = path.read_text()
        for words in commands("\n".join(line.strip() for line in text.splitlines())):
            yield path.name, words


@pytest.mark.parametrize("page, words", [pytest.param(*one, id=f"{one[0]}-{i}") for i, one in enumerate(shown())])
def test_commands_name_modules_settings_and_configs_that_there_are(page, words):
    module, arguments = words[2], words[3:]
    assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page}: {module}"
    leaves = {key for key, *_ in config.leaves()}
    for word in arguments:
        key = word.removeprefix("--config.").partition("=")[0]
        if word.startswith("--config.") and not key.startswith("task.options."):
            assert key in leaves, f"{page}: {word}"
    if "--config" in arguments and not (named := arguments[arguments.index("--config") + 1]).isupper() and not named.startswith("$"):
        path = run.config_path({"--config": named})
        assert (ROOT / path).is_file() or named == "mine.py", f"{page}: --config {named}"


def anchors(text: str) -> set[str]:
    """Returns the names by which the headings of a page are linked to."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there.read_text()), f"{page.name}: {target}"


def test_names_of_the_library_that_the_pages_speak_of_are_there():
    modules = {path.stem for path in (ROOT / "metatuner_jax").glob("*.py")} - {"__init__"}
    settings, seen = {key for key, *_ in config.leaves()}, set()
    for page in PAGES:
        for module, name in re.findall(r"`(\w+)\.(\w+)(?:\(\))?`", page.read_text()):
            if module in modules and f"{module}.{name}" not in settings and name not in ("py", "md", "jsonl"):
                seen.add(module)
                assert hasattr(importlib.import_module(f"metatuner_jax.{module}"), name), f"{page.name}: {module}.{name}"
    assert {"generator", "losses", "lora"} <= seen


def test_the_api_has_every_module():
    shown = set(re.findall(r"automodule:: metatuner_jax\.([\w.]+)", "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))))
    found = {".".join(path.relative_to(ROOT / "metatuner_jax").with_suffix("").parts).removesuffix(".__init__") for path in (ROOT / "metatuner_jax").rglob("*.py")}
    assert shown == found - {"__init__"}
