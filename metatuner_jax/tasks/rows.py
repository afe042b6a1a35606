"""Rows of a file, a folder or a hub id, and their split into train, validation and test without a shared query."""

import collections
import csv
import gzip
import json
import logging
import os
import random
import re
import zlib
from typing import Any, NamedTuple

from metatuner_jax import config

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
MAX_LINE_BYTES = 2**24  # a longer line is a mistake, which would take minutes and gigabytes to find out about later
MAX_CHARS = 2**20  # of one value
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")


class Row(NamedTuple):
    """One row as read, before anything is asked of its values."""

    where: str  # file:line, for messages
    values: dict[str, Any]


class Hub(NamedTuple):
    """A task's own rows on the hub: where those come from that no setting names."""

    id: str
    subset: str | None
    sizes: dict[str, int]  # rows of train and of what is test
    revision: str | None = None


# --- reading ---


def check_source(name: str, source: str) -> None:
    """Raises ValueError where `source`, the value of the field `name`, is no readable file, folder or possible hub id."""
    if os.path.isdir(source):
        return
    if os.path.exists(source):
        if not source.lower().endswith(SUFFIXES):
            raise ValueError(f"{name}={source!r} is not of a known kind: it must end in one of {', '.join(SUFFIXES)}")
        if not os.path.isfile(source):  # a pipe or a device, which may never end
            raise ValueError(f"{name}={source!r} is neither a file nor a folder: copy what it holds into a file")
        return
    if source.lower().endswith(SUFFIXES) or not _HUB_ID.fullmatch(source):
        raise ValueError(f"{name}={source!r}: no such file or folder, nor of the shape owner/name of a hub id")


def has_splits(source: str) -> bool:
    """Returns whether `source` may hold several splits: a folder or a hub id, not one file."""
    return not os.path.isfile(source)


def read(name: str, source: str, split: str, subset: str | None = None, revision: str | None = None) -> list[Row] | None:
    """Returns the rows of one split, or None where the folder or hub id has no such split. A file is one split.

    JSON Lines and CSV are read here, line by line, so that values stay as written and a message can name the line;
    in a CSV file every value is text. Folders and hub ids are searched by `datasets`.

    Args:
      name: the field that `source` comes from, for messages.
      subset: name of the configuration in a folder or hub id that has several.
      revision: branch or commit of a hub id.
    """
    check_source(name, source)
    if os.path.isfile(source):
        rows = list(_read_file(source))
    else:
        isdir = os.path.isdir(source)
        rows = _read_folder(name, source, split, subset) if isdir else _read_hub(name, source, split, subset, revision)
    if rows is not None and not rows:
        raise ValueError(f"{name}={source!r} holds no rows")
    return rows


def text(row: Row, field: str, way_out: str) -> str:
    """Returns the text of a field, stripped of white space at its ends.

    Raises:
      ValueError: the field is missing, is not text, or is empty.
    """
    if field not in row.values:
        names = ", ".join(repr(name)[:60] for name in [*row.values][:20]) or "none"
        names += f" and {len(row.values) - 20} more" if len(row.values) > 20 else ""
        raise ValueError(f"{row.where}: no field {field!r} among {names}{config.nearest(field, row.values)}; {way_out}")
    value = row.values[field]
    if not isinstance(value, str):
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        shown = f"{shown} ({type(value).__name__})"
        instead = "fill it or leave the row out" if value is None else 'write it in quotes, such as "42"'
        raise ValueError(f"{row.where}: field {field!r} is {shown}, not text: {instead}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{row.where}: field {field!r} holds half of a surrogate pair, which is no character: remove it") from None
    if len(value) > MAX_CHARS:
        raise ValueError(f"{row.where}: field {field!r} has {len(value)} characters, above {MAX_CHARS}: shorten it or leave the row out")
    if not value.strip():
        raise ValueError(f"{row.where}: field {field!r} is empty: fill it or leave the row out")
    return value.strip()


def _read_file(path):
    kind = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        yield from {"csv": _read_csv, "parquet": _read_parquet}.get(kind, _read_json_lines)(path)
    except (OSError, EOFError, zlib.error) as error:  # EOFError and zlib.error: a gzip file that was cut short or damaged
        raise ValueError(f"{path}: cannot be read: {_one_line(error)}; name a whole file that you may read") from None


def _lines(path):
    """Yields (number, text) of the lines of a UTF-8 file, the numbers from 1, with their line ends."""
    with gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} bytes: shorten it or leave it out")
            try:
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
                ) from None
            if "\0" in decoded:
                raise ValueError(f"{path}:{number}: the line holds NUL bytes, as UTF-16 does and no text: save the file as UTF-8")
            yield number, decoded


