"""The report of a run: one page of HTML that needs nothing else, and its plots as PNG."""

import dataclasses
import html
import importlib.resources
import json
import os.path
import pathlib
import re
from typing import Any

from metatuner_jax import config as config_lib
from metatuner_jax import files, methods, plots
from metatuner_jax import workdir as workdir_lib

DASH = "–"
PHASES = {"actor": "warm-up: actor", "generator": "warm-up: generator", "joint": "joint phase"}
INTERVAL = "The thick line is the 95% interval, by resampling the queries"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds so far."""

    folder: pathlib.Path
    saved: dict  # config.json
    results: dict  # results.json, empty where the run has not ended
    metrics: list
    attempts: list
    predictions: list
    before: dict  # query id -> line of before.jsonl

    @property
    def config(self) -> dict:
        return workdir_lib.with_newer_settings(self.saved["config"])

    @property
    def method(self) -> methods.Method:
        return methods.METHODS[self.config["method"]]


def read(folder) -> Run:
    """Returns the run in a folder; raises ValueError where there is none of ours, or a file cannot be read."""
    folder = pathlib.Path(folder)
    saved = files.read_json(folder / "config.json")
    if saved is None or not workdir_lib.is_ours(saved) or saved["config"].get("method") not in methods.METHODS:
        raise ValueError(f"{folder} holds no run: name the folder of one, such as runs/quickstart")
    results = files.read_json(folder / "results.json")
    if not isinstance(results or {}, dict):
        raise ValueError(f"{folder}/results.json is not what a run writes: name another folder")
    found = {}
    for name in ("metrics", "experts", "predictions", "before"):
        path = folder / f"{name}.jsonl"
        try:
            found[name] = files.lines_of(path)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}): mend it, or take it out") from None
        if not all(isinstance(line, dict) for line in found[name]):
            raise ValueError(f"{path} is not what a run writes: a line is no object; mend it, or take it out")
    if results and "after" in results and found["predictions"] and len(found["predictions"]) != results["after"]["n"]:
        found["predictions"] = []  # of a run that goes on: not yet those of these results
    before = {line["id"]: line for line in found["before"]}
    return Run(folder, saved, results or {}, found["metrics"], found["experts"], found["predictions"], before)


def write(folder) -> pathlib.Path:
    """Writes report.html and plots/ into a run folder, and returns the page's path.

    Raises:
      ValueError: there is no run of ours, or report.html is another one's.
      OSError: they cannot be written.
    """
    run, path = read(folder), pathlib.Path(folder) / "report.html"
    check_ours(path, "run report")
    groups = panels_of(run)
    files.write_text(path, page(run, groups))
    (path.parent / "plots").mkdir(exist_ok=True)
    for name, panels in groups.items():
        plots.png(panels, path.parent / "plots" / f"{name}.png")
    return path


def check_ours(path, kind: str) -> None:
    """Raises ValueError where a file is there that no report of the kind may take the place of."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if f'content="metatuner_jax {kind}"' not in file.read(2000):
                raise ValueError(f"{path} is there already and is no {kind} of ours: move it, or name another file")


# --- figures, as people read them ---


def percent(share, sign="") -> str:
    """Returns a share in percent with one decimal, without the sign `%`."""
    return DASH if share is None else f"{round(100 * share, 1) + 0.0:{sign}.1f}"  # + 0.0: no "-0.0"


def bounds(ci95) -> str:
    return DASH if ci95 is None else f"[{percent(ci95[0])}, {percent(ci95[1])}]"


def number(value) -> str:
    """Returns a count for people: 1,234 or 12.3 million."""
    if value is None:
        return DASH
    return f"{value / 1e6:,.1f} million" if value >= 1e6 else f"{value:,.0f}"


