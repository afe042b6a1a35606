"""Answers queries with what a run has trained, and shows the prompt that was written for each.

    python -m experiments.predict --workdir runs/quickstart --query "Reverse this list of words: one, two, three"
"""

import json
import os
import select
import sys

from experiments import run
from metatuner_jax import config as config_lib
from metatuner_jax import files, stopping
from metatuner_jax.tasks import rows as rows_lib

USAGE = f"""usage: python -m experiments.predict --workdir FOLDER [--query TEXT | --input FILE] [options] [--config.NAME=VALUE ...]

Answers queries with the best checkpoint of a run: those of --query or of a file, else the lines of standard input as they come. Each answer is
printed as soon as its batch is done.

  --workdir FOLDER   of the run, which need not have ended
  --query TEXT       one query
  --input FILE       JSON Lines, CSV or Parquet with a query in each row
  --field NAME       its field for the query (default: the one that the run's rows have, else `query`)
  --adapter NAME     own (default): the LoRA written for the query; mean: one for all queries; none: the bare actor
  --prompt NAME      own (default): the prompt written for the query; initial: the hand-written one
  --part NAME        of a mixture, the part whose initial prompt the queries have
  --step N           another checkpoint than the best one
  --json             one JSON object a line: id (where the input has one), query, prompt, answer
  --help             this text

Of the run's settings these may be others than in training: {", ".join(config_lib.MAY_DIFFER)}
"""
OPTIONS = ("--workdir", "--query", "--input", "--field", "--adapter", "--prompt", "--part", "--step")


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM."""
    try:
        with stopping.Stop().heard():
            return run.answered(argv, USAGE, predict)
    except stopping.Stopped as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        return 128 + stopped.number


def predict(argv) -> None:
    """Does what the command line says."""
    options, assignments = run.read_arguments(argv, OPTIONS, ("--json",))
    run.need(options, "--workdir")
    if "--query" in options and "--input" in options:
        raise run.Mistake("--query and --input are both given: give one of them")
    workdir, step = run.path_of(options, "--workdir"), step_of(options)
    batches = read(options, field_of(options, workdir))  # before anything slow
    how = how_of(options)
    found = load(workdir, step, assignments)
    if how[0] == "mean":
        found.mean_lora()  # is there one
    size, part = found.setup.config.eval.batch_size, options.get("--part")
    if {"--query", "--input"} & set(options):
        found.check([query for items in batches(size) for _, query in items], part)
    print(f"{workdir}, step {found.step}; the first answers wait for the compiler", file=sys.stderr)
    try:
        for items in batches(size):
            ids, queries = zip(*items)
            for id, answer in zip(ids, found.answer(queries, *how, part)):
                show(id, answer, "--json" in options)
    except BrokenPipeError:  # who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load(workdir, step, assignments):
    """Returns what a run has trained, ready to answer with programs that an earlier command compiled."""
    from metatuner_jax import job, tuner

    job.keep_compiled()
    return tuner.Tuner.load(workdir, step, dict(assignments))


def how_of(options) -> tuple[str, str]:
    """Returns --adapter and --prompt."""
    from metatuner_jax import tuner

    adapter, prompt = options.get("--adapter", "own"), options.get("--prompt", "own")
    config_lib.one_of("--adapter", adapter, tuner.ADAPTERS)
    config_lib.one_of("--prompt", prompt, tuner.PROMPTS)
    return adapter, prompt


def step_of(options) -> int | None:
    """Returns the number of --step, None where it is not given."""
    step = options.get("--step")
    if step is not None and not step.isdecimal():
        raise run.Mistake(f"--step={step} must be the number of a checkpoint")
    return None if step is None else int(step)


def field_of(options, workdir):
    """Returns the fields of a row in which the query may stand, the likeliest first."""
    if "--field" in options:
        return [options["--field"]]
    saved = files.read_json(workdir / "config.json")
    task = saved.get("config", {}).get("task", {}) if isinstance(saved, dict) else {}
    named = task.get("options", {}).get("question") if isinstance(task, dict) and isinstance(task.get("options"), dict) else None
    return [*([named] if named else []), "query", "question"]


def read(options, fields):
    """Returns batches(size), which yields lists of (id or None, query). A file is read whole, and checked, at once."""
    if "--query" in options:
        items = [(None, options["--query"])]
    elif "--input" in options:
        items = [item_of(row, fields) for row in rows_lib.read("--input", options["--input"], "test") or ()]
        if not items:
            raise run.Mistake(f"--input={options['--input']} has no split 'test': name a file in it")
    else:
        return lambda size: lines_as_they_come(sys.stdin.buffer, size)
    return lambda size: (items[start : start + size] for start in range(0, len(items), size))


def item_of(row, fields):
    """Returns (id or None, query) of a row."""
    field = next((field for field in fields if field in row.values), fields[0])
    return row.values.get("id"), rows_lib.text(row, field, "name the right one in --field")


def lines_as_they_come(stream, size):
    """Yields the lines that are there, `size` at most at a time, without their ends and those that are empty; waits for the first alone."""
    rest, ended, number = b"", False, 0
    while not ended or rest:
        lines = []
        while len(lines) < size:
            line, newline, after = rest.partition(b"\n")
            if newline or (ended and rest):
                number, rest = number + 1, after
                try:
                    text = line.decode().strip()
                except UnicodeDecodeError:
                    raise run.Mistake(f"line {number} of standard input is not UTF-8: send UTF-8") from None
                lines += [(None, text)] if text else []
            elif ended or (lines and not select.select([stream], [], [], 0)[0]):
                break
            else:
                chunk = os.read(stream.fileno(), 2**16)
                ended, rest = not chunk, rest + chunk
        if lines:
            yield lines


def show(id, answer, as_json):
    """Prints an answer."""
    if as_json:
        line = {**({"id": id} if id is not None else {}), "query": answer.query, "prompt": answer.prompt, "answer": answer.text}
        print(json.dumps(line, ensure_ascii=False, default=str), flush=True)
    else:
        print(f"query:  {answer.query}\nprompt: {answer.prompt}\nanswer: {answer.text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