def _read_json_lines(path):
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            way_out = "write one object a line, not one array" if line.lstrip().startswith("[") else "mend the line or leave it out"
            raise ValueError(f"{path}:{number}: not a line of JSON: {_one_line(error)}; {way_out}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}:{number}: a {type(values).__name__}, not an object: write one {{...}} a line")
        yield Row(f"{path}:{number}", values)


def _once(pairs):
    """Returns an object of JSON, none of whose fields may occur twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, number in collections.Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"field {twice!r} occurs twice")
    return values


def _read_csv(path):
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise ValueError(f"{path}:1: the column name {config.short(twice)} occurs twice: rename one")
        for values in reader:
            if not values:  # a blank line
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(values)} values for the {len(header)} columns of line 1: "
                    "quote values that hold commas"
                )
            yield Row(f"{path}:{reader.line_num}", dict(zip(header, values, strict=True)))
    except csv.Error as error:
        way_out = "shorten it" if "field limit" in str(error) else "mend its quotes"
        raise ValueError(f"{path}:{reader.line_num}: not a line of CSV: {_one_line(error)}; {way_out}, or leave the row out") from None


def _read_parquet(path):
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {_one_line(error)}; write it anew, or as JSON Lines") from None
    for number, values in enumerate(table.to_pylist(), 1):
        yield Row(f"{path}:row {number}", values)


def _read_folder(name, source, split, subset):
    """Returns the rows of the files that belong to the split by their names or by the folder's README."""
    import datasets

    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # it warns of every README that says nothing of files
    try:  # the builder only finds the files; we read them, since its JSON and CSV readers guess types
        found = datasets.load_dataset_builder(source, subset).config.data_files or {}
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(f"{name}={source!r} holds no rows that can be found: {_one_line(error)}") from None
    files = {str(key): [str(path) for path in paths] for key, paths in found.items()}.get(split)
    if files is None:
        return None
    for path in files:
        if not os.path.normpath(path).startswith(os.path.join(os.path.abspath(source), "")):  # as a README may say
            raise ValueError(f"{name}={source!r}: its README names {path}, which is outside the folder: name that file in {name}")
        if not path.lower().endswith(SUFFIXES):
            raise ValueError(f"{name}={source!r}: {path} is not of a known kind: it must end in one of {', '.join(SUFFIXES)}")
    return [row for path in files for row in _read_file(path)]


def _read_hub(name, source, split, subset, revision):
    import datasets

    try:
        found = datasets.load_dataset(source, subset, revision=revision)
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(
            f"{name}={source!r} is no file or folder here and could not be had from the hub: {_one_line(error)}; "
            "check the name and the network, or give a path"
        ) from None
    if split not in found:
        return None
    return [Row(f"{source}/{split}:row {number}", values) for number, values in enumerate(found[split], 1)]


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# --- splitting ---


def query_key(query: str) -> str:
    """Returns the query with every run of white space as one space: what makes two queries the same."""
    return " ".join(query.split())


def load_splits(task: config.TaskConfig, seed: int, make_example, hub: Hub | None = None, validation_as_test: bool = False, read=read):
    """Returns the tuples train, validation and test, and the counts of what was dropped.

    A split that the task and its sources lack is cut from the train rows: the last ones of a shuffle by `seed`. Of
    the rest, train is the first `num_train` of the shuffle, in file order. Test is the first `num_test` rows whose
    query is in neither train nor validation, whatever `num_train` is; validation likewise. A count of 0, as mixtures
    set it, leaves that split empty.

    Args:
      make_example: from (id, row) to an Example, or to None for a row that has no answer, which is dropped.
      hub: where rows come from that `task` does not name.
      validation_as_test: a source without a labelled test split gives its validation split for it, as is usual where test
        answers are secret; its validation rows are then cut from train.
      read: in the place of `read`.
    """
    train_source = task.train or (hub.id if hub else None)
    dropped = {"validation_in_train": 0, "test_in_train": 0}

    def examples(split, source, names):
        """Returns the examples of the first of the named splits that has any, and its name."""
        own = hub is not None and source == hub.id
        subset = task.options.get("config", hub.subset if own else None)
        num_rows = 0
        for name in names[: None if source and has_splits(source) else 1] if source else ():
            found = read(f"task.{split}", source, name, subset, hub.revision if own else None) or []
            made = [make_example(f"{name}-{i}", row) for i, row in enumerate(found)]
            kept = [example for example in made if example is not None]
            num_rows += len(made)
            if len(kept) < len(made):
                dropped["unlabelled"] = dropped.get("unlabelled", 0) + len(made) - len(kept)
            if kept:
                return kept, name
        if split == "train" or getattr(task, split):
            if num_rows:
                raise ValueError(f"task.{split}={source!r}: none of its {num_rows} rows has an answer: name a split that has them")
            raise ValueError(f"task.{split}={source!r} has no split {split!r}: name its file, such as {split}.jsonl")
        return None, None

    inherited = train_source if train_source and has_splits(train_source) else None
    train, _ = examples("train", train_source, ["train"]) if task.num_train != 0 else ([], None)
    test_source = task.test or inherited or (hub.id if hub and task.num_test != 0 else None)
    test, found_in = examples("test", test_source, ["test", "validation"] if validation_as_test else ["test"])
    lent = found_in == "validation" and test_source == inherited
    validation, _ = examples("validation", task.validation or (None if lent else inherited), ["validation"])
    test = [] if task.num_test == 0 else test
    validation = [] if task.num_validation == 0 else validation

    rng = random.Random(seed)
    order = list(range(len(train)))
    rng.shuffle(order)
    train_keys = {query_key(example.query) for example in train}
    if test is None:
        if task.num_test is None or not train:
            raise ValueError("task.test=none: name a test file, or set task.num_test to cut that many rows from train")
        test, order, dropped["test_in_train"] = _cut("test", train, order, task.num_test)
    else:
        seen = train_keys | {query_key(example.query) for example in validation or ()}
        test, dropped["test_in_train"] = _unseen(test, seen)
        test = _first(task, "test", test, dropped["test_in_train"])
    if validation is None:
        validation, order, dropped["validation_in_train"] = _cut("validation", train, order, task.num_validation)
    else:
        validation, dropped["validation_in_train"] = _unseen(validation, train_keys)
        validation = _first(task, "validation", validation, dropped["validation_in_train"])
    if (task.num_train or 0) > len(order):
        cut = f" left of {len(train)} after validation or test was cut" if len(order) < len(train) else ""
        raise ValueError(f"task.num_train={task.num_train} is above the {len(order)} train rows{cut}: set it lower")
    train = [train[i] for i in sorted(order[: task.num_train])]
    return tuple(train), tuple(validation), tuple(test), dropped


