"""What a comparison says: its tables, its plot, and RESULTS.md out of the committed results."""

import re

from experiments import run
from experiments import summary as summary_lib
from metatuner_jax import config as config_lib
from metatuner_jax.report import DASH, bounds, duration, number, percent

GOAL = 0.10  # of relative gain over the best rival

# --- text ---


def rate(v) -> str:
    return DASH if v["learning_rate"] is None else f"{v['learning_rate']:g}"


def markdown(header, rows) -> str:
    """Returns a table; the first column is text, the others figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_table(summary) -> str:
    best = summary["best_rival"]
    header = [
        "value" if summary["grid"]["sweep"] else "method",
        "seeds",
        "learning rate",
        "before",
        "after",
        "sd over seeds",
        "95% interval",
    ]
    if best:
        header += [f"relative to {best}, %", "difference", "its 95% interval", "share ≤ 0"]
    rows = []
    for name, v in summary["variants"].items():
        cells = [f"**{name}**" if name.startswith("metatuner") else name, _join(v["seeds"]), rate(v)]
        cells += [percent(v["before"]), percent(v["mean"]), percent(v["sd"]), bounds(v["ci95"])]
        if best:
            a = v["against"] or {}
            share = DASH if not a else f"{a['not_above']:.3f}"
            cells += [percent(a.get("relative"), "+"), percent(a.get("difference"), "+"), bounds(a.get("ci95")), share]
        rows.append(cells)
    return markdown(header, rows)


def cost_table(summary) -> str:
    header = [
        "cost of a run",
        "parameters that learn",
        "answers decoded in training",
        "tokens in training",
        "training",
        "whole run",
    ]
    rows = []
    for name, v in summary["variants"].items():
        counts = [number(v[key]) for key in ("trained_parameters", "actor_calls", "tokens")]
        rows.append([name, *counts, duration(v["seconds"]), duration(v["wall_s"])])
    return markdown(header, rows)


def control_table(summary) -> str:
    """Returns the controls of the methods that write prompts or adapters for each query, empty text where there are none."""
    rows = []
    for name, v in summary["variants"].items():
        scores = [*v["adapter"].values(), *v["prompt"].values()]
        own = v["method"].startswith("metatuner") or v["method"] in summary_lib.ABLATIONS
        if own and any(score is not None for score in scores):
            distinct = DASH if v["distinct"] is None else f"{v['distinct']:.0f} of {v['n'] / len(v['seeds']):.0f}"
            rows.append([name, *map(percent, scores), distinct, percent(v["share_initial"])])
    header = [
        "controls",
        "adapter: own",
        "shuffled",
        "mean",
        "none",
        "prompt: own",
        "shuffled",
        "initial",
        "distinct prompts",
        "initial, %",
    ]
    return markdown(header, rows) if rows else ""


def part_table(summary) -> str:
    """Returns the scores on the parts of a mixture of tasks, empty text for a single task."""
    parts = list(dict.fromkeys(part for v in summary["variants"].values() for part in v["parts"]))
    rows = [[name, *(percent(v["parts"].get(part)) for part in parts)] for name, v in summary["variants"].items()]
    return markdown(["after, on", *parts], rows) if parts else ""


def search_table(summary) -> str:
    """Returns the validation scores behind the learning rates and whose search was too narrow, empty text where none was searched."""
    rates = sorted({rate for found in summary["search"].values() for rate in found}, key=float)
    rows = [[name, *(percent(found.get(rate)) for rate in rates)] for name, found in summary["search"].items()]
    if not rows:
        return ""
    text = markdown(["learning rate, score on validation rows", *rates], rows)
    if summary["at_edge"]:
        text += f"\n\nBest at the lowest or the highest rate that was tried, so that one beyond it may be better: {', '.join(summary['at_edge'])}."
    return text


def tables(summary) -> str:
    """Returns all tables of a comparison, the first with the scores."""
    made = (score_table, part_table, control_table, cost_table, search_table)
    return "\n\n".join(text for make in made if (text := make(summary)))


def verdicts(summary) -> str:
    """Returns a line for each MetaTuner: where it stands to the best rival and to its ablations, and what its controls say."""
    names = [name for name in summary["variants"] if name.startswith("metatuner")]
    return "\n".join(
        f"- {standing(summary, name)}{parts_played(summary['variants'][name])}{controls(summary['variants'][name])}"
        for name in names
    )


def standing(summary, name) -> str:
    """Returns whether a method beats the best rival, in a sentence."""
    v, best = summary["variants"][name], summary["best_rival"]
    a = v["against"]
    if best is None:
        return f"**{name}**: {percent(v['mean'])}%; no rival has been run."
    if a is None:
        rival = percent(summary["variants"][best]["mean"])
        return f"**{name}**: {percent(v['mean'])}%, the best rival, {best}: {rival}%; they have no scored query in common."
    low, high = a["ci95"]
    verb = "beats" if low > 0 else "loses to" if high < 0 else "cannot be told from"
    text = f"**{name} {verb} {best}**, the best rival: {percent(a['difference'], '+')} points {bounds(a['ci95'])}"
    if a["relative"] is not None:
        text += f", {percent(a['relative'], '+')}% relative"
        if low > 0:
            text += f", {'not less' if a['relative'] >= GOAL else 'less'} than the {GOAL:.0%} that it aims at"
    return text + "."


def parts_played(v) -> str:
    """Returns how a method stands to its ablations, in a sentence; empty text where none was run."""
    found = [
        f"{other} ({summary_lib.ABLATIONS[other]}) {percent(a['difference'], '+')} points {bounds(a['ci95'])}"
        for other, a in v["ablations"].items()
    ]
    return f" Against its ablations: {', '.join(found)}." if found else ""


def controls(v) -> str:
    """Returns what other adapters and prompts than a query's own cost, in a sentence; empty text where that was not scored."""
    if v["adapter"]["own"] is None or v["prompt"]["own"] is None:
        return ""

    def cost(kind, which):
        score = v[kind][which]
        return percent(None if score is None else v[kind]["own"] - score)

    return (
        f" Another query's adapter in place of its own costs {cost('adapter', 'shuffled')} points, the mean one "
        f"{cost('adapter', 'mean')}, none {cost('adapter', 'none')}; another query's prompt {cost('prompt', 'shuffled')}, "
        f"the initial one {cost('prompt', 'initial')}."
    )


