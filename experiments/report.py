"""Shows what runs did as a page of HTML that needs nothing else: one run, or several beside each other.

    python -m experiments.report runs/quickstart
    python -m experiments.report runs/a runs/b runs/c --out comparison.html
"""

import html
import itertools
import pathlib
import sys

from experiments import run as run_lib
from experiments import summary
from metatuner_jax import files, plots, report
from metatuner_jax import workdir as workdir_lib
from metatuner_jax.report import DASH, bounds, duration, number, percent

USAGE = """usage: python -m experiments.report RUN [RUN ...] [--out FILE]

Of one run, writes report.html and plots/ into its folder anew, as a run does at its end; of a run that has not ended, what there is so far. Of several
runs, writes one page that compares them: scores with intervals, settings in which they differ, learning curves, differences query by query where they
have the same test queries, controls, cost, and the queries on which they disagree. Folders with config.json and results.json alone will do, such as
results/quickstart.

  --out FILE   the page (default: report.html in the folder of the one run; comparison.html here for several). A file that is there is replaced if it
               is such a page, and left alone if it is anything else. Of one run, no plots/ are written with it
  --help       this text
"""
KIND = "comparison"


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    return run_lib.answered(argv, USAGE, make)


def make(argv) -> None:
    """Does what the command line says."""
    folders, options = parse(argv)
    out = run_lib.path_of(options, "--out") if "--out" in options else None
    if out is not None and not out.parent.is_dir():
        raise run_lib.Mistake(f"--out={out}: {out.parent} is no folder; name a file in one that is there")
    try:
        if len(folders) > 1:
            text, out, kind = compare({name: report.read(folder) for name, folder in named(folders).items()}), out or pathlib.Path("comparison.html"), KIND
        elif out is not None:
            text, kind = report.page(run := report.read(folders[0]), report.panels_of(run)), "run report"
        else:
            print(report.write(folders[0]))
            return
    except (KeyError, TypeError, AttributeError) as error:  # a file that somebody else wrote, or changed
        raise run_lib.Mistake(f"{', '.join(map(str, folders))}: the files are not what a run writes ({type(error).__name__}: {error}); name other folders") from None
    report.check_ours(out, kind)
    files.write_text(out, text)
    print(out)


def parse(argv) -> tuple[list[pathlib.Path], dict]:
    """Returns the folders and the options; raises Mistake where they cannot be meant."""
    words, folders, rest = list(argv), [], []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            folders.append(run_lib.path_of({"RUN": word}, "RUN"))
            continue
        rest.append(word)
        if word == "--out" and words:
            rest.append(words.pop(0))
    options, settings = run_lib.read_arguments(rest, ("--out",))
    if settings:
        raise run_lib.Mistake(f"--config.{settings[0][0]} is no setting of a report: leave it out")
    if not folders:
        raise run_lib.Mistake("no run is named: name the folder of one, such as runs/quickstart; see --help")
    same = next((a for a, b in itertools.combinations(folders, 2) if a.absolute() == b.absolute()), None)
    if same is not None:
        raise run_lib.Mistake(f"{same} is named twice: name it once")
    return folders, options