def _cut(split, train, order, num):
    """Returns `num` rows off the end of `order`, what is left of it, and how many were passed over for a query met twice."""
    counts = collections.Counter(query_key(example.query) for example in train)
    cut, rest = [], []
    for i in reversed(order):
        (cut if len(cut) < num and counts[query_key(train[i].query)] == 1 else rest).append(i)
        if len(cut) == num:
            break
    if len(cut) < num or len(cut) == len(order):
        raise ValueError(
            f"task.num_{split}={num} leaves no train rows: {split} is cut from train, which has {len(order)} rows to give; "
            f"set it lower or name a file in task.{split}"
        )
    left = set(order) - set(cut)
    return [train[i] for i in sorted(cut)], [i for i in order if i in left], len(rest)


def _unseen(examples, seen):
    kept = [example for example in examples if query_key(example.query) not in seen]
    return kept, len(examples) - len(kept)


def _first(task, split, examples, num_dropped):
    num = getattr(task, f"num_{split}")
    if num == 0:
        return []
    if not examples:
        source = getattr(task, split) or task.train
        raise ValueError(f"task.{split}={source!r}: all its {num_dropped} queries are in train or validation: give other rows")
    if (num or 0) > len(examples):
        after = f" after {num_dropped} were dropped whose query is in train or validation" if num_dropped else ""
        raise ValueError(f"task.num_{split}={num} is above the {len(examples)} rows that there are{after}: set it lower")
    return examples[:num]


def check_splits(task: config.TaskConfig, hub: Hub) -> None:
    """Raises ValueError where a split's source cannot be one, or the hub has fewer rows than are asked for."""
    for split in ("train", "validation", "test"):
        if getattr(task, split) is not None:
            check_source(f"task.{split}", getattr(task, split))
    if task.train is None:
        needed = (task.num_train or 1) + (task.num_validation if task.validation is None else 0)
        if needed > hub.sizes["train"]:
            raise ValueError(
                f"task.num_train={task.num_train} with task.num_validation={task.num_validation} is above the "
                f"{hub.sizes['train']} train rows of {hub.id}, from which validation is cut: set one lower"
            )
        if task.test is None and (task.num_test or 1) > hub.sizes["test"]:
            raise ValueError(f"task.num_test={task.num_test} is above the {hub.sizes['test']} test rows of {hub.id}: set it lower")


def check_options(task: config.TaskConfig, names, numbers=()) -> None:
    """Raises ValueError for an unknown name in task.options, a value that is no text, and one of `numbers` not above 0."""
    known = (*names, *numbers)
    for name, value in task.options.items():
        if name not in known:
            has = f"{', '.join(known)}{config.nearest(name, known)}"
            raise ValueError(f"task.options.{name}={value!r} is unknown to {task.name}, which has {has}")
        if name in numbers:
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf")):
                raise ValueError(f"task.options.{name}={value!r} must be a number above 0, or none")
        elif not isinstance(value, str) or not value:
            raise ValueError(f"task.options.{name}={value!r} must be text")
