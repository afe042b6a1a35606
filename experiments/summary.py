"""From the run folders of a comparison to its figures: means, intervals over seeds, the standing to the best rival.

A comparison is a folder with `grid.json` (what was asked for) and, for each run, `<variant>-<seed>/{config.json,results.json}`;
`search/` holds the short runs that chose the learning rates. A variant is a method, or one value of a sweep.
"""

import statistics
from typing import Any

import numpy as np

from metatuner_jax import files
from metatuner_jax.methods import METHODS

ABLATIONS = {"prompt_only": "w/o F", "hyper_only": "w/o P", "unshared": "w/o S"}  # as the paper calls them
NUM_BOOTSTRAP = 5000


# --- statistics ---


def spread(scores) -> float | None:
    """Returns the standard deviation over seeds (n - 1), None for fewer than two."""
    return statistics.stdev(scores) if len(scores) > 1 else None


def bootstrap(parts, num: int = NUM_BOOTSTRAP) -> np.ndarray:
    """Returns `num` resampled means: each seed's queries are drawn anew with replacement, every seed is kept and weighs the same.

    So its spread is that of the queries; what another seed would change is told by the standard deviation over seeds.

    Args:
      parts: an array of per-query scores (or differences) for each seed.
    """
    rng = np.random.default_rng(0)
    resampled = [part[rng.integers(0, len(part), (num, len(part)))].mean(axis=1) for part in parts]
    return np.mean(resampled, axis=0)


def interval(parts) -> list[float]:
    """Returns the 95% interval of the mean over seeds, by the percentile bootstrap."""
    return [float(bound) for bound in np.percentile(bootstrap(parts), (2.5, 97.5))]


def against(ours: dict, rival: dict) -> dict | None:
    """Returns how `ours` stands to `rival` on the queries that both answered under the same seed, None where there are none.

    `difference` is ours minus the rival's mean, `ci95` its 95% interval, `not_above` the share of resamples in which it is 0 or
    less, `relative` the difference over the rival's mean (None where that is 0).

    Args:
      ours, rival: {seed: {query id: score}}.
    """
    ours_parts, rival_parts, seeds = [], [], []
    for seed in sorted({*ours} & {*rival}):
        common = sorted({*ours[seed]} & {*rival[seed]})
        if common:
            seeds.append(seed)
            ours_parts.append(np.array([ours[seed][id] for id in common], np.float64))
            rival_parts.append(np.array([rival[seed][id] for id in common], np.float64))
    if not seeds:
        return None
    parts = [a - b for a, b in zip(ours_parts, rival_parts)]
    difference, base = (float(np.mean([part.mean() for part in whole])) for whole in (parts, rival_parts))
    means = bootstrap(parts)
    return {
        "difference": difference,
        "ci95": [float(bound) for bound in np.percentile(means, (2.5, 97.5))],
        "not_above": float((means <= 0).mean()),
        "relative": difference / base if base else None,
        "seeds": seeds,
        "pairs": sum(len(part) for part in parts),
    }


# --- from folders to figures ---


def summarise(folder) -> dict:
    """Returns every figure of a comparison: the content of comparison.json."""
    grid = files.read_json(folder / "grid.json")
    runs: dict[str, dict[int, tuple]] = {name: {} for name in grid["variants"]}
    for name, seed in planned(grid):
        found = read_run(folder / f"{name}-{seed}")
        if found:
            runs[name][seed] = found
    scores = {name: scores_of(found) for name, found in runs.items()}
    variants = {name: over_seeds(found, scores[name]) for name, found in runs.items() if found}
    ranked = list(variants) if grid["sweep"] else sorted(variants, key=lambda name: -variants[name]["mean"])
    rivals = [] if grid["sweep"] else [name for name in ranked if not name.startswith("metatuner") and name not in ABLATIONS]
    best = rivals[0] if rivals else None
    for name in ranked:
        variants[name]["against"] = against(scores[name], scores[best]) if best and name != best else None
        ablations = [other for other in variants if other in ABLATIONS and name.startswith("metatuner")]
        variants[name]["ablations"] = {other: a for other in ablations if (a := against(scores[name], scores[other]))}
    everything = [content for found in runs.values() for content in found.values()]
    search = read_search(folder / "search")
    return {
        "grid": grid,
        "task": sorted({results["task"] for results, _ in everything}),
        "metric": sorted({results["metric"] for results, _ in everything}),
        "devices": sorted({f"{d['count']} x {d['kind']}" for _, saved in everything if (d := saved.get("devices"))}),
        "best_rival": best,
        "best_metatuner": next((name for name in ranked if name.startswith("metatuner")), None),
        "variants": {name: variants[name] for name in ranked},
        "not_run": [f"{name}-{seed}" for name, seed in planned(grid) if seed not in runs[name]],
        "search": {name: {rate: r["validation"]["mean"] for rate, r in rates.items()} for name, rates in search.items()},
        "at_edge": [name for name, rates in search.items() if at_edge(rates)],
        "wall_s": sum(r["wall_s"] for r, _ in everything) + sum(r["wall_s"] for rates in search.values() for r in rates.values()),
    }


