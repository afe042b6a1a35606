"""The files of a run folder: JSON and JSON Lines, whole at any moment. Of several processes the first one writes them."""

import json
import os
import pathlib

from metatuner_jax import processes


def read_lines(path) -> list[dict]:
    """Returns the objects of a JSON Lines file of ours, none where there is no file; a last line cut short is left out. All processes are to ask."""
    return processes.group.from_first(lambda: lines_of(path))


def lines_of(path) -> list[dict]:
    """Returns the same as `read_lines`, for this process alone."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_lines(path, objects) -> None:
    """Adds lines to a JSON Lines file; they are on disk when this returns."""
    if processes.group.index == 0:
        with pathlib.Path(path).open("a", encoding="utf-8") as file:
            file.write(_lines(objects))
            _settle(file)


def write_lines(path, objects) -> None:
    """Replaces a JSON Lines file in one stroke."""
    write_text(path, _lines(objects))


def write_json(path, content) -> None:
    """Replaces a JSON file in one stroke."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text: str) -> None:
    """Replaces a file in one stroke."""
    if processes.group.index:
        return
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        _settle(file)
    beside.replace(path)


def read_json(path, way_out: str = "give another --workdir"):
    """Returns the content of a JSON file of ours, None where there is none; raises ValueError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, RecursionError, OSError) as error:  # RecursionError: brackets without end
        raise ValueError(f"{path} cannot be read ({error}): {way_out}") from None


def _lines(objects):
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def _settle(file):
    file.flush()
    os.fsync(file.fileno())