def duration(seconds) -> str:
    if seconds is None:
        return DASH
    minutes = round(seconds / 60)
    return (
        f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def scored(score) -> str:
    return f"{percent(score['mean'])}% {bounds(score['ci95'])}"


# --- plots ---


def panels_of(run: Run) -> dict[str, list[plots.Panel]]:
    """Returns the panels of each plot by its name, of which those are left out that the run has nothing for."""
    results, found = run.results, {}
    if "after" in results:
        found["before_after"] = before_after(results)
        found["adapters"] = control_panels(results, run.method)
    found |= {"learning": learning(run), "experts": experts(run), "deltas": deltas(results)}
    return {name: panels for name, panels in found.items() if panels}


def before_after(results) -> list[plots.Panel]:
    rows = [(name.replace("_", ", "), results[name], "grey" if name.startswith("before") else "blue") for name in ("before", "after", "before_flexible", "after_flexible")]
    note = f"Share of {results['after']['n']:,} unseen test queries that are answered rightly. {INTERVAL}. Flexible scoring forgives the form of an answer: by what it adds before, training has taught format alone."
    found = [plots.bars("Before and after", note, rows)]
    if results.get("parts"):
        rows = [(f"{short(part, 24)}, {when}", scores[when], {"before": "grey", "after": "blue"}[when]) for part, scores in results["parts"].items() for when in ("before", "after")]
        found.append(plots.bars("Before and after, by task", f"The tasks of the mixture, each on its own queries. {INTERVAL}.", rows))
    return found


def control_panels(results, method) -> list[plots.Panel]:
    what = {"generated": "the LoRA that was written for it", "static": "the one LoRA that all queries share", None: "none, as the method has no adapter"}[method.adapter]
    note = f"Each query keeps its prompt, and its adapter is exchanged. Own: {what}; shuffled: another query's; mean: one for all queries; none: the bare model. {INTERVAL}."
    adapters = plots.bars("The adapter exchanged", note, [(name, score, "teal" if name == "own" else "grey") for name, score in results["adapter"].items()])
    what = {"written": "the prompt that was written for it", "searched": "the one prompt that was found for all", "initial": "the initial one, as the method writes none"}[method.prompt]
    note = f"Each query keeps its adapter, and its prompt is exchanged. Own: {what}; shuffled: another query's; initial: the hand-written one. {INTERVAL}."
    return [adapters, plots.bars("The prompt exchanged", note, [(name, score, "purple" if name == "own" else "grey") for name, score in results["prompt"].items()])]


def points(metrics, name) -> tuple[list, list]:
    """Returns the steps that have a number of this name, and the numbers."""
    found = [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def validations(metrics) -> tuple[list, list]:
    found = [(line["step"] + 1, line["validation"]["mean"]) for line in metrics if line.get("validation")]
    return [step for step, _ in found], [mean for _, mean in found]


def phase_marks(metrics) -> list[tuple[int, str]]:
    """Returns where each phase begins and what it is, none where there is only one."""
    first: dict[str | None, int] = {}
    for line in metrics:
        first.setdefault(line.get("phase"), line["step"])
    marks = [(first[phase], text) for phase, text in PHASES.items() if phase in first]
    return marks if len(marks) > 1 else []


def learning(run: Run) -> list[plots.Panel]:
    metrics, marks = run.metrics, phase_marks(run.metrics)
    axis: dict[str, Any] = {"marks": marks, "until": metrics[-1]["step"] + 1 if metrics else None}
    smooth = "Thin: each logged step; thick: the mean over its neighbours." if len(metrics) > 20 else ""
    terms = {"loss": "whole loss", "task_loss": "task: the answers", "prompt_loss": "prompts: the experts"}
    terms = {name: text for name, text in terms.items() if name == "loss" or run.method.prompt == "written"}
    found = [plots.lines(
        "Loss on train queries", f"Cross-entropy in nats per token, lower is better. {smooth}",
        [plots.Line(text, *points(metrics, name), smooth=True) for name, text in terms.items()], **axis,
    )]  # fmt: skip
    steps, means = validations(metrics)
    if steps:
        rows = next(line["validation"].get("n") for line in metrics if line.get("validation"))
        taken = f" The checkpoint of step {run.results['checkpoint']} was evaluated." if run.results.get("checkpoint") else ""
        note = f"Share of {rows} validation queries that are answered rightly at each checkpoint.{taken}"
        found.append(plots.lines("Score on validation queries", note, [plots.Line("score", steps, means)], **axis, percent=True))
    if any(points(metrics, "delta_norm")[1]):
        note = "The norm of what the adapter adds to the weights, over all layers and projections."
        found.append(plots.lines("Size of the adapter", f"{note} {smooth}", [plots.Line("norm of the delta", *points(metrics, "delta_norm"), smooth=True)], **axis))
    if points(metrics, "delta_variance")[0]:
        note = f"How much of the deltas' squared norm differs between the first queries of a batch: near 0%, all queries get one adapter. {smooth}"
        found.append(plots.lines(
            "What differs between queries' adapters", note, [plots.Line("share that differs", *points(metrics, "delta_variance"), smooth=True)], **axis, percent=True,
        ))  # fmt: skip
    return found if metrics else []


def experts(run: Run) -> list[plots.Panel]:
    tried: dict[int, list[float]] = {}
    won: dict[int, list[float]] = {}
    for attempt in run.attempts:
        tried.setdefault(attempt["step"], []).append(attempt["score"])
        if attempt.get("best"):
            won.setdefault(attempt["step"], []).append(attempt["score"])
    if not tried:
        return []
    mean = lambda scores: (list(scores), [sum(one) / len(one) for one in scores.values()])
    shown = [
        plots.Line("experts so far", *points(run.metrics, "expert_score"), steps=True),
        plots.Line("all prompts tried", *mean(tried), dots=True), plots.Line("the winners", *mean(won), dots=True),
    ]  # fmt: skip
    axis: dict[str, Any] = {"marks": phase_marks(run.metrics), "until": max(line["step"] for line in (*run.attempts, *run.metrics[-1:])) + 1}
    note = f"{len(run.attempts):,} prompts were tried on train queries, in {len(tried)} round{'s' * (len(tried) > 1)}; the best for a query becomes its expert, which the generator learns from."
    found = [plots.lines("Score of expert prompts", note, shown, **axis, percent=True)]
    if points(run.metrics, "expert_size")[0]:
        note = "Of how many train queries the expert is another prompt than the initial one."
        found.append(plots.lines("Experts other than the initial prompt", note, [plots.Line("queries", *points(run.metrics, "expert_size"), steps=True)], **axis))
    return found


def deltas(results) -> list[plots.Panel]:
    norms, spread = (results.get(name) or {} for name in ("delta_norms", "delta_norms_spread"))
    if not norms:
        return []
    whose = "of the test queries' own deltas, on average" if any(map(any, spread.values())) else "of the delta, which is one for all queries"
    found = [plots.heat("Norm by layer and projection", f"The Frobenius norm {whose}: where the adapter changes the model most.", norms)]
    if any(map(any, spread.values())):
        shares = {target: [s / n if n else 0 for s, n in zip(spread[target], values)] for target, values in norms.items()}
        note = "The norm's standard deviation over the queries, in percent of its mean. It tells of size alone: deltas of one size may still differ in direction."
        found.append(plots.heat("How much the norm differs between queries", note, shares, percent=True))
    return found


# --- what the figures say ---


def opening(run: Run) -> str:
    """Returns the result in a sentence or two, as HTML."""
    results = run.results
    if not results:
        done, all_steps = len(points(run.metrics, "loss")[0]) and points(run.metrics, "loss")[0][-1] + 1, run.config["train"]["num_steps"]
        latest = f" The newest validation score is <b>{percent(validations(run.metrics)[1][-1])}%</b>." if validations(run.metrics)[0] else ""
        return f'<p class="lead">This run has not ended: {done} steps are logged, of {all_steps} in its last phase.{latest}</p><p>Scores on test queries come at its end.</p>'
    if "after" not in results:
        found = results["validation"]
        return f'<p class="lead"><b>{percent(found["mean"])}%</b> of {found["n"]} validation queries are answered rightly.</p><p>The run was asked for no test scores (eval.report=validation).</p>'
    before, after = results["before"], results["after"]
    graded = any(score not in (0, 1) for score in results.get("scores", {}).values())
    what = f"is the mean score on {after['n']:,} unseen queries" if graded else f"of {after['n']:,} unseen queries are answered rightly"
    if not (run.method.learns or run.method.prompt == "searched"):
        return f'<p class="lead"><b>{percent(after["mean"])}%</b> {what} by the bare model under the initial prompt.</p><p>95% interval {bounds(after["ci95"])}. {html.escape(run.config["method"])} learns nothing, so before and after are one.</p>'
    verdict, words = standing(after, before, gain_of(run, "before"))
    says = {"above": "That is more than chance", "below": "Training did harm", "same": "Training changed no score", "open": "This does not show that training helped"}[verdict]
    return (
        f'<p class="lead"><b>{percent(after["mean"])}%</b> {what} after training, <b>{percent(before["mean"])}%</b> before.</p>'
        f"<p>95% intervals {bounds(after['ci95'])} and {bounds(before['ci95'])}. {says}: {words.format('after')}.</p>"
    )


def gain_of(run: Run, *keys) -> dict | None:
    """Returns by how much the score after is above another, query by query; None where that is not known."""
    found = run.results.get("gains")
    for key in keys:
        found = (found or {}).get(key)
    if found is None and keys == ("before",) and run.before and set(run.results.get("scores") or ()) == set(run.before):
        from metatuner_jax import evaluate  # which brings jax

        scores = run.results["scores"]
        return evaluate.interval([scores[id] - line["score"] for id, line in run.before.items()], run.config["eval"]["num_bootstrap"], run.config["seed"])
    return found


def standing(own, other, gain) -> tuple[str, str]:
    """Returns how a score stands to another: 'above', 'below', 'same' or 'open', and why, in words with a place for its name.

    Args:
      own, other: {mean, ci95}.
      gain: {mean, ci95} of their difference query by query; None: only their intervals are known, which must lie apart to tell anything.
    """
    if gain is None:
        (low, high), (other_low, other_high) = own["ci95"], other["ci95"]
        if low > other_high or high < other_low:
            return ("above" if low > other_high else "below"), "the two intervals lie apart"
        return "open", "the two intervals overlap, and the run’s files do not say what differs query by query"
    low, high = gain["ci95"]
    if gain["mean"] == low == high == 0:
        return "same", "every query has the same score in both"
    words = f"query by query, {{}} is {percent(abs(gain['mean']))} points {'better' if gain['mean'] >= 0 else 'worse'}, 95% interval {bounds(gain['ci95'])}"
    return ("above", words) if low > 0 else ("below", words) if high < 0 else ("open", f"{words}, which holds 0, so it may be chance")


def findings(run: Run) -> list[str]:
    """Returns what the controls say of adapter and prompt, a sentence or two of HTML each."""
    results, method = run.results, run.method
    n, prompts, found = results["after"]["n"], results["prompts"], []

    def add(kind, which, what, **heads):
        verdict, words = standing(results[kind]["own"], results[kind][which], gain_of(run, kind, which))
        found.append(f"<b>{heads[verdict]}</b> With {what} the score is {scored(results[kind][which])}: {words.format('its own')}.")

    if method.adapter:
        add("adapter", "none", "no adapter", above="The adapter does something.", below="The adapter does harm.", same="The adapter changes no score.", open="That the adapter helps does not show.")
    if method.adapter == "generated":
        add(
            "adapter", "shuffled", "another query’s adapter in place of its own", above="The adapter depends on the query.", below="Another query’s adapter does better.",
            same="The adapter does not depend on the query, as far as scores tell.", open="That the adapter depends on the query does not show.",
        )  # fmt: skip
        add(
            "adapter", "mean", "the mean adapter, one for all queries,", above="One adapter for all queries would not do.", below="One adapter for all queries does better.",
            same="One adapter for all queries does as well.", open="One adapter for all queries cannot be told from each query’s own.",
        )  # fmt: skip
    elif method.adapter == "static":
        found.append("<b>The adapter is one for all queries</b>, as this method has it: own, shuffled and mean are the same.")
    else:
        found.append("<b>There is no adapter</b> in this method: all four adapter scores are one.")
    if method.prompt == "initial":
        return [*found, "<b>The prompt is the initial one</b> for all queries, as this method has it."]
    if method.prompt == "searched":
        found.append(f"<b>One prompt was found for all queries</b>{', the initial one' if prompts['share_initial'] == 1 else ''}.")
    elif prompts["distinct"] == 1 and prompts["share_initial"] == 1:
        found.append(f"<b>The written prompts have collapsed:</b> all {n:,} queries get the initial prompt, so the three prompt scores are one.")
    elif prompts["distinct"] == 1:
        found.append(f"<b>The written prompts have collapsed:</b> all {n:,} queries get one and the same.")
    else:
        found.append(f"<b>{prompts['distinct']} different prompts were written for {n:,} queries</b>, {percent(prompts['share_initial'])}% of them the initial one, {prompts['mean_tokens']:.1f} tokens on average.")
        add(
            "prompt", "shuffled", "another query’s prompt in place of its own", above="The prompt depends on the query.", below="Another query’s prompt does better.",
            same="The prompt does not depend on the query, as far as scores tell.", open="That the prompt depends on the query does not show.",
        )  # fmt: skip
    if prompts["share_initial"] < 1:
        add(
            "prompt", "initial", "the initial prompt", above="The prompt does something.", below="The initial prompt does better.",
            same="The initial prompt does as well.", open="That the prompt helps does not show.",
        )  # fmt: skip
    return found


# --- the page ---


def page(run: Run, groups: dict[str, list[plots.Panel]]) -> str:
    """Returns the page of a run with its plots, by their names as `panels_of` returns them."""
    config, results = run.config, run.results
    title = f"{config['task']['name']}, {config['method']}"
    models = config["generator"]["model"] if config["generator"]["model"] == config["actor"]["model"] else f"{config['generator']['model']} writes for {config['actor']['model']}"
    drawn = lambda name, *more: f'<div class="plots">{"".join(figure(panel, f"{name}-{i}", *more[i : i + 1]) for i, panel in enumerate(groups.get(name, ())))}</div>'
    parts = {}
    if "after" in results:
        said = "".join(f"<li>{text}</li>" for text in findings(run))
        tables = [control_table(run, "adapter"), control_table(run, "prompt")]
        parts["controls"] = ("Does it depend on the query?", f'<ul class="found">{said}</ul>{drawn("adapters", *tables)}')
    if "learning" in groups:
        parts["learning"] = ("Learning", drawn("learning"))
    if "experts" in groups:
        parts["experts"] = ("Expert prompts", drawn("experts"))
    if "deltas" in groups:
        parts["deltas"] = ("The adapter in the model", drawn("deltas", norm_table(results["delta_norms"])))
    elif results and run.method.adapter:
        parts["deltas"] = ("The adapter in the model", "<p>The norms by layer and projection are not in this run’s results.json, which was written before there were any (or without test scores). A run of this version leaves them there.</p>")
    if "after" in results:
        parts["queries"] = ("Queries", queries(run))
    parts["cost"] = ("Cost", cost(run))
    scores = score_table(results, ("before", "after", "before_flexible", "after_flexible")) if "after" in results else ""
    shown = "".join(figure(panel, f"before_after-{i}") for i, panel in enumerate(groups.get("before_after", ())))
    first = f'<div class="first"><div>{opening(run)}{scores}</div><div>{shown}</div></div>'
    about = f"seed {config['seed']}; {models}; {run.folder.absolute().name}"
    return frame("run report", title, f"{header(title, about, parts)}<main>{first}{sections(parts)}</main>")


def frame(kind: str, title: str, body: str) -> str:
    """Returns a page with our style and script around what it says."""
    text = importlib.resources.files("metatuner_jax").joinpath("report.html").read_text(encoding="utf-8")
    colours = "; ".join(f"--{name}: light-dark({light}, {dark})" for name, (light, dark) in plots.COLOURS.items())
    for name, value in {"kind": kind, "title": html.escape(title), "colours": colours, "body": body}.items():
        text = text.replace("{{" + name + "}}", value, 1)
    return text.encode("utf-8", "replace").decode("utf-8")  # a half of a surrogate pair, which a model may well write


def header(title, about, parts) -> str:
    breakable = re.sub("([_:/])", r"\1<wbr>", html.escape(title))
    links = "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, (text, _) in parts.items())
    return (
        f'<header><div><h1>{breakable}</h1><span class="soft">{html.escape(about)}</span></div>'
        f'<button id="theme" class="js-only" type="button" aria-label="Light or dark" title="Light or dark">◐</button></header><nav aria-label="Sections">{links}</nav>'
    )


def sections(parts) -> str:
    return "".join(f'<section id="{name}"><h2>{html.escape(text)}</h2>{content}</section>' for name, (text, content) in parts.items())


def figure(panel: plots.Panel, name: str, more: str = "") -> str:
    """Returns a plot with its title, legend and caption; `more` is HTML that can be opened below."""
    legend = f'<div class="legend">{"".join(key(*one) for one in panel.legend)}</div>' if len(panel.legend) > 1 else ""
    more = f"<details><summary>The numbers</summary>{more}</details>" if more else ""
    drawn = plots.svg(panel, name, html.escape(f"{panel.title}. {panel.note}"))
    return f"<figure><h3>{html.escape(panel.title)}</h3>{legend}{drawn}<figcaption>{html.escape(panel.note)}</figcaption>{more}</figure>"


def key(text: str, colour: str, dashes) -> str:
    """Returns a line of a plot's legend."""
    if dashes is None:
        mark = f'<circle cx="14" cy="4" r="3.5" style="fill: var(--{colour})"/>'
    else:
        pattern = " ".join(f"{1.7 * dash:g}" for dash in dashes) or "none"
        mark = f'<line x1="0" x2="28" y1="4" y2="4" style="stroke: var(--{colour}); stroke-width: 2.5; stroke-dasharray: {pattern}"/>'
    return f'<span><svg viewBox="0 0 28 8" aria-hidden="true">{mark}</svg>{html.escape(text)}</span>'


def rows_table(head, rows, kind: str = "figures") -> str:
    """Returns a table of texts; the first cell of a row names it."""
    top = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head)
    lines = "".join(f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(text)}</td>" for text in rest)}</tr>' for first, *rest in rows)
    return f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def score_table(results, names) -> str:
    scores = [results[name] for name in names]
    return rows_table(["", "score", "95% interval", "queries"], [[name.replace("_", ", "), percent(s["mean"]) + "%", bounds(s["ci95"]), number(s["n"])] for name, s in zip(names, scores)])


def control_table(run: Run, kind: str) -> str:
    gains = {which: gain_of(run, kind, which) for which in run.results[kind]}
    rows = [[which, percent(s["mean"]) + "%", bounds(s["ci95"])] for which, s in run.results[kind].items()]
    if not any(gains.values()):
        return rows_table(["", "score", "95% interval"], rows)
    for row, gain in zip(rows, gains.values()):
        row += [percent(gain["mean"], "+"), bounds(gain["ci95"])] if gain else ["", ""]
    return rows_table(["", "score", "95% interval", "own minus it, points", "its 95% interval"], rows)


def norm_table(norms) -> str:
    layers = range(len(next(iter(norms.values()))))
    return rows_table(["layer", *norms], [[str(layer), *(f"{values[layer]:.3g}" for values in norms.values())] for layer in layers])


def queries(run: Run) -> str:
    """Returns the table of the test queries with what was written and answered."""
    if not run.predictions:
        return "<p>This folder has no predictions.jsonl, which holds each test query with its prompt and answer: the folder of the run itself does.</p>"
    initial = set((run.saved.get("initial_prompts") or {"": run.config["task"]["initial_prompt"]}).values()) - {None}
    same = common_start([line["query"] for line in run.predictions])
    rows, counts = [], dict.fromkeys(("right", "wrong", *(("gained", "lost") if run.before else ())), 0)
    for line in run.predictions:
        first = run.before.get(line["id"])
        right = line["score"] == 1
        kinds = ["right" if right else "wrong"]
        if first and right != (first["score"] == 1):
            kinds.append("gained" if right else "lost")
        for kind in kinds:
            counts[kind] += 1
        prompt = text_of(line["prompt"]) + ('<small class="again">the initial prompt</small>' if line["prompt"] in initial else "")
        answer = text_of(line["answer"])
        if not right:
            answer += f'<p class="long"><small>Reference: {html.escape(str(line["reference"]))}</small></p>'
        if first:
            answer += f'<p class="long"><small>Before ({verdict_of(first["score"])[0]}): {html.escape(first["answer"])}</small></p>'
        rows.append(query_row(line["id"], kinds, line["score"], [("Query", text_of(line["query"], same)), ("Prompt written for it" if run.method.prompt == "written" else "Prompt", prompt), ("Answer", answer)], answered=line["score"]))
    names = {"right": "Right", "wrong": "Wrong", "gained": "Right now, wrong before", "lost": "Wrong now, right before"}
    note = "Each test query with the prompt that the model read, and its answer under its own adapter. " + (f"The initial prompt is “{html.escape(next(iter(initial)))}”" if len(initial) == 1 else "")
    return f'<p class="soft">{note}</p>{query_table(["Score", "Query", "Prompt", "Answer"], rows, {names[kind]: (kind, count) for kind, count in counts.items()})}'


def query_table(head, rows, kinds: dict[str, tuple[str, int]]) -> str:
    """Returns a table that can be filtered by kind and by words. Without a script, all of it is shown.

    Args:
      rows: of `query_row`.
      kinds: {text of a button: (kind, how many rows are of it)}.
    """
    buttons = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{"false" if kind else "true"}">{html.escape(text)} <small>{count:,}</small></button>'
        for text, (kind, count) in {"All": ("", len(rows)), **kinds}.items()
    ).replace("<small>", "").replace("</small>", "")  # fmt: skip
    orders = {"asked": "in the order of the test set", "worst": "worst first", "best": "best first"}
    options = "".join(f'<option value="{name}">{text}</option>' for name, text in orders.items())
    return (
        f'<div class="tools js-only">{buttons}</div>'
        '<div class="tools js-only"><input id="search" type="search" placeholder="Search in queries, prompts and answers" aria-label="Search in the table">'
        f'<select id="order" aria-label="Order">{options}</select><span id="count" class="soft" role="status"></span></div>'
        f'<table class="queries"><thead><tr>{"".join(f"<th scope=col>{html.escape(text)}</th>" for text in head)}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        '<button id="next" class="js-only" type="button" hidden>Show more</button>'
    )


