"""The tests here need a browser and what drives it: `make browser` says what to install. Elsewhere they are not collected."""

import importlib.util
import shutil

if importlib.util.find_spec("playwright") is None or shutil.which("chromium") is None:
    collect_ignore_glob = ["test_*.py"]
