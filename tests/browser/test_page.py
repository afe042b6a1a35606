"""The server's page, as a browser shows it."""

import os

import pytest
from small_runs import STRONG, command, read_lines, served, start

import metatuner_jax as mt
from experiments import serve

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("page") / "run"
    assert start(command(root, folder, *STRONG))[0] == 0
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with served(serve.make_app(serve.Batcher(mt.Tuner.load(folder)), "my run")) as url:
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_a_query_gets_its_prompt_answers_and_norms(size, scheme, url, browser, folder, tmp_path):
    line = read_lines(folder / "predictions.jsonl")[0]
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    errors, outside = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    assert page.title() == "my run"
    page.get_by_label("Query").fill(line["query"])
    page.get_by_role("button", name="Answer").click()
    page.locator("#result").wait_for(state="visible")
    assert page.locator("#prompt").inner_text() == line["prompt"] and page.locator("#answer").text_content() == line["answer"]
    assert page.locator("#bars rect").count() == 6  # three layers, two projections
    assert page.locator("#legend").inner_text().split() == ["q", "v"]
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]  # nothing to scroll sideways
    shown = os.environ.get("SCREENSHOTS", tmp_path)
    page.screenshot(path=f"{shown}/page-{size[0]}-{scheme}.png", full_page=True)
    assert not outside and not errors
    page.get_by_label("Query").fill("two " * 600)
    page.get_by_role("button", name="Answer").click()
    page.get_by_role("alert").filter(has_text="above generator.max_query_tokens").wait_for()
    page.close()
