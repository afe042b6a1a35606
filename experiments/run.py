"""The command line: one run of one config, from data to results.

    python -m experiments.run --config quickstart --workdir runs/quickstart --config.train.num_steps=20
"""

import argparse
import contextlib
import difflib
import importlib.util
import pathlib
import sys
import traceback

from metatuner_jax import config as config_lib
from metatuner_jax import memory, processes, stopping
from metatuner_jax import workdir as workdir_lib

CONFIGS = pathlib.Path(__file__).parent / "configs"
INSTALLED = tuple(sorted(path.stem for path in CONFIGS.glob("[!_]*.py")))  # the configs that a bare name finds
USAGE = f"""usage: python -m experiments.run --config FILE [--workdir FOLDER] [--config.SECTION.NAME=VALUE ...]

Trains what the config says and shows on unseen queries how much better the model answers. A second run with the same
workdir resumes; a finished one says so and changes nothing.

  --config FILE     a Python file with get_config(), or the bare name of one that comes with this package: {", ".join(INSTALLED)}
  --workdir FOLDER  where everything goes (default: runs/<name of the config file>)
  --coordinator HOST:PORT --num_processes N --process_id I
                    one of several processes that do the run together, I from 0 to N-1, the first one at HOST:PORT; on TPU
                    pods and on Slurm they find one another
  --plan            say what the run would take, and do nothing: with --devices N (default: those there are), --memory GIB of each
                    (default: what it says), --topology v5e:4x4 for what the compiler of these TPUs says, which need not be there,
                    --json FILE; exit code 1 where it does not fit
  --help            this text

Settings and their defaults (`none` clears an optional one):
"""


class Mistake(ValueError):
    """What is wrong with a command line: one line for standard error, exit code 2."""


def main(argv=None) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(USAGE + "\n".join(f"  --config.{key}={_text(value)}\n      {help}" for key, value, help in config_lib.leaves()))
        return 0
    stop = stopping.Stop()
    try:
        with stop.heard():
            code = run(argv, stop)
    except stopping.Stopped as stopped:
        print(f"stopped by {stopped}: {stopped.kept or 'nothing was done that could be lost'}", file=sys.stderr)
        code = 128 + stopped.number
        if not stop.waits:  # this process alone
            processes.group.fail(f"stopped by {stopped}", code)
    except Exception as error:
        if processes.group.count > 1:
            traceback.print_exc()
            processes.group.fail(f"{type(error).__name__}: {error}", 1)
        raise
    processes.group.end(code)
    return code


def run(argv, stop) -> int:
    """Does what the command line says. Returns the exit code.

    Raises:
      Stopped: the process was asked to stop.
    """
    with contextlib.ExitStack() as folder:
        try:
            if "--plan" in argv:
                from experiments import plan

                return plan.main(argv)
            path, workdir, assignments, others = parse(argv)
            config = load_config(path, assignments)
            workdir_lib.check_workdir(config, workdir, goes_on=True)  # before jax is loaded
            from metatuner_jax import checkpoint, job
            from metatuner_jax.progress import Progress

            work = folder.enter_context(job.begin(config, workdir, others))
            if work is None:
                print(f"{workdir} holds this run, finished: nothing to do. Its results:\n\n{workdir_lib.results_of(workdir)}")
                return 0
        except (ValueError, OSError) as error:
            text = " ".join(str(error).split())
            print("error: " + text, file=sys.stderr)
            processes.group.fail(text, 2)
            return 2
        progress = Progress(stop=stop, log=workdir / "run.log")
        try:
            job.do(work, workdir, progress)
        except stopping.Stopped as stopped:
            steps = [step for step in checkpoint.steps_in(workdir / "checkpoints") if not work.checkpoints.get(step)]
            stopped.kept = f"{workdir}/checkpoints/{steps[-1]} has all that was trained; the same command goes on from it" if steps else None
            progress.note(f"stopped by {stopped}")
            raise
        except (RuntimeError, ValueError, OSError) as error:
            job.tell(error, progress)
            return 1
    return 0


# --- the command line ---


def answered(argv, usage: str, do) -> int:
    """Returns the exit code of a command: 0 once do(argv) is done, after one line 2 where it raises what the user can mend, 1 without memory.

    Args:
      usage: what --help prints.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(usage)
        return 0
    try:
        do(argv)
    except (ValueError, OSError, memory.OutOfMemory) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, memory.OutOfMemory) else 2
    return 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, with no usage before it."""

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def need(options, *names) -> None:
    """Raises Mistake where an option that must be given is not."""
    for name in names:
        if name not in options:
            raise Mistake(f"{name} is missing; see --help")


