"""Both notebooks run from the first cell to the last: with a few steps of a tiny model, and whole where SOAK=1."""

import json
import pathlib
import subprocess
import time
import venv

import conftest
import nbclient
import nbformat
import pytest
from small_runs import SOAK

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What takes the place of the cell with the parameters' values.
SMALL = {
    "quickstart": """
        SETTINGS |= {
            "generator.model": MODEL, "actor.model": MODEL, "generator.max_query_tokens": 900, "generator.max_prompt_tokens": 90, "train.num_steps": 2, "train.batch_size": 4,
            "task.num_train": 32, "task.num_validation": 4, "task.num_test": 4, "rollout.num_queries": 2, "rollout.num_prompts": 1, "eval.num_mean": 8, "eval.batch_size": 4,
            "eval.num_bootstrap": 50, "hyper.hidden": 5,
        }
    """,
    "method": """
        LIMITS = {"max_query_tokens": 900, "max_prompt_tokens": 90}
        STEPS, ROWS = 3, 8
    """,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny model whose rows may be long: it reads byte by byte."""
    return conftest.save_model(tmp_path / "model", max_position_embeddings=2048)


def execute(notebook, folder, kernel="python3"):
    """Runs a notebook's cells in a folder; nbclient raises what a cell raised, with the cell."""
    nbclient.NotebookClient(notebook, timeout=3600, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}).execute()


def figures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_says_where_it_is_made_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.execution_count is None and not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert [tag for cell in notebook.cells for tag in cell.metadata.get("tags", ())] == ["install", "parameters"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_with_a_few_steps(path, model, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("METATUNER_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", ())
        if "install" in tags:
            cell.source = ""
        if "parameters" in tags:
            cell.source += f"\nMODEL = {str(model)!r}\n" + "\n".join(line[8:] for line in SMALL[path.stem].strip("\n").splitlines())
    execute(notebook, tmp_path)
    assert figures(notebook) >= 3


if SOAK:

    @pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
    def test_a_notebook_runs_whole_from_its_installation(path, tmp_path, monkeypatch):
        """In an environment that holds a kernel and nothing else, from a clone, with SmolLM2-135M-Instruct."""
        for name in ("PYTHONPATH", "XLA_FLAGS"):  # as the suite sets them
            monkeypatch.delenv(name, raising=False)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
        venv.create(tmp_path / "env", with_pip=True)
        python = tmp_path / "env" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "ipykernel"], check=True)
        spec = tmp_path / "jupyter" / "kernels" / "fresh"
        spec.mkdir(parents=True)
        (spec / "kernel.json").write_text(json.dumps({"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "fresh", "language": "python"}))
        monkeypatch.setenv("JUPYTER_PATH", str(spec.parent.parent))
        monkeypatch.setenv("METATUNER_CACHE", str(tmp_path / "cache"))
        notebook, began = nbformat.read(path, as_version=4), time.monotonic()
        execute(notebook, tmp_path / "clone" / "notebooks", "fresh")
        print(f"{path.name}: {time.monotonic() - began:.0f} s from its installation to its last cell")
        assert figures(notebook) >= 3
