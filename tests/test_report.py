"""The report of a run and the comparison of several: what the pages say, and that nothing in them comes from elsewhere."""

import collections
import html.parser
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from small_runs import HOSTILE, assert_one_line, read_lines, snapshot, write_run

from experiments import report as command
from experiments import summary
from metatuner_jax import plots, report

REPOSITORY = pathlib.Path(__file__).parent.parent
VOID = {"meta", "link", "input", "br", "wbr", "img"}


class Page(html.parser.HTMLParser):
    """A page, read: its texts by kind of element, its tables, ids and addresses. Fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.tables, self.texts, self.names = [], collections.Counter(), [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == ["html"]  # which need not be closed

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
        self.names += [name for name in attributes if name.startswith("on")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.texts.append(text)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += text

    def table(self, *head):
        """Returns the rows of the table with this head, by their first cell."""
        (found,) = (rows for rows in self.tables if rows[0][: len(head)] == list(head))
        return {first: rest for first, *rest in found[1:]}


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def percent(share) -> str:
    return f"{100 * share:.1f}%"


def bounds(ci95) -> str:
    return f"[{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


@pytest.fixture(autouse=True)
def drawn(draw, monkeypatch):
    monkeypatch.setattr(report, "write", draw)


@pytest.fixture(scope="module")
def run(tmp_path_factory, draw):
    """(folder with a report, results)."""
    folder = tmp_path_factory.mktemp("report") / "run"
    results = write_run(folder, phases=("actor", "joint"))
    draw(folder)
    return folder, results


def said(capfd, *arguments):
    """Returns (exit code, standard output, standard error) of the command."""
    code = command.main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


# --- one run ---


def test_the_numbers_are_those_of_the_results(run):
    folder, results = run
    page = read(folder / "report.html")
    scores = page.table("", "score", "95% interval", "queries")
    for name in ("before", "after", "before_flexible", "after_flexible"):
        score = results[name]
        assert scores[name.replace("_", ", ")] == [percent(score["mean"]), bounds(score["ci95"]), "6"]
    adapters, prompts = (rows[1:] for rows in page.tables if rows[0][-1] == "its 95% interval")
    for kind, rows in (("adapter", adapters), ("prompt", prompts)):
        assert [row[0] for row in rows] == list(results[kind])
        for name, *cells in rows:
            score, gain = results[kind][name], results["gains"][kind].get(name)
            shown = [f"{100 * gain['mean']:+.1f}", bounds(gain["ci95"])] if gain else ["", ""]
            assert cells == [percent(score["mean"]), bounds(score["ci95"]), *shown]
    norms = page.table("layer", "q", "v")
    for layer in range(3):
        assert norms[str(layer)] == [f"{results['delta_norms'][target][layer]:.3g}" for target in ("q", "v")]
    text = " ".join(page.texts)
    for shown in ("1.2 million", "4,321", "98,765", "5 min", "1 x cpu", "float32"):
        assert shown in text
    (queries,) = (rows[1:] for rows in page.tables if rows[0] == ["Score", "Query", "Prompt", "Answer"])
    assert [row[0].removesuffix("more") for row in queries] == [f"{'✓ right' if score else '✗ wrong'}{id}" for id, score in results["scores"].items()]


def test_bars_are_as_long_as_their_scores_and_have_them_beside():
    rows = [("one", {"mean": 0.25, "ci95": [0.1, 0.4]}, "blue"), ("two", {"mean": 0.755, "ci95": [0.7, 0.8]}, "grey")]
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots.bars("", "", rows).draw(axes)
    assert [patch.get_width() for patch in axes.patches] == [25.0, 75.5]
    assert [text.get_text() for text in axes.texts] == ["25.0", "75.5"]
    intervals = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(intervals, [[10, 40], [70, 80]])


def test_texts_of_queries_and_models_stay_texts(run):
    folder, _ = run
    page = read(folder / "report.html")
    assert page.tags["img"] == page.tags["b"] - len(re.findall("<b>", (folder / "report.html").read_text())) == 0
    assert page.tags["script"] == 2 and not page.names
    (row,) = (row for row in page.tables[-2][1:] if "test-3" in row[0])
    assert row[1] == f"reverse 3 {HOSTILE}" and row[3].startswith(f"answer 3 of seed 0 {HOSTILE}") and row[2] == "say itthe initial prompt"
    assert page.tables[-2][1][2] == HOSTILE


def test_nothing_is_fetched_from_elsewhere_and_the_page_is_well_formed(run):
    folder, _ = run
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "//cdn" not in text
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert set(re.findall(r"url\(.", text)) <= {"url(#"}
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert "default-src 'none'" in text and "{{" not in text


def test_plots_follow_the_colours_of_the_page(run):
    folder, _ = run
    drawn = re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', (folder / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(drawn) == 1 + 2 + 4 + 2 + 2
    for svg in drawn[:-2]:
        assert not re.search("#[0-9a-f]{6}", svg) and "var(--soft)" in svg and "DejaVu" not in svg
    assert len(re.findall("<path[^>]*style=\"fill: #[0-9a-f]{6}", drawn[-2])) >= 6  # the cells of the heat map
    for name in ("before_after", "adapters", "learning", "experts", "deltas"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("colour", plots.COLOURS)
def test_text_can_be_read_on_both_grounds(colour):
    def luminance(code):
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (int(code[at : at + 2], 16) / 255 for at in (1, 3, 5))]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for shade in (0, 1):
        for ground in ("ground", "card"):
            light, dark = sorted((luminance(plots.COLOURS[colour][shade]), luminance(plots.COLOURS[ground][shade])), reverse=True)
            assert colour in ("line", "ground", "card") or (light + 0.05) / (dark + 0.05) >= 4.5, ground  # WCAG 2.2, 1.4.3


def test_warm_ups_are_marked(run):
    folder, _ = run
    lines = read_lines(folder / "metrics.jsonl")
    assert report.phase_marks(lines) == [(0, "warm-up: actor"), (4, "joint phase")] and report.phase_marks(lines[4:]) == []
    assert (folder / "report.html").read_text().count(">warm-up: actor<") == 6  # learning curves and experts


@pytest.mark.parametrize(
    "gain, expected",
    [
        ({"mean": 0.2, "ci95": [0.1, 0.3]}, ("above", "query by query, {} is 20.0 points better, 95% interval [10.0, 30.0]")),
        ({"mean": -0.2, "ci95": [-0.3, -0.1]}, ("below", "query by query, {} is 20.0 points worse, 95% interval [-30.0, -10.0]")),
        ({"mean": 0.1, "ci95": [0.0, 0.3]}, ("open", "query by query, {} is 10.0 points better, 95% interval [0.0, 30.0], which holds 0, so it may be chance")),
        ({"mean": 0.0, "ci95": [0.0, 0.0]}, ("same", "every query has the same score in both")),
    ],
)
def test_words_say_no_more_than_the_intervals(gain, expected):
    assert report.standing({"ci95": [0, 1]}, {"ci95": [0, 1]}, gain) == expected


@pytest.mark.parametrize("other, verdict", [([0.1, 0.39], "above"), ([0.1, 0.4], "open"), ([0.45, 0.9], "open"), ([0.61, 0.9], "below")])
def test_intervals_alone_tell_scores_apart_only_where_they_do_not_meet(other, verdict):
    assert report.standing({"ci95": [0.4, 0.6]}, {"ci95": other}, None)[0] == verdict


def test_the_controls_are_told_in_words(run):
    said = [re.sub("<[^>]*>", "", text) for text in report.findings(report.read(run[0]))]
    assert [text.split(". With")[0] for text in said[:3]] == ["The adapter does something", "The adapter depends on the query", "One adapter for all queries cannot be told from each query’s own"]
    assert said[3] == "3 different prompts were written for 6 queries, 50.0% of them the initial one, 4.5 tokens on average."
    assert said[4].endswith("every query has the same score in both.") and said[5].startswith("The initial prompt does better. With the initial prompt the score is 33.3%")


def test_the_gain_of_an_older_run_is_that_of_its_answers(tmp_path):
    results = write_run(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps({name: value for name, value in results.items() if name not in ("gains", "delta_norms")}))
    run = report.read(tmp_path / "run")
    expected = np.mean(list(results["scores"].values())) - 1 / 6  # the first one was right before
    assert report.gain_of(run, "before")["mean"] == pytest.approx(expected) and report.gain_of(run, "adapter", "mean") is None
    page = Page(report.page(run, report.panels_of(run)))
    text = " ".join(page.texts)
    assert "norms by layer and projection are not in this run’s results.json" in text and "do not say what differs query by query" in text


def test_a_run_in_training_shows_what_there_is(tmp_path, draw):
    write_run(tmp_path / "run")
    for name in ("results.json", "predictions.jsonl"):
        (tmp_path / "run" / name).unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as it is being written
    text = " ".join(read(draw(tmp_path / "run")).texts)
    assert "This run has not ended: 4 steps are logged, of 100" in text and "The newest validation score is 25.0%" in text.replace("  ", " ")
    assert sorted(path.stem for path in (tmp_path / "run" / "plots").iterdir()) == ["experts", "learning"]


@pytest.mark.parametrize("name", ["quickstart", "gsm8k", "word_reversal/zero_shot-0", "word_reversal/prompt_search-0", "word_reversal/search/sft-0.001", "reasoning_mixture/metatuner_j-0"])
def test_committed_results_get_a_page(name, tmp_path, capfd):
    folder = REPOSITORY / "results" / name
    before = snapshot(folder)
    assert said(capfd, folder, "--out", tmp_path / "page.html")[:2] == (0, f"{tmp_path}/page.html\n")
    page, results = read(tmp_path / "page.html"), json.loads((folder / "results.json").read_text())
    assert percent(results["after" if "after" in results else "validation"]["mean"]) in page.texts
    assert snapshot(folder) == before


def test_losses_that_are_not_finite_leave_a_gap():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots.lines("", "", [plots.Line("loss", [0, 1, 2, 3], [1.0, float("nan"), float("inf"), 3.0]), plots.Line("none", [], [])]).draw(axes)
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 1], [3, 3]])


def test_the_running_mean_is_that_of_neighbours():
    values = np.random.default_rng(0).normal(size=90)  # two on each side
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(90)]
    np.testing.assert_allclose(plots.running_mean(values), expected)


def test_labels_of_any_letters_are_drawn_as_they_are(tmp_path):
    panel = plots.bars("", "", [("$x^ 日本 <&", {"mean": 0.5, "ci95": [0.4, 0.6]}, "blue")])
    assert "$x^ 日本 &lt;&amp;" in plots.svg(panel, "a", "")
    plots.png([panel], tmp_path / "a.png")


# --- several ---


@pytest.fixture
def runs(tmp_path):
    """Folders of three runs, the last of which was tested on other rows; their results."""
    folders = [tmp_path / name for name in ("a/run", "b/run", "c")]
    results = [write_run(folder, seed, count=40, train={"learning_rate": 0.001 * (seed + 1)}) for seed, folder in enumerate(folders)]
    saved = json.loads((folders[2] / "config.json").read_text())
    (folders[2] / "config.json").write_text(json.dumps({**saved, "data": {"test": "other rows"}}))
    return folders, results


def test_runs_are_compared_query_by_query_where_they_have_the_same(runs, tmp_path, capfd, monkeypatch):
    folders, results = runs
    monkeypatch.chdir(tmp_path)
    assert said(capfd, *folders) == (0, "comparison.html\n", "")
    page = read(tmp_path / "comparison.html")
    names = ["a/run", "b/run", "tmp/c"]
    names[2] = f"{tmp_path.name}/c"
    scores = page.table("run", "method", "seed", "before", "after")
    for name, found in zip(names, results):
        assert scores[name][2:5] == [percent(found["before"]["mean"]), percent(found["after"]["mean"]), bounds(found["after"]["ci95"])]
    paired = page.table("", "difference")
    expected = summary.against({0: results[0]["scores"]}, {0: results[1]["scores"]})
    assert paired == {"a/run minus b/run": [f"{100 * expected['difference']:+.1f}", bounds(expected["ci95"]), "40"]}
    assert expected["difference"] == pytest.approx(results[0]["after"]["mean"] - results[1]["after"]["mean"])
    settings = page.table("setting", *names)
    assert settings == {"seed": ["0", "1", "2"], "train.learning_rate": ["0.001", "0.002", "0.003"]}
    differ = [id for id in results[0]["scores"] if results[0]["scores"][id] != results[1]["scores"][id]]
    rows = page.table("", "Query", "a/run", "b/run")
    assert [first.removesuffix("more").strip() for first in rows] == differ and len(differ) > 5
    for id, (query, *answers) in zip(differ, rows.values()):
        assert query.startswith(f"reverse {id.removeprefix('test-')} {HOSTILE}")
        assert [("✓ right" in answer) for answer in answers] == [found["scores"][id] == 1 for found in results[:2]]
    text = " ".join(page.texts)
    assert "Not all of them were tested on the same queries" in text and f"{tmp_path.name}/c left no answers to these queries" in text


def test_the_best_run_is_named_with_what_is_known_of_its_lead(runs):
    folders, results = runs
    found = {name: report.read(folder) for name, folder in zip("abc", folders)}
    ended = {name: found[name] for name in "ab"}
    pairs = command.differences(ended)
    means = {name: one["after"]["mean"] for name, one in zip("ab", results)}
    best, other = sorted(means, key=lambda name: -means[name])
    text = command.opening(ended, pairs)
    assert f"{best} scores highest: <b>{percent(means[best])}</b>" in text and f"Next is {other} with {percent(means[other])}" in text
    low = min(command.standing_of(pairs, best, other)["ci95"])
    assert ("more than chance" in text) == (low > 0)
    assert command.standing_of(pairs, "a", "b")["mean"] == -command.standing_of(pairs, "b", "a")["mean"] == pytest.approx(means["a"] - means["b"])
    tied = command.opening({"a": found["a"], "z": found["a"]}, [])
    assert "a and z score alike, and highest" in tied and "Next is" not in tied


def test_runs_without_answers_or_metrics_are_compared_by_what_there_is(tmp_path, capfd):
    names = ("metatuner_j-0", "sft-0")
    folders = [REPOSITORY / "results" / "smaller_actor" / name for name in names]
    assert said(capfd, *folders, "--out", tmp_path / "page.html")[0] == 0
    page = read(tmp_path / "page.html")
    ours, rival = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert page.table("", "difference")["metatuner_j-0 minus sft-0"][0] == f"{100 * (ours['after']['mean'] - rival['after']['mean']):+.1f}"
    text = " ".join(page.texts)
    assert "No two of these folders hold answers to the same test queries" in text and "Learning" not in text


def test_a_curve_that_one_run_alone_has_says_whose_it_is(tmp_path, capfd):
    folders = [REPOSITORY / "results" / name for name in ("quickstart", "quickstart_int8")]  # the second without metrics
    assert said(capfd, *folders, "--out", tmp_path / "page.html")[0] == 0
    assert "lower is better. Of quickstart alone: the others left none." in " ".join(read(tmp_path / "page.html").texts)


# --- bad input ---


@pytest.mark.parametrize(
    "arguments, texts",
    [
        ([], ["no run is named", "runs/quickstart"]),
        (["{tmp}/nothing"], ["{tmp}/nothing holds no run", "runs/quickstart"]),
        (["{tmp}"], ["{tmp} holds no run"]),
        (["{run}", "{run}"], ["{run} is named twice"]),
        (["{run}", "--outt", "x"], ["argument '--outt' is unknown; did you mean --out?"]),
        (["{run}", "--out"], ["argument --out needs a value"]),
        (["{run}", "--out", "{tmp}/none/x.html"], ["--out={tmp}/none/x.html", "{tmp}/none is no folder"]),
        (["{run}", "--out", "{tmp}"], ["{tmp} is a folder"]),
        (["{run}", "--out", "{tmp}/mine.html"], ["{tmp}/mine.html is there already and is no run report of ours"]),
        (["{run}", "{other}", "--out", "{run}/report.html"], ["{run}/report.html is there already and is no comparison of ours"]),
        (["{run}", "--config.seed=1"], ["--config.seed is no setting of a report"]),
        (["{bad}"], ["{bad}/metrics.jsonl cannot be read", "mend it"]),
        (["{odd}"], ["{odd}: the files are not what a run writes", "name other folders"]),
        (["{run}", "{list}"], ["{list}/results.json is not what a run writes"]),
        (["a\0b"], ["holds a NUL"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, texts, tmp_path, capfd):
    names = {name: tmp_path / name for name in ("run", "other", "bad", "odd", "list")}
    for seed, folder in enumerate(names.values()):
        write_run(folder, seed)
    (tmp_path / "run" / "report.html").write_text('<meta name="generator" content="metatuner_jax run report">')
    (tmp_path / "mine.html").write_text("my own page")
    (tmp_path / "bad" / "metrics.jsonl").write_text("{\n{}\n")
    (tmp_path / "odd" / "results.json").write_text('{"after": {"mean": 1}}')
    (tmp_path / "list" / "results.json").write_text("[1]")
    before, names["tmp"] = snapshot(tmp_path), tmp_path
    code, output, error = said(capfd, *(argument.format(**names) for argument in arguments))
    assert (code, output) == (2, "")
    assert_one_line(error, *(text.format(**names) for text in texts))
    assert snapshot(tmp_path) == before


def test_a_report_takes_the_place_of_a_report_alone(tmp_path, draw):
    write_run(tmp_path / "run")
    first = draw(tmp_path / "run").read_text()
    assert draw(tmp_path / "run").read_text() == first
    (tmp_path / "run" / "report.html").write_text("my own notes")
    with pytest.raises(ValueError, match="is no run report of ours"):
        draw(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_text() == "my own notes"


def test_the_command_needs_no_jax(tmp_path):
    write_run(tmp_path / "run")
    program = f"import sys; from experiments import report; code = report.main([{str(tmp_path / 'run')!r}]); print('jax' in sys.modules, 'matplotlib.pyplot' in sys.modules, code)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{tmp_path}/run/report.html", "False False 0"]


def test_help_says_how(capfd):
    code, output, _ = said(capfd, "--help")
    assert code == 0 and "usage: python -m experiments.report RUN [RUN ...]" in output