def parse(argv):
    """Returns (config path, workdir, [(dotted key, text)], what `processes.join` takes).

    Raises:
      Mistake: an argument is unknown, or one is missing.
    """
    options, assignments = read_arguments(argv, ("--config", "--workdir", *OF_PROCESSES), ("--plan",))
    path = config_path(options)
    return path, path_of(options, "--workdir", f"runs/{path.stem}"), assignments, parse_processes(options)


def config_path(options) -> pathlib.Path:
    """Returns the config file that --config names: one that is there, or by its bare name one of those that come with this package.

    Raises:
      Mistake: --config is missing, or is the bare name of neither.
    """
    path = path_of(options, "--config")
    if path.is_file() or path.suffix or path.name != str(path):
        return path
    if path.name not in INSTALLED:
        near = config_lib.nearest(path.name, INSTALLED)
        raise Mistake(f"--config={config_lib.short(path.name)} is neither a file nor one of the configs that come with this package: {', '.join(INSTALLED)}{near}")
    return CONFIGS / f"{path.name}.py"


def path_of(options, name, default=None):
    """Returns the path that an option names; raises Mistake where it names none."""
    value = options.get(name, default)
    if value is None:
        raise Mistake(f"{name} is missing: name a file with get_config(), or one that comes with this package, such as quickstart")
    if not value:
        raise Mistake(f"argument {name} needs a value: {name}=VALUE")
    if "\0" in value:
        raise Mistake(f"{name}={config_lib.short(value)} holds a NUL, which no name of a file has: take it out")
    return pathlib.Path(value)


OF_PROCESSES = ("--coordinator", "--num_processes", "--process_id")


def parse_processes(options) -> dict:
    """Returns what `processes.join` takes, from the options of the command line."""
    missing = [name for name in OF_PROCESSES if name not in options]
    if len(missing) == len(OF_PROCESSES):
        return {}
    if missing:
        raise Mistake(f"{missing[0]} is missing: {', '.join(OF_PROCESSES)} go together")
    address, *numbers = (options[name] for name in OF_PROCESSES)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise Mistake(f"--coordinator={address} must be host:port, where process 0 is to listen")
    for name, number in zip(OF_PROCESSES[1:], numbers):
        if not number.isdecimal():
            raise Mistake(f"{name}={number} must be a whole number")
    count, index = map(int, numbers)
    if index >= count:
        raise Mistake(f"--process_id={index} must be below --num_processes={count}: the processes are numbered from 0")
    return {"coordinator": address, "count": count, "index": index}


def read_arguments(argv, names, flags=()):
    """Returns ({name: text}, [(dotted key, text)]): the options, and the settings given as --config.KEY; a flag's text is empty.

    Of a setting that is given several times the last one counts.

    Raises:
      Mistake: an argument is unknown, lacks its value, or is an option that is given twice.
    """
    options, assignments = {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in flags:
            options[word] = ""
            continue
        if name not in names and not name.startswith("--config."):
            near = difflib.get_close_matches(name, [*names, *flags, "--help"], n=1)
            raise Mistake(f"argument {config_lib.short(word)} is unknown{f'; did you mean {near[0]}?' if near else ''}; see --help")
        if not equals:
            if not words:
                raise Mistake(f"argument {name} needs a value: {name}=VALUE")
            value = words.pop(0)
        if name in names:
            if name in options:
                raise Mistake(f"argument {name} is given twice: give it once")
            options[name] = value
        else:
            assignments.append((name.removeprefix("--config."), value))
    return options, assignments


def load_config(path, assignments) -> config_lib.Config:
    """Returns the checked config of a file with the command line's settings."""
    _, given = load_module(path)
    try:  # through the dataclasses and back: the file's tree may lack a section or hold a number in its place
        tree = config_lib.to_tree(given if isinstance(given, config_lib.Config) else config_lib.from_tree(given))
    except ValueError as error:
        raise Mistake(f"--config={path}: {error}") from None
    config_lib.override(tree, assignments)
    config = config_lib.from_tree(tree)
    config_lib.check(config)
    return config


def load_module(path):
    """Returns the module of a config file, and what its get_config returns."""
    if not path.is_file():
        raise Mistake(f"--config={path} is no file: name a Python file with get_config(), such as experiments/configs/quickstart.py")
    spec = importlib.util.spec_from_file_location("run_config", path)
    if spec is None:
        raise Mistake(f"--config={path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _no_bytecode():
            spec.loader.exec_module(module)
        return module, module.get_config()
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise Mistake(f"--config={path} could not be read: {type(error).__name__}: {error}; mend it, or name another file") from None


@contextlib.contextmanager
def _no_bytecode():
    """Has Python leave no __pycache__ beside what it imports while this is entered."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _text(value):
    return ",".join(value) if isinstance(value, tuple) else "none" if value is None else value


if __name__ == "__main__":
    sys.exit(main())
