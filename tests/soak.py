"""The full counts of what `make test` samples, and a long run whose memory is watched; about an hour on two cores.

    python tests/soak.py --out docs/soak.json                 # or --parts kills,memory

Each part is added to the file as it ends, with the commit and the date, so that a soak which is broken off goes on. Exit code 1 where a
part failed.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
FUZZED = ("gguf", "jsonl", "jsonl.gz", "csv")


def tested(*arguments, **environment):
    """Returns what came of tests with the full counts: {passed, failed, seconds, said}."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-n", "0", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "SOAK": "1", **environment}, check=False, capture_output=True, text=True)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error)", done.stdout[-200:])}
    said = re.findall(r"killed \d+ times: .*|\w+\.ipynb: .*", done.stdout)
    found = {"ok": done.returncode == 0, **counts, **({"said": said} if said else {})}
    return found if done.returncode == 0 else {**found, "output": (done.stdout + done.stderr)[-4000:]}


def fuzzed(reader, minutes=5):
    """Returns the counts of the fuzzing of one reader."""
    done = subprocess.run([sys.executable, "tests/fuzz.py", reader, "--minutes", str(minutes)], cwd=ROOT, check=False, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines or "executions" not in lines[-1]:
        return {"ok": False, "output": done.stderr[-4000:]}
    return {"ok": not lines[-1]["finds"], **lines[-1], **({"found": lines[:-1]} if lines[:-1] else {})}


def memory(steps=3000):
    """Returns the resident memory of a run's process over thousands of steps with rollouts, validation and checkpoints, in MiB."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest
    from small_runs import command, write_rows

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        conftest.save_model(root / "model")
        (root / "config.py").write_text(conftest.CONFIG)
        words = [f"{a} {b} {c}" for a in conftest.WORDS[1:10] for b in conftest.WORDS[1:10] for c in conftest.WORDS[1:10] if len({a, b, c}) == 3]
        for split, at in (("train", words[0:400]), ("validation", words[400:408]), ("test", words[408:416])):
            write_rows(root / f"{split}.jsonl", [{"question": f"reverse the list: {text}", "answer": " ".join(text.split()[::-1])} for text in at])
        settings = (f"train.num_steps={steps}", "train.checkpoint_every=50", "rollout.every=25", "train.diagnose_every=50", "data.buckets=1")
        arguments = [sys.executable, "-m", "experiments.run", *command(root, root / "run", *settings)]
        samples, page = [], os.sysconf("SC_PAGE_SIZE")
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                time.sleep(1)
                try:
                    resident = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page / 2**20
                    done = sum(1 for _ in (root / "run" / "metrics.jsonl").open())
                except (OSError, IndexError):
                    continue
                samples.append((done, resident))
            errors = process.stderr.read()
        thirds = [[resident for step, resident in samples if i * steps / 3 <= step < (i + 1) * steps / 3] for i in range(3)]
        if process.returncode or not all(thirds):
            return {"ok": False, "output": errors[-4000:]}
        medians = [round(statistics.median(third), 1) for third in thirds]
        attempts = sum(1 for _ in (root / "run" / "experts.jsonl").open())
    return {
        "ok": medians[2] < 1.03 * medians[1], "steps": steps, "rollouts": steps // 25, "attempts": attempts, "validations": steps // 50,
        "checkpoints": steps // 50, "resident_mib_by_third": medians, "highest_mib": round(max(resident for _, resident in samples), 1),
    }  # fmt: skip


PARTS = {
    "kills": lambda: tested("tests/test_faults.py", "-k", "killed", KILLS="20"),
    "faults": lambda: tested("tests/test_faults.py", "tests/test_stopping.py", "tests/test_method_runs.py", "-k", "not killed and not every_method"),
    "processes": lambda: tested("tests/test_processes.py"),
    "meshes": lambda: tested("tests/test_meshes.py"),
    "bad input": lambda: tested("tests/test_bad_input.py", "tests/test_fuzz_finds.py", "tests/test_safety.py"),
    "properties": lambda: tested("tests/test_properties.py"),
    "notebooks": lambda: tested("tests/notebooks", "-k", "whole"),
    **{f"fuzzing {reader}": lambda reader=reader: fuzzed(reader) for reader in FUZZED},
    "memory": memory,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "soak.json")
    parser.add_argument("--parts", default=",".join(PARTS))
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=False, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "--", "*.py"], cwd=ROOT, check=False, capture_output=True, text=True).stdout
    commit += " with changes" if changed else ""
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in given.parts.split(","):
        if found.get(name, {}).get("commit") == commit and found[name]["ok"]:
            continue
        began = time.monotonic()
        outcome = PARTS[name]()
        found[name] = {
            **outcome, "minutes": round((time.monotonic() - began) / 60, 1), "commit": commit, "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(), "cores": os.cpu_count(),
        }  # fmt: skip
        given.out.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return 0 if all(found[name]["ok"] for name in given.parts.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main())
