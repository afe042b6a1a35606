"""Scores what a run has trained on rows that it has not seen.

    python -m experiments.score --workdir runs/mine --test other.jsonl
"""

import dataclasses
import pathlib
import sys

from experiments import predict, run
from metatuner_jax import config as config_lib
from metatuner_jax import files, tasks
from metatuner_jax import workdir as workdir_lib

USAGE = """usage: python -m experiments.score --workdir FOLDER --test SOURCE [options] [--config.NAME=VALUE ...]

Answers the test rows of a file, a folder or a hub id with the best checkpoint of a run, and scores the answers by the run's own metric, strict and
flexible, with 95% intervals by the bootstrap over queries. The rows have the fields of the run's task. None of them is left out because the run has seen
it: that is for who asks to know.

  --workdir FOLDER  of the run
  --test SOURCE     as task.test takes it
  --num_test N      only so many rows (default: all)
  --adapter NAME    own (default), mean or none; --prompt NAME: own (default) or initial (see experiments.predict)
  --step N          another checkpoint than the best one
  --out FILE        to write what was answered, as predictions.jsonl has it; it must not be there yet
  --help            this text
"""
OPTIONS = ("--workdir", "--test", "--num_test", "--adapter", "--prompt", "--step", "--out")


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    return run.answered(argv, USAGE, score)


def score(argv) -> None:
    """Does what the command line says."""
    options, assignments = run.read_arguments(argv, OPTIONS)
    run.need(options, "--workdir", "--test")
    workdir, step, out = run.path_of(options, "--workdir"), predict.step_of(options), options.get("--out") and pathlib.Path(options["--out"])
    if out and out.exists():
        raise run.Mistake(f"--out={out} is there already: name a new file")
    number = options.get("--num_test")
    if number is not None and (not number.isdecimal() or not int(number)):
        raise run.Mistake(f"--num_test={number} must be a whole number above 0")
    saved = workdir_lib.read_config(workdir)
    task = load(saved.task, options["--test"], number and int(number), saved.seed)

    from metatuner_jax import evaluate

    adapter, prompt = predict.how_of(options)
    found = predict.load(workdir, step, assignments)
    examples = sorted(task.test, key=lambda example: example.part)
    parts = {example.part: [one for one in examples if one.part == example.part] for example in examples}
    for part, rows in parts.items():
        found.check([example.query for example in rows], part if len(parts) > 1 else None)
    answers = []
    for part, rows in parts.items():
        answers += found.stream([example.query for example in rows], adapter, prompt, part if len(parts) > 1 else None)
    scores = tasks.score_all(task.score, [answer.text for answer in answers], examples)
    config = found.setup.config
    print(f"{workdir}, step {found.step}: {len(examples)} rows of {options['--test']}, {task.metric}, {adapter} adapter, {prompt} prompt   [95% interval]")
    groups = {"strict": [one.strict for one in scores], "flexible": [one.flexible for one in scores]}
    groups |= {part: [one.strict for one, example in zip(scores, examples) if example.part == part] for part in parts if len(parts) > 1}
    for name, values in groups.items():
        print(workdir_lib.score_line(name, evaluate.interval(values, config.eval.num_bootstrap, config.seed)))
    if out:
        files.write_lines(out, [
            {"id": e.id, "query": e.query, "prompt": a.prompt, "answer": a.text, "reference": e.reference, "score": s.strict, "flexible": s.flexible}
            for e, a, s in zip(examples, answers, scores)
        ])  # fmt: skip


def load(task: config_lib.TaskConfig, source: str, number: int | None, seed: int) -> tasks.Task:
    """Returns a run's task with the test rows of a source alone."""
    return tasks.load(dataclasses.replace(task, train=None, validation=None, test=source, num_train=0, num_validation=0, num_test=number), seed)


if __name__ == "__main__":
    sys.exit(main())
