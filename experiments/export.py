"""Takes what a run has trained elsewhere: to PEFT, to transformers, to a model hub.

    python -m experiments.export --workdir runs/quickstart --to peft --out exported/quickstart
"""

import sys

from experiments import predict, run
from metatuner_jax import config as config_lib
from metatuner_jax import files

KINDS = ("peft", "merged", "prompts", "hub")
DTYPES = ("float32", "bfloat16", "float16")
USAGE = """usage: python -m experiments.export --workdir FOLDER --to KIND --out FOLDER [options] [--config.NAME=VALUE ...]

  --workdir FOLDER  of the run
  --to KIND         peft: a LoRA in PEFT's layout; merged: the actor with it merged, as a model of transformers with its tokenizer;
                    prompts: JSON Lines; hub: a folder to upload, with the mean adapter in PEFT's layout, what writes a prompt and an adapter for
                    each query, and a model card
  --out FOLDER      to write, which must not be there yet
  --query TEXT      the LoRA, or prompt, of this query (default: the mean LoRA; the prompts of the test queries)
  --input FILE      the prompts of its queries; --field NAME: where these stand (see experiments.predict)
  --part NAME       of a mixture, the part whose initial prompt the queries have
  --base NAME       the model that the LoRA is said to belong to (default: the run's own actor)
  --dtype NAME      of the merged weights: float32 (default), bfloat16 or float16
  --step N          another checkpoint than the best one
  --help            this text
"""
OPTIONS = ("--workdir", "--to", "--out", "--query", "--input", "--field", "--part", "--base", "--dtype", "--step")


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    return run.answered(argv, USAGE, lambda argv: print(export(argv)))


def export(argv) -> str:
    """Does what the command line says. Returns what was done."""
    options, assignments = run.read_arguments(argv, OPTIONS)
    run.need(options, "--workdir", "--to", "--out")
    kind, dtype, base, query = options["--to"], options.get("--dtype", "float32"), options.get("--base"), options.get("--query")
    config_lib.one_of("--to", kind, KINDS)
    config_lib.one_of("--dtype", dtype, DTYPES)
    for name, kinds in (("--dtype", ("merged",)), ("--base", ("peft", "hub")), ("--query", ("peft", "merged", "prompts")), ("--input", ("prompts",))):
        if name in options and kind not in kinds:
            raise run.Mistake(f"{name} is not for --to {kind}, but for {', '.join(kinds)}: leave it out")
    workdir, out, step = run.path_of(options, "--workdir"), run.path_of(options, "--out"), predict.step_of(options)
    read = predict.read(options, predict.field_of(options, workdir)) if {"--query", "--input"} & set(options) else None

    from metatuner_jax import export, tuner

    export.check_new(out)
    found = tuner.Tuner.load(workdir, step, dict(assignments))
    part, model = options.get("--part"), found.setup.actor
    which = "the mean LoRA" if query is None else "the query's LoRA"
    lora_of = lambda: found.mean_lora() if query is None else found.lora(query, part)
    if kind == "prompts":
        lines = prompts_of(found, read, part) if read else prompts_in(workdir)
        said = f"{len(lines)} prompts, {len({line['prompt'] for line in lines})} of them distinct"
        write = lambda folder: files.write_lines(folder / "prompts.jsonl", lines)
    elif kind == "hub":
        base = hub_id(found, base)
        if step is not None or not (workdir / "results.json").exists():
            raise run.Mistake(f"--to hub shows the run's results, which {workdir} must have: let it end, and give no --step")
        loras, said = export.whole_lora(found, lora_of()), f"the mean LoRA of {base}, what writes a prompt and a LoRA for each query, and README.md"
        write = lambda folder: export.write_hub(folder, found, workdir, base, loras)
    elif kind == "peft":
        base = export.base_of(found, base)
        loras, said = export.whole_lora(found, lora_of()), f"{which} of {base}"
        write = lambda folder: export.write_peft(folder, model, base, loras)
    else:
        loras, said = lora_of(), f"{found.setup.config.actor.model} with {which} merged, {dtype}"
        write = lambda folder: export.write_model(folder, model, export.merged(found, loras), found.tokens.tokenizer, dtype)
    with export.new_folder(out) as folder:
        write(folder)
    return f"{out} holds {said}"


def prompts_in(workdir) -> list[dict]:
    """Returns the prompts that the run wrote for its test queries."""
    lines = [{name: line[name] for name in ("id", "query", "prompt")} for line in files.read_lines(workdir / "predictions.jsonl")]
    if not lines:
        raise run.Mistake(f"--workdir={workdir} has no predictions.jsonl, which a run leaves when it has been evaluated: give --query or --input")
    return lines


def prompts_of(found, read, part) -> list[dict]:
    """Returns the prompts that are written for queries."""
    lines = []
    for items in read(found.setup.config.eval.batch_size):
        ids, queries = zip(*items)
        for id, query, prompt in zip(ids, queries, found.prompts(queries, part)):
            lines.append({**({"id": id} if id is not None else {}), "query": query, "prompt": prompt})
    return lines


def hub_id(found, base) -> str:
    """Returns the id on the hub of the model that a run's adapter belongs to."""
    from metatuner_jax import pretrained

    name = base or pretrained.hub_id(found.setup.config.actor.model)
    if name is None:
        raise run.Mistake(f"actor.model={found.setup.config.actor.model!r} is no id on the hub: say in --base, such as owner/name, which model it is")
    return name


if __name__ == "__main__":
    sys.exit(main())