def query_row(id, kinds, order: float, cells, answered=None) -> str:
    """Returns a row of `query_table`.

    Args:
      order: what rows are sorted by.
      cells: (label on a narrow page, HTML) of each, after the first, which says the id and, where there is one answer, its score.
    """
    word, colour = ("", "") if answered is None else verdict_of(answered)
    cells = "".join(f'<td data-label="{html.escape(label)}">{content}</td>' for label, content in cells)
    first = f'<span class="{colour}">{word}</span>' if word else ""
    more = '<button type="button" class="more js-only" aria-expanded="false">more</button>'
    about = f'<td><div class="about">{first}<small class="soft">{html.escape(str(id))}</small>{more}</div></td>'
    return f'<tr data-kinds="{" ".join(kinds)}" data-score="{order:g}">{about}{cells}</tr>'


def verdict_of(score) -> tuple[str, str]:
    """Returns (what to call a score, its class on the page)."""
    return ("✓ right", "right") if score == 1 else ("✗ wrong", "wrong") if score == 0 else (f"◐ {percent(score)}%", "part")


def text_of(text: str, same: str = "") -> str:
    """Returns text of any length, which the page cuts until it is asked for all; with it goes the start that all have in common."""
    if same:
        return f'<p class="long"><span class="again soft">{html.escape(same)}</span><span class="cut soft">… </span>{html.escape(text.removeprefix(same))}</p>'
    return f'<p class="long">{html.escape(text)}</p>'