def figures(summary) -> dict:
    """Returns the text of every placeholder that notes may hold, such as metatuner_j.after."""
    found = {"goal": f"{GOAL:.0%}", "time": duration(summary["wall_s"])}
    for name, v in summary["variants"].items():
        a = v["against"] or {}
        values = {
            "before": percent(v["before"]) + "%",
            "after": percent(v["mean"]) + "%",
            "sd": percent(v["sd"]),
            "interval": bounds(v["ci95"]),
            "seeds": str(len(v["seeds"])),
            "relative": percent(a.get("relative"), "+") + "%",
            "difference": percent(a.get("difference"), "+"),
            "difference_interval": bounds(a.get("ci95")),
            **{f"over.{other}": percent(one["difference"], "+") for other, one in v["ablations"].items()},
            **{f"over.{other}_interval": bounds(one["ci95"]) for other, one in v["ablations"].items()},
            "distinct": number(v["distinct"]),
            "share_initial": percent(v["share_initial"]) + "%",
            "parameters": number(v["trained_parameters"]),
            "actor_calls": number(v["actor_calls"]),
            "tokens": number(v["tokens"]),
            "training": duration(v["seconds"]),
            "time": duration(v["wall_s"]),
            "rate": rate(v),
            **{f"{kind}.{which}": percent(score) + "%" for kind in ("adapter", "prompt") for which, score in v[kind].items()},
            **{f"part.{part}": percent(score) + "%" for part, score in v["parts"].items()},
        }
        roles = [role for role in ("best_rival", "best_metatuner") if summary[role] == name]
        for alias in (name, *roles):
            found |= {f"{alias}.{key}": text for key, text in values.items()} | ({alias: name} if alias in roles else {})
    return found


