"""The report of a run and the comparison of several, as a browser shows them."""

import contextlib
import os

import pytest
from small_runs import HOSTILE, write_run

from experiments import report as command
from metatuner_jax import report

COUNT = 1500


@pytest.fixture(scope="module")
def pages(tmp_path_factory, draw):
    """Paths of a run's report and of a comparison; the results of the run."""
    folder = tmp_path_factory.mktemp("reports")
    results = [write_run(folder / name, seed, COUNT, phases=("actor", "joint")) for seed, name in enumerate(("one", "two-with-a-rather-long-name"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", draw)
        assert command.main([str(folder / "one")]) == 0
    assert command.main([str(folder / "one"), str(folder / "two-with-a-rather-long-name"), "--out", str(folder / "comparison.html")]) == 0
    return {"run": folder / "one" / "report.html", "comparison": folder / "comparison.html"}, results


@contextlib.contextmanager
def opened(browser, path, size, **how):
    """Yields a page; fails where it asks for anything but itself, or something in it goes wrong."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **how)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: wrong.append(request.url) if request.url not in (path.as_uri(), "data:,") else None)
    page.goto(path.as_uri())
    yield page
    assert not wrong
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_page_fits_its_window_in_both_schemes(kind, size, scheme, pages, browser, tmp_path):
    with opened(browser, pages[0][kind], size, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]  # nothing to scroll sideways
        ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
        light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 29)"
        assert ground() == {"light": light, "dark": dark}[scheme]
        ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == page.evaluate("getComputedStyle(document.querySelector('figcaption')).color") or ink == page.evaluate("getComputedStyle(document.body).color")
        least = page.evaluate("Math.min(...[...document.querySelectorAll('figure svg text')].map(text => text.getBoundingClientRect().height))")
        assert least > 8  # pixels: can be read on a phone
        page.screenshot(path=f"{os.environ.get('SCREENSHOTS', tmp_path)}/report-{kind}-{size[0]}-{scheme}.png", full_page=True)
        page.get_by_role("button", name="Light or dark").click()
        assert ground() == {"light": dark, "dark": light}[scheme]


def test_queries_can_be_filtered_searched_sorted_and_opened(pages, browser):
    path, scores = pages[0]["run"], list(pages[1][0]["scores"].values())
    right, wrong = scores.count(1.0), scores.count(0.0)
    with opened(browser, path, (1280, 900)) as page:
        shown = page.locator("table.queries tbody tr:visible")
        ids = lambda: [row.split()[2] for row in shown.locator("td:first-child").all_inner_texts()]
        status = page.get_by_role("status")
        assert shown.count() == 100 and status.inner_text() == f"100 of {COUNT} shown" and ids()[:3] == ["test-0", "test-1", "test-2"]
        page.get_by_role("button", name="Show more").click()
        assert shown.count() == 200
        page.get_by_role("button", name=f"Wrong {wrong}", exact=True).click()
        assert status.inner_text() == f"100 of {wrong} shown" and ids()[0] == f"test-{scores.index(0.0)}"
        assert page.get_by_role("button", name=f"Wrong {wrong}", exact=True).get_attribute("aria-pressed") == "true"
        page.get_by_role("button", name=f"Right {right}", exact=True).click()
        assert set(shown.locator("span.right").all_inner_texts()) == {"✓ right"} and status.inner_text() == f"100 of {right} shown"
        page.get_by_role("button", name=f"All {COUNT:,}", exact=True).click()
        page.get_by_label("Search in the table").fill("ANSWER 1499 of")
        assert ids() == ["test-1499"] and status.inner_text() == "1 of 1 shown"
        page.get_by_label("Search in the table").fill("")
        page.get_by_label("Order").select_option("worst first")
        assert ids()[0] == f"test-{scores.index(0.0)}" and set(shown.locator("span.wrong").all_inner_texts()) == {"✗ wrong"}
        page.get_by_label("Order").select_option("in the order of the test set")
        assert ids()[:2] == ["test-0", "test-1"]
        assert shown.nth(0).locator("td").nth(1).inner_text() == f"reverse 0 {HOSTILE}"


def test_long_texts_are_cut_until_they_are_asked_for(browser, tmp_path, draw):
    write_run(tmp_path / "run", count=3)
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().replace("answer 1", "word " * 400)
    (tmp_path / "run" / "predictions.jsonl").write_text(lines)
    with opened(browser, draw(tmp_path / "run"), (390, 844)) as page:
        row, brief = (page.locator("table.queries tbody tr").nth(place) for place in (1, 0))
        short = row.bounding_box()["height"]
        assert row.get_by_role("button", name="more").is_visible() and brief.get_by_role("button", name="more").count() == 0
        row.get_by_role("button", name="more").click()
        assert row.bounding_box()["height"] > short + 200
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        row.get_by_role("button", name="more").click()
        assert row.bounding_box()["height"] == short


def test_without_a_script_all_of_it_is_there(pages, browser):
    with opened(browser, pages[0]["run"], (1280, 900), java_script_enabled=False) as page:
        assert page.locator("table.queries tbody tr:visible").count() == COUNT
        assert page.locator(".tools:visible, #theme:visible, .more:visible").count() == 0


def test_disagreements_can_be_filtered_by_who_is_right(pages, browser):
    (one, two) = (results["scores"] for results in pages[1])
    with opened(browser, pages[0]["comparison"], (390, 844)) as page:
        alone = [id for id in one if one[id] > two[id]]
        page.get_by_role("button", name=f"one alone is best {len(alone)}").click()
        assert page.get_by_role("status").inner_text() == f"100 of {len(alone)} shown"
        assert page.locator("table.queries tbody tr:visible").nth(0).locator("td").nth(0).inner_text().split()[0] == alone[0]
