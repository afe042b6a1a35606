"""The tests here need a browser and what drives it: `make browser` says what to install. Elsewhere they are not collected."""

import importlib.util
import shutil

import pytest

if importlib.util.find_spec("playwright") is None or shutil.which("chromium") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()