def named(folders) -> dict[str, pathlib.Path]:
    """Returns the folders by the ends of their paths, as long as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders))


# --- the page ---


def compare(runs: dict[str, report.Run]) -> str:
    """Returns the page that compares runs, by their names."""
    ended = {name: run for name, run in runs.items() if "after" in run.results}
    pairs = differences(ended)
    parts = {"scores": ("Scores", scores(runs, ended))}
    if pairs:
        parts["differences"] = ("Query by query", paired(pairs))
    parts["settings"] = ("Settings in which they differ", settings(runs))
    curves = learning(runs)
    if curves:
        parts["learning"] = ("Learning", curves)
    if ended:
        parts["controls"] = ("Does it depend on the query?", controls(ended))
    parts["cost"] = ("Cost", costs(runs))
    parts["queries"] = ("Where they disagree", disagreements(ended, pairs))
    title = f"{len(runs)} runs compared"
    body = report.header(title, ", ".join(runs), parts) + f"<main>{opening(ended, pairs)}{report.sections(parts)}</main>"
    return report.frame(KIND, title, body)


def differences(ended) -> list[tuple[str, str, dict | None]]:
    """Returns (name, other, how they stand) of each two runs on one test set: see `summary.against`; None where their scores are not kept."""
    found = []
    for (name, run), (other, rival) in itertools.combinations(ended.items(), 2):
        if same_rows(run, rival):
            a, b = run.results.get("scores"), rival.results.get("scores")
            found.append((name, other, summary.against({0: a}, {0: b}) if a and b and set(a) == set(b) else None))
    return found


def same_rows(run, other) -> bool:
    """Returns whether two runs have the same test rows: by the sums of these in config.json, or by the queries themselves."""
    sums = [(one.saved.get("data") or {}).get("test") for one in (run, other)]
    if None not in sums:
        return sums[0] == sums[1]
    texts = [{line["id"]: line["query"] for line in one.predictions} for one in (run, other)]
    return bool(texts[0]) and texts[0] == texts[1]


def opening(ended, pairs) -> str:
    """Returns which run scores highest and whether that is more than chance, as HTML."""
    if not ended:
        return '<p class="lead">None of these runs has test scores yet.</p>'
    ranked = sorted(ended, key=lambda name: -ended[name].results["after"]["mean"])
    best, top = ranked[0], ended[ranked[0]].results["after"]
    alike = [html.escape(name) for name in ranked if ended[name].results["after"]["mean"] == top["mean"]]
    who = f"{', '.join(alike[:-1])} and {alike[-1]} score alike, and highest" if len(alike) > 1 else f"{alike[0]} scores highest"
    text = f'<p class="lead">{who}: <b>{percent(top["mean"])}%</b> {bounds(top["ci95"])}.</p>'
    for other in ranked[len(alike) : len(alike) + 1]:
        after = ended[other].results["after"]
        verdict, words = report.standing(top, after, standing_of(pairs, best, other))
        text += f"<p>Next is {html.escape(other)} with {report.scored(after)}: {SAYS[verdict]}; {html.escape(words.format(best))}.</p>"
    if len({run.config["task"]["name"] for run in ended.values()}) > 1:
        text += "<p><b>Their tasks differ</b>, so their scores are of different things.</p>"
    elif len(pairs) < len(ended) * (len(ended) - 1) // 2:
        text += "<p>Not all of them were tested on the same queries: where they were not, or that is not known, only their intervals can be compared.</p>"
    return text


SAYS = {"above": "the difference is more than chance", "below": "the difference is more than chance", "same": "they cannot be told apart", "open": "they cannot be told apart by this"}


def standing_of(pairs, name, other) -> dict | None:
    """Returns {mean, ci95} of one run's score minus another's, query by query; None where that is not known."""
    for a, b, found in pairs:
        if {a, b} == {name, other} and found:
            sign = 1 if a == name else -1
            return {"mean": sign * found["difference"], "ci95": sorted(sign * bound for bound in found["ci95"])}
    return None


def colours(names) -> dict[str, str]:
    return dict(zip(names, itertools.cycle(plots.SERIES)))


def scores(runs, ended) -> str:
    kinds = colours(runs)
    panels = [plots.bars(
        "After training", f"Share of the unseen test queries that each run answers rightly. {report.INTERVAL}.",
        [(report.short(name, 26), run.results["after"], kinds[name]) for name, run in ended.items()],
    )] if ended else []  # fmt: skip
    rows = []
    for name, run in runs.items():
        shown = [run.results.get(key) for key in ("before", "after", "after_flexible")]
        found = [f"{percent(score['mean'])}%" if score else DASH for score in shown]
        ci95, n = (bounds(shown[1]["ci95"]), number(shown[1]["n"])) if shown[1] else (DASH, DASH)
        validation = run.results.get("validation")
        rows.append([name, run.config["method"], str(run.config["seed"]), found[0], found[1], ci95, n, found[2], f"{percent(validation['mean'])}%" if validation else DASH])
    head = ["run", "method", "seed", "before", "after", "95% interval", "queries", "after, flexible", "validation"]
    return f'<div class="plots">{"".join(report.figure(panel, "scores") for panel in panels)}</div>{report.rows_table(head, rows)}'


def paired(pairs) -> str:
    rows = []
    for name, other, found in pairs:
        told = [f"{percent(found['difference'], '+')}", bounds(found["ci95"]), number(found["pairs"])] if found else [DASH, DASH, "scores not kept"]
        rows.append([f"{name} minus {other}", *told])
    note = "The first run’s score minus the second’s on the same test queries, in points. The interval resamples the queries; where it holds 0, the difference may be chance. What another seed would change is not in it."
    return f'<p class="soft">{note}</p>{report.rows_table(["", "difference", "95% interval", "queries"], rows)}'


def settings(runs) -> str:
    configs = [run.config for run in runs.values()]
    keys = sorted({key for config in configs[1:] for key, _, _ in workdir_lib.differences(configs[0], config)})
    if not keys:
        return "<p>None: they have the same settings.</p>"
    rows = [[key, *(report.setting(leaf(config, key)) for config in configs)] for key in keys]
    return report.rows_table(["setting", *runs], rows, "settings")


def leaf(config, key):
    """Returns a setting by its dotted name, 'missing' where there is none."""
    for part in key.split("."):
        config = config.get(part, "missing") if isinstance(config, dict) else "missing"
    return config


def learning(runs) -> str:
    """Returns the learning curves of all runs over each other."""
    drawn = {
        "loss": ("Loss on train queries", "The whole loss, as each run weighs its terms: see where the settings differ before comparing its height.", {"smooth": True}, False),
        "task_loss": ("Task loss", "Cross-entropy of the answers in nats per token, lower is better.", {"smooth": True}, False),
        "validation": ("Score on validation queries", "Share of the validation queries that are answered rightly at each checkpoint.", {}, True),
        "delta_norm": ("Size of the adapter", "The norm of what the adapter adds to the weights, over all layers and projections.", {"smooth": True}, False),
        "delta_variance": ("What differs between queries’ adapters", "Near 0%, all queries get one adapter.", {"smooth": True}, True),
        "expert_score": ("Score of expert prompts", "The mean score of the best prompts found for train queries so far.", {"steps": True}, True),
    }  # fmt: skip
    until = max((line["step"] for run in runs.values() for line in run.metrics[-1:]), default=0) + 1
    found = []
    for name, (title, note, style, share) in drawn.items():
        curves = {run: report.validations(one.metrics) if name == "validation" else report.points(one.metrics, name) for run, one in runs.items()}
        shown = [run for run, (steps, _) in curves.items() if steps]
        if len(shown) == 1 < len(runs):
            note += f" Of {shown[0]} alone: the others left none."
        if any(any(y) for _, y in curves.values()):
            panel = plots.lines(title, note, [plots.Line(run, x, y, **style) for run, (x, y) in curves.items()], until=until, percent=share)
            found.append(report.figure(panel, f"curve-{name}"))
    return f'<div class="plots">{"".join(found)}</div>' if found else ""


def controls(ended) -> str:
    """Returns the scores with other adapters and prompts than a query's own."""
    found, kinds = [], colours(ended)
    for kind, which in (("adapter", ("own", "shuffled", "mean", "none")), ("prompt", ("own", "shuffled", "initial"))):
        rows = [(f"{report.short(name, 20)}, {one}", run.results[kind][one], kinds[name] if one == "own" else "grey") for name, run in ended.items() for one in which]
        table = [[name, *(report.scored(run.results[kind][one]) for one in which)] for name, run in ended.items()]
        note = f"The {kind} that belongs to each query, and others in its place. {report.INTERVAL}."
        found.append(report.figure(plots.bars(f"The {kind} exchanged", note, rows), kind, report.rows_table(["", *which], table)))
    used = []
    for name, run in ended.items():
        prompts = run.results["prompts"]
        used.append([name, number(prompts["distinct"]), number(run.results["after"]["n"]), f"{percent(prompts['share_initial'])}%", f"{prompts['mean_tokens']:.1f}"])
    said = "".join(f"<details><summary>What the controls of {html.escape(name)} say</summary><ul class=found>{''.join(f'<li>{text}</li>' for text in report.findings(run))}</ul></details>" for name, run in ended.items())
    return f'<div class="plots">{"".join(found)}</div>{report.rows_table(["prompts", "different", "queries", "initial", "tokens on average"], used)}{said}'