def fill(text, summary, where) -> str:
    """Returns the notes with their placeholders filled in.

    Raises:
      Mistake: a placeholder is unknown, or a percentage is typed by hand.
    """
    found = figures(summary)
    typed = re.search(r"\d[\d.,]*\s*(%|percent\b)", text.replace("95% interval", ""))
    if typed:
        raise run.Mistake(f"{where}: {typed[0]!r} is typed by hand: write a placeholder such as {{metatuner_j.after}} in its place")

    def value(match):
        if match[1] not in found:
            raise run.Mistake(f"{where}: placeholder {match[0]} is unknown{config_lib.nearest(match[1], found)}")
        return found[match[1]]

    return re.sub(r"\{([^{}\s]+)\}", value, text).strip()


# --- RESULTS.md ---

HEAD = """# Results

Written by `python -m experiments.compare --report` from the `config.json` and `results.json` of each run in `{results}/`; tables
hold nothing else, and the percentages of the notes come from there too. Scores are strict, in percent, on unseen test queries. *before* is the bare model with the hand-written
prompt. The 95% interval resamples the queries of each seed and keeps the seeds, so it does not hold what another seed would change:
*sd over seeds* tells that. The best rival is the method with the highest mean on these same test rows that is neither MetaTuner nor
one of its ablations (prompt_only, hyper_only, unshared: the paper's w/o F, w/o P, w/o S). The comparison with it is a paired
bootstrap over the queries that both answered under one seed; *share ≤ 0* is the share of resamples without a gain. A control of
what a method does not have, such as the adapters of prompt_only, shows its score unchanged.
"""


def write(results) -> str:
    """Returns RESULTS.md for a folder of results."""
    folders = [path for path in sorted(results.iterdir()) if path.is_dir()]
    comparisons = {path.name: (path, summary_lib.summarise(path)) for path in folders if (path / "grid.json").exists()}
    singles = {path.name: found for path in folders if path.name not in comparisons and (found := summary_lib.read_run(path))}
    text = [HEAD.format(results=results.name)]
    if any(summary["best_metatuner"] and summary["best_rival"] for _, summary in comparisons.values()):
        text.append(overview(comparisons))
    text += [section(path, summary) for path, summary in comparisons.values()]
    if not comparisons:
        text.append("No comparison of methods has been run yet.\n")
    if singles:
        text.append(f"## Single runs\n\nOne run, one seed: what it took and gave, no comparison.\n\n{single_table(singles)}\n")
    return "\n".join(text)


def overview(comparisons) -> str:
    rows = []
    for name, (_, summary) in comparisons.items():
        ours, best = summary["best_metatuner"], summary["best_rival"]
        if ours and best:
            v, a = summary["variants"][ours], summary["variants"][ours]["against"] or {}
            rival = summary["variants"][best]
            row = [
                f"[{name}](#{name})",
                f"{ours} {percent(v['mean'])}",
                f"{best} {percent(rival['mean'])}",
                percent(a.get("difference"), "+"),
            ]
            rows.append([*row, bounds(a.get("ci95")), percent(a.get("relative"), "+")])
    return markdown(["comparison", "best MetaTuner", "best rival", "difference", "its 95% interval", "relative, %"], rows) + "\n"