def common_start(texts) -> str:
    """Returns what all texts begin with, whole lines or sentences of it, empty where that is short."""
    start = os.path.commonprefix(texts) if len(texts) > 1 else ""
    end = max(start.rfind(mark) + len(mark) for mark in ("\n", ". ", ": ", "\0")) if start else 0
    return start[:end] if end >= 40 else ""


def short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def cost(run: Run) -> str:
    """Returns what the run took, and the settings in which it differs from the defaults."""
    results, saved = run.results, run.saved
    spent, devices, versions = results.get("cost") or {}, saved.get("devices") or {}, saved.get("versions") or {}
    tokens_per_s = sorted(points(run.metrics, "tokens_per_s")[1])
    shown = {
        "parameters that learn": number(spent.get("trained_parameters")),
        "answers decoded in training": number(spent.get("actor_calls")),
        "tokens in training": number(spent.get("tokens")),
        "steps": number(results.get("steps")),
        "training": duration(results.get("train_s")),
        "rollouts and searches": duration(results.get("rollout_s")),
        "the whole run": duration(results.get("wall_s")),
        "tokens/s of a step, median": number(tokens_per_s[len(tokens_per_s) // 2] if tokens_per_s else None),
        "device": f"{devices['count']} x {devices['kind']}" if devices else DASH,
        "computed in": (saved.get("resolved") or {}).get("dtype") or run.config["dtype"],
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "metatuner_jax") if versions.get(name)) or DASH,
    }
    listed = "".join(f"<div><dt>{name}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in shown.items() if value != DASH)
    changed = workdir_lib.differences(config_lib.plain(config_lib.Config()), run.config)
    rows = [[key, setting(value), setting(default)] for key, default, value in changed]
    more = f"<details><summary>The {len(rows)} settings that are not the defaults</summary>{rows_table(['setting', 'here', 'default'], rows, 'settings')}</details>"
    return f"<dl>{listed}</dl>{more}"


def setting(value) -> str:
    """Returns a setting as a command line has it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(setting, value))
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
