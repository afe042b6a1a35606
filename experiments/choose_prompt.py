"""Scores hand-written prompts on validation rows with the bare actor, to choose task.initial_prompt; test rows are not scored.

    python -m experiments.choose_prompt --config quickstart
"""

import sys

import numpy as np

from experiments import run

USAGE = """usage: python -m experiments.choose_prompt --config FILE [--prompts FILE] [--config.SECTION.NAME=VALUE ...]

Prints the strict and the flexible score of each candidate, the best first (ties by the likelihood of the reference answers).

  --config FILE   as experiments.run takes it; its PROMPTS are the candidates
  --prompts FILE  other candidates, one a line
  --help          this text; `python -m experiments.run --help` lists the settings
"""


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    return run.answered(argv, USAGE, choose)


def choose(argv) -> None:
    """Does what the command line says."""
    options, assignments = run.read_arguments(argv, ("--config", "--prompts"))
    path = run.config_path(options)
    config = run.load_config(path, assignments)
    if "--prompts" in options:
        candidates = read_prompts(run.path_of(options, "--prompts"))
    else:
        candidates = getattr(run.load_module(path)[0], "PROMPTS", ())
    if not candidates:
        raise run.Mistake(f"--config={path} has no PROMPTS: add the candidates there, or give --prompts FILE")
    for strict, flexible, likelihood, tokens, prompt in sorted(score(config, candidates), reverse=True):
        print(f"strict {100 * strict:5.1f}%  flexible {100 * flexible:5.1f}%  log-likelihood {likelihood:6.3f}  {tokens} tokens  {prompt}")


def read_prompts(path):
    """Returns the lines of a file that are not blank."""
    if not path.is_file():
        raise run.Mistake(f"--prompts={path} is no file: name one with a prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except ValueError as error:
        raise run.Mistake(f"--prompts={path} is not UTF-8 ({error}): save it as UTF-8") from None
    return [line for line in lines if line]


def score(config, candidates):
    """Returns (strict, flexible, mean log-likelihood of the answers, tokens, prompt) of each candidate on the validation rows."""
    from metatuner_jax import data, generator, memory, pretrained, sharding, transformer
    from metatuner_jax import job as job_lib
    from metatuner_jax.passes import Passes
    from metatuner_jax.progress import Progress

    job = job_lib.prepare(config)
    tokens, task = job.tokens, job.task
    limit = config.generator.max_prompt_tokens
    encoded = [tokens.prompt_ids(prompt) for prompt in candidates]
    for prompt, ids in zip(candidates, encoded):
        if len(ids) > limit:
            raise run.Mistake(f"generator.max_prompt_tokens={limit} is less than {prompt!r} needs ({len(ids)} with the end token): raise it")
    _, actor = pretrained.load(config.actor.model, job.setup.config.dtype, weights=config.weights)
    actor = transformer.cut_vocabulary(actor, job.setup.actor.vocab_size)
    frozen = sharding.place(generator.Frozen(None, actor, tokens.allowed), job.mesh)
    passes = Passes(job.setup, frozen, job.mesh, config.eval.batch_size, Progress(), job.tokens)
    part, found = job.rows["validation"], []
    for prompt, ids in zip(candidates, encoded):
        with memory.watched(config, lambda: "evaluation"):
            answered = passes.answer(part, np.arange(len(part)), *data.pad([ids] * len(part), limit, "right"), weigh=True)
        scores = [task.score(text, example) for text, example in zip(tokens.answers(answered.tokens, answered.mask), part.examples)]
        strict, flexible = (float(np.mean([getattr(s, kind) for s in scores])) for kind in ("strict", "flexible"))
        found.append((strict, flexible, float(answered.likelihood.mean()), len(ids) - 1, prompt))
    return found


if __name__ == "__main__":
    sys.exit(main())