def section(path, summary) -> str:
    """Returns a comparison's section."""
    grid, notes = summary["grid"], path / "notes.md"
    where = "; ".join([*grid["machines"], *summary["devices"]])
    missing = ", ".join(summary["not_run"])
    parts = [
        f"## {path.name}",
        f"    {grid['command']}",
        f"{_join(summary['task'])}, {_join(summary['metric'])}. {where}; {duration(summary['wall_s'])} in all.",
        verdicts(summary),
        fill(notes.read_text(encoding="utf-8"), summary, notes) if notes.exists() else "",
        tables(summary),
        f"![Scores and costs]({path.parent.name}/{path.name}/comparison.png)" if (path / "comparison.png").exists() else "",
        f"**Not run**: {missing}." if missing else "All runs of the grid were done.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def single_table(singles) -> str:
    """Returns the table of runs that belong to no comparison."""
    controls = (("adapter", "shuffled"), ("adapter", "mean"), ("adapter", "none"), ("prompt", "shuffled"), ("prompt", "initial"))
    rows = []
    for name, (results, saved) in singles.items():
        scores = [percent(summary_lib.dig(results, *keys, "mean")) for keys in (("before",), ("after",), *controls)]
        scores.insert(2, bounds(summary_lib.dig(results, "after", "ci95")))
        distinct = summary_lib.dig(results, "prompts", "distinct")
        prompts = DASH if distinct is None else f"{distinct} of {results['after']['n']}"
        device = saved.get("devices") or {"count": DASH, "kind": DASH}
        what = f"{results['task']}, {results['method']}, seed {results['seed']}"
        rows.append([f"`{name}`", what, *scores, prompts, duration(results["wall_s"]), f"{device['count']} x {device['kind']}"])
    header = ["run", "what", "before", "after", "95% interval", *(f"{kind}: {which}" for kind, which in controls)]
    return markdown([*header, "distinct prompts", "time", "device"], rows)


def _join(values):
    return ", ".join(map(str, values))


# --- the plot ---

COLOURS = {"MetaTuner": "#c8501e", "ablation": "#9a9a9a", "rival": "#2f6690"}


def draw(summary, path) -> None:
    """Writes the plot: each variant's score with its interval, the best on top, beside what a run of it costs."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    variants = summary["variants"]
    names, values = list(variants), list(variants.values())
    kinds = ["MetaTuner" if n.startswith("metatuner") else "ablation" if n in summary_lib.ABLATIONS else "rival" for n in names]
    if summary["grid"]["sweep"]:
        kinds = ["MetaTuner"] * len(names)
    colours, rows = [COLOURS[kind] for kind in kinds], range(len(names))
    figure = Figure(figsize=(12, 1.6 + 0.42 * max(len(names), 3)), layout="constrained")
    FigureCanvasAgg(figure)
    score, time, calls = figure.subplots(1, 3, sharey=True, width_ratios=(2.2, 1, 1))
    for row, v, colour in zip(rows, values, colours):
        low, high = v["ci95"] or (v["mean"], v["mean"])
        score.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt", alpha=0.55)
        score.plot(100 * v["mean"], row, "o", color=colour, markersize=7)
        score.annotate(percent(v["mean"]), (100 * high, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
    for axes, key, text, title in (
        (time, "wall_s", duration, "time of a run, minutes"),
        (calls, "actor_calls", number, "answers decoded in training"),
    ):
        widths = [(v[key] or 0) / (60 if key == "wall_s" else 1) for v in values]
        bars = axes.barh(rows, widths, color=colours, alpha=0.8, height=0.6)
        axes.bar_label(bars, [text(v[key]) for v in values], padding=4, fontsize=9)
        axes.set_xlim(0, 1.45 * max([*widths, 1e-9]))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.set_title(title, fontsize=10)
    lowest = min(100 * (v["ci95"] or [v["mean"]])[0] for v in values)
    highest = max(100 * (v["ci95"] or [v["mean"]])[-1] for v in values)
    margin = 0.04 * (highest - lowest) + 0.5
    score.set_xlim(lowest - margin, highest + 4 * margin)
    score.set_xticks([tick for tick in score.get_xticks() if lowest - margin <= tick <= 100])
    score.set_title("score on unseen queries, %, with 95% interval", fontsize=10)
    score.set_yticks(rows, names)
    score.set_ylim(len(names) - 0.4, -0.6)
    for axes in (score, time, calls):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for kind, colour in COLOURS.items():
        if kind in kinds:
            score.plot([], [], "o", color=colour, label=kind)
    if len(set(kinds)) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    task = _join(summary["task"])
    seeds = sorted({seed for v in values for seed in v["seeds"]})
    figure.suptitle(f"{task}; seed{'s' * (len(seeds) > 1)} {_join(seeds)}", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})