def costs(runs) -> str:
    rows = []
    for name, run in runs.items():
        spent, devices = run.results.get("cost") or {}, run.saved.get("devices") or {}
        counts = [number(spent.get(key)) for key in ("trained_parameters", "actor_calls", "tokens")]
        times = [duration(run.results.get(key)) for key in ("train_s", "rollout_s", "wall_s")]
        rows.append([name, *counts, *times, f"{devices['count']} x {devices['kind']}" if devices else DASH])
    return report.rows_table(["", "parameters that learn", "answers decoded in training", "tokens in training", "training", "rollouts", "whole run", "device"], rows)


def disagreements(ended, pairs) -> str:
    """Returns the table of the test queries that not all runs answer rightly or wrongly alike, of the runs with the first one's test rows."""
    with_answers = {name: run for name, run in ended.items() if run.predictions}
    first = next(iter(with_answers), None)
    alike = [name for name in with_answers if name == first or any({a, b} == {first, name} for a, b, _ in pairs)]
    if len(alike) < 2:
        return "<p>No two of these folders hold answers to the same test queries (predictions.jsonl).</p>"
    lines = {name: {line["id"]: line for line in with_answers[name].predictions} for name in alike}
    same = report.common_start([line["query"] for line in lines[first].values()])
    rows, counts, total = [], dict.fromkeys(alike, 0), len(lines[first])
    for id, line in lines[first].items():
        answers = {name: lines[name][id] for name in alike if id in lines[name]}
        given = [answer["score"] for answer in answers.values()]
        if len(set(given)) < 2:
            continue
        alone = [name for name, answer in answers.items() if answer["score"] == max(given)]
        kinds = [f"best-{alike.index(name)}" for name in alone] if len(alone) == 1 else []
        for name in alone[:1] if len(alone) == 1 else ():
            counts[name] += 1
        query = report.text_of(line["query"], same) + f'<p class="long"><small>Reference: {html.escape(str(line["reference"]))}</small></p>'
        rows.append(report.query_row(id, kinds, sum(given) / len(given), [("Query", query), *((name, answer_of(answer)) for name, answer in answers.items())]))
    if not rows:
        return f"<p>On all {total:,} test queries {html.escape(', '.join(alike))} have the same score.</p>"
    buttons = {f"{report.short(name, 24)} alone is best": (f"best-{i}", counts[name]) for i, name in enumerate(alike)}
    left = [name for name in ended if name not in alike]
    note = f"{len(rows):,} of {total:,} test queries on which the scores of {', '.join(alike)} differ." + (f" {', '.join(left)} left no answers to these queries." if left else "")
    return f'<p class="soft">{html.escape(note)}</p>{report.query_table(["", "Query", *alike], rows, buttons)}'


def answer_of(line) -> str:
    """Returns an answer with its score and the prompt that it was given under."""
    word, colour = report.verdict_of(line["score"])
    return f'<p><span class="{colour}">{word}</span></p>{report.text_of(line["answer"])}<p class="again"><small>Prompt: {html.escape(line["prompt"])}</small></p>'


if __name__ == "__main__":
    sys.exit(main())