def planned(grid):
    """Yields (variant, seed) in the order of the runs: a whole row of variants before the next seed."""
    for seed in grid["seeds"]:
        for name in grid["variants"]:
            yield name, seed


def read_run(folder):
    """Returns (results.json, config.json) of a finished run, None where there is none."""
    results = files.read_json(folder / "results.json")
    return None if results is None else (results, files.read_json(folder / "config.json") or {})


def read_search(folder) -> dict:
    """Returns {method: {rate: results}} of the search runs that ended, rates from low to high."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*-*/results.json"), key=lambda path: float(path.parent.name.split("-", 1)[1])):
        method, rate = path.parent.name.split("-", 1)
        found.setdefault(method, {})[rate] = files.read_json(path)
    return dict(sorted(found.items()))


def best_rate(rates: dict) -> str:
    """Returns the rate with the highest validation mean, of equals that with the likelier answers. `rates`: {rate: results}."""
    rank = lambda found: (found["mean"], found["log_likelihood"])
    return max(rates, key=lambda rate: (rank(rates[rate]["validation"]), -float(rate)))


def at_edge(rates: dict) -> bool:
    """Returns whether the best of several rates is the lowest or the highest that was tried: a better one may lie beyond it."""
    return len(rates) > 1 and best_rate(rates) in (min(rates, key=float), max(rates, key=float))


def scores_of(found) -> dict:
    """Returns {seed: {query id: score}} of the runs that keep their scores."""
    return {seed: results["scores"] for seed, (results, _) in found.items() if results.get("scores")}


def over_seeds(found, scores) -> dict:
    """Returns a variant's figures; None stands where no run has them."""
    all_results = [results for results, _ in found.values()]
    means = [results["after"]["mean"] for results in all_results]
    method = all_results[0]["method"]
    rates = {dig(saved, "config", "train", "learning_rate") for _, saved in found.values()}
    average = lambda *keys: average_of(all_results, *keys)
    parts = [np.array(list(one.values()), np.float64) for one in scores.values()]
    return {
        "method": method,
        "seeds": list(found),
        "n": sum(results["after"]["n"] for results in all_results),
        "learning_rate": rates.pop() if len(rates) == 1 and METHODS[method].learns else None,
        "before": average("before", "mean"),
        "mean": float(np.mean(means)),
        "sd": spread(means),
        "ci95": interval(parts) if len(parts) == len(found) else None,
        "adapter": {which: average("adapter", which, "mean") for which in ("own", "shuffled", "mean", "none")},
        "prompt": {which: average("prompt", which, "mean") for which in ("own", "shuffled", "initial")},
        "distinct": average("prompts", "distinct"),
        "share_initial": average("prompts", "share_initial"),
        "parts": {part: average("parts", part, "after", "mean") for r in all_results for part in r.get("parts") or {}},
        "trained_parameters": average("cost", "trained_parameters"),
        "actor_calls": average("cost", "actor_calls"),
        "tokens": average("cost", "tokens"),
        "seconds": average("cost", "seconds"),
        "wall_s": average("wall_s"),
    }


def dig(content, *keys):
    """Returns what stands under nested keys, None where one is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def average_of(contents, *keys):
    found = [value for content in contents if (value := dig(content, *keys)) is not None]
    return float(np.mean(found)) if found else None
