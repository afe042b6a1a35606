"""Several methods on one task: runs a grid of methods and seeds one after the other, and says what came out.

    python -m experiments.compare --config quickstart --seeds 0,1,2 --workdir runs/compare
"""

import collections
import dataclasses
import math
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time

from experiments import run, summary, tables
from metatuner_jax import config as config_lib
from metatuner_jax import files
from metatuner_jax import workdir as workdir_lib
from metatuner_jax.methods import METHODS

USAGE = f"""usage: python -m experiments.compare --config FILE [--methods A,B] [--seeds 0,1] [--workdir W] [--config.KEY=VALUE ...]

Runs each method with each seed, one after the other, in FOLDER/<method>-<seed> with its log beside it; writes comparison.json,
table.md and comparison.png. What is finished is not run again, and a run that was broken off goes on. One that fails is named, and
the others still run.

  --config FILE         a Python file with get_config(), or the bare name of one that comes with this package, such as quickstart
  --methods A,B         of {", ".join(config_lib.METHODS)} (default: all)
  --seeds 0,1,2         (default: 0,1,2)
  --workdir FOLDER      where everything goes (default: runs/compare-<name of the config file>)
  --rates R,S,T         first choose each method's learning rate: a short run for each of these values, on the first seed; the best
                        on validation rows is taken, of equals the one with the likelier answers. Without it: the config's own
  --search_steps N      the length of those short runs (default: 25)
  --sweep share         in place of methods, one method (default: metatuner_j) with a quarter, a half and three quarters of the
                        generator's layers shared; `--sweep rollouts`: with 2, 4 and 8 prompts a rollout
  --values A,B          other values for the sweep: layers shared, or prompts a rollout
  --publish FOLDER      copies config.json and results.json of each run there as it ends, such as results/quickstart_methods
  --plan                says what is left and how long it will take, and runs nothing
  --report              writes RESULTS.md from the published folders, and runs nothing
  --results FOLDER      where those are (default: results); RESULTS.md stands beside it
  --help                this text; `python -m experiments.run --help` lists the settings
"""

OPTIONS = (
    "--config", "--methods", "--seeds", "--workdir", "--rates", "--search_steps", "--sweep", "--values", "--publish", "--results",
)  # fmt: skip
SWEEPS = {"share": "generator.num_shared", "rollouts": "rollout.num_prompts"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table: a method, or a value of a sweep."""

    name: str
    method: str
    settings: tuple = ()  # (dotted key, text) pairs


@dataclasses.dataclass(frozen=True)
class Grid:
    """What was asked for."""

    config: pathlib.Path
    workdir: pathlib.Path
    publish: pathlib.Path | None
    given: tuple  # settings of the command line, (dotted key, text) pairs
    variants: tuple
    seeds: tuple
    rates: tuple  # texts; empty: no search
    search_steps: int
    sweep: str | None
    search_seed: int  # the first that was ever asked for

    def run(self, variant, seed, rate=None):
        """Returns the run of a variant with a seed."""
        rates = (("train.learning_rate", rate),) if rate else ()
        settings = (*self.given, ("method", variant.method), ("seed", str(seed)), *variant.settings, *rates)
        return Run(self, f"{variant.name}-{seed}", variant.name, settings)

    def searches(self):
        """Returns {method: {rate: its short run}} of the methods that have a learning rate."""
        methods = dict.fromkeys(v.method for v in self.variants if METHODS[v.method].learns)
        found = {method: {} for method in methods if self.rates}
        for method, runs in found.items():
            for rate in self.rates:
                short = (("train.num_steps", str(self.search_steps)), ("train.learning_rate", rate), ("eval.report", "validation"))
                settings = (*self.given, ("method", method), ("seed", str(self.search_seed)), *short)
                runs[rate] = Run(self, f"search/{method}-{rate}", "search " + method, settings)
        return found


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: a folder below the comparison's, and the settings that are not in the config file."""

    grid: Grid
    name: str
    kind: str  # runs of one kind take about as long as each other
    settings: tuple

    @property
    def folder(self):
        return self.grid.workdir / self.name

    @property
    def published(self):
        return self.grid.publish / self.name if self.grid.publish else None

    def results(self):
        """Returns results.json, from where it is published if not from the folder; None where the run is not finished."""
        found = files.read_json(self.folder / "results.json")
        return files.read_json(self.published / "results.json") if found is None and self.published else found

    def check(self):
        """Raises Mistake or ValueError where the settings are wrong, or a folder is another run's."""
        config = run.load_config(self.grid.config, self.settings)
        workdir_lib.check_workdir(config, self.folder)
        if self.published and self.published.exists():
            try:
                workdir_lib.check_workdir(config, self.published)
            except ValueError as error:
                raise run.Mistake(f"--publish={self.grid.publish}: {str(error).replace('--workdir', '--publish')}") from None
            for name in ("config.json", "results.json"):
                here, there = self.folder / name, self.published / name
                if (self.folder / "results.json").exists() and there.exists() and here.read_bytes() != there.read_bytes():
                    raise run.Mistake(f"{there} is of another run of these settings than {here}: delete one of the two")

    def publish(self):
        """Copies what is small of a finished run to where it is published, or back from there."""
        if self.published:
            here = (self.folder / "results.json").exists()
            source, target = (self.folder, self.published) if here else (self.published, self.folder)
            target.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "results.json"):  # in this order: a folder with results is a whole one
                if not (here and (target / name).exists()):
                    shutil.copyfile(source / name, target / name)


def main(argv=None) -> int:
    """Returns the exit code: 0 all done, 1 a run failed, 2 bad input, 130 broken off."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return 0
    try:
        options, given = run.read_arguments(argv, OPTIONS, ("--plan", "--report"))
        if "--report" in options:
            return write_report(pathlib.Path(options.get("--results", "results")))
        grid = read_grid(options, given)
        searches = grid.searches()
        for one in rest(grid, searches, known=False):
            config = run.load_config(grid.config, one.settings)
            if config.eval.report != "test":
                raise run.Mistake(
                    f"eval.report={config.eval.report!r} gives no test scores, which a comparison is of: leave it out"
                )
        for one in [*(one for runs in searches.values() for one in runs.values()), *rest(grid, searches)]:
            one.check()
        asked = join_saved(grid)
        if "--plan" in options:
            print(plan(grid, searches))
            return 0
        return work(grid, searches, asked)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("broken off: the same command goes on from here", file=sys.stderr)
        return 130


# --- the command line ---


def read_grid(options, given) -> Grid:
    """Returns what the arguments ask for; raises Mistake where they cannot be meant."""
    path = run.config_path(options)
    taken = {"method": "--methods", "seed": "--seeds"} | ({"train.learning_rate": "--rates"} if "--rates" in options else {})
    for key, _ in given:
        if key in taken:
            raise run.Mistake(f"--config.{key} is set by {taken[key]}: give one of the two")
    seeds = tuple(int(text) for text in words(options, "--seeds", "0,1,2", whole))
    rates = tuple(f"{float(text):g}" for text in words(options, "--rates", "", positive))
    steps = words(options, "--search_steps", "25", whole)
    if len(steps) != 1:
        raise run.Mistake(f"--search_steps={options['--search_steps']!r} must be one whole number")
    sweep = options.get("--sweep")
    if sweep is None:
        if "--values" in options:
            raise run.Mistake("--values is for --sweep share or --sweep rollouts: add one of them")
        methods = words(options, "--methods", ",".join(config_lib.METHODS), method)
        variants = tuple(Variant(name, name) for name in methods)
    else:
        if sweep not in SWEEPS:
            raise run.Mistake(f"--sweep={sweep!r} is not one of {', '.join(SWEEPS)}{config_lib.nearest(sweep, SWEEPS)}")
        methods = words(options, "--methods", "metatuner_j", method)
        if len(methods) != 1:
            raise run.Mistake(f"--methods={options['--methods']}: a sweep is of one method")
        values = words(options, "--values", "", whole) or sweep_values(sweep, run.load_config(path, given))
        variants = tuple(Variant(f"{sweep}-{value}", methods[0], ((SWEEPS[sweep], value),)) for value in values)
    workdir = run.path_of(options, "--workdir", f"runs/{f'sweep-{sweep}' if sweep else 'compare'}-{path.stem}")
    publish = run.path_of(options, "--publish") if "--publish" in options else None
    if publish and publish.resolve() == workdir.resolve():
        raise run.Mistake(f"--publish={publish} is the --workdir: name another folder, such as results/{workdir.name}")
    search_seed = next((saved["seeds"][0] for saved in saved_grids(workdir, publish)), seeds[0])
    return Grid(path, workdir, publish, tuple(given), variants, seeds, rates, int(steps[0]), sweep, search_seed)


def saved_grids(*folders):
    """Returns the contents of grid.json in the folders that have one."""
    return [saved for folder in folders if folder and (saved := files.read_json(folder / "grid.json"))]


def words(options, name, default, check):
    """Returns the words of a list with commas between, each once, in their order; raises Mistake where check says what is wrong."""
    text = options.get(name, default)
    found = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if name in options and not found:
        raise run.Mistake(f"{name}={text!r} names nothing: give values with commas between")
    for word in found:
        wrong = check(word)
        if wrong:
            raise run.Mistake(f"{name}={text}: {word!r} {wrong}")
    return found


def whole(word):
    return None if word.isdecimal() else "must be a whole number of at least 0"


def positive(word):
    try:
        return None if 0 < float(word) < math.inf else "must be a number above 0"
    except ValueError:
        return "must be a number above 0"


def method(word):
    near = config_lib.nearest(word, config_lib.METHODS)
    return None if word in config_lib.METHODS else f"is not one of {', '.join(config_lib.METHODS)}{near}"


def sweep_values(sweep, config):
    """Returns the values of the paper's sweeps, as texts."""
    if sweep == "rollouts":
        return ["2", "4", "8"]
    from metatuner_jax import job, pretrained

    layers = job.of_model(config, "generator", pretrained.load_config).num_layers
    return list(dict.fromkeys(str(round(share * layers)) for share in (0.25, 0.5, 0.75)))


def join_saved(grid) -> dict:
    """Returns the content of grid.json: what was asked for, now and in earlier calls with the same folders.

    Raises:
      Mistake: a folder holds a comparison with other settings.
    """
    here, comes = grid.config.resolve().is_relative_to(pathlib.Path.cwd()), grid.config.parent == run.CONFIGS
    asked = {
        "config": os.path.relpath(grid.config) if here else grid.config.stem if comes else str(grid.config),
        "settings": dict(grid.given), "rates": list(grid.rates), "search_steps": grid.search_steps if grid.rates else None,
        "sweep": grid.sweep, "method": grid.variants[0].method if grid.sweep else None,
    }  # fmt: skip
    everything = {"variants": [v.name for v in grid.variants], "seeds": list(grid.seeds), "machines": [machine()]}
    for saved in saved_grids(grid.publish, grid.workdir):
        differing = [f"{key}={saved.get(key)} there, {asked[key]} here" for key in asked if saved.get(key) != asked[key]]
        if differing:
            raise run.Mistake(f"--workdir or --publish holds another comparison: {'; '.join(differing)}; give other folders")
        everything = {key: list(dict.fromkeys([*saved[key], *now])) for key, now in everything.items()}
    return {"command": command(grid, asked, everything["variants"], everything["seeds"]), **asked, **everything}


def command(grid, asked, variants, seeds) -> str:
    """Returns the command line that makes the comparison from nothing."""
    name = (grid.publish or grid.workdir).name
    said = ["python", "-m", "experiments.compare", "--config", asked["config"]]
    if grid.sweep:
        values = [variant.removeprefix(grid.sweep + "-") for variant in variants]
        said += ["--sweep", grid.sweep, "--values", ",".join(values), "--methods", asked["method"]]
    else:
        said += ["--methods", ",".join(variants)]
    said += ["--seeds", ",".join(map(str, seeds))]
    if grid.rates:
        said += ["--rates", ",".join(grid.rates), "--search_steps", str(grid.search_steps)]
    settings = [f"--config.{key}={value}" for key, value in grid.given]
    return shlex.join([*said, *settings, "--workdir", f"runs/{name}", "--publish", f"results/{name}"])


def machine() -> str:
    """Returns the processor and the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {cores} core{'s' * (cores > 1)}"


# --- the runs ---


def rest(grid, searches, known=True):
    """Returns the runs that are no search, in their order; those whose rate is still to be searched only where known is False."""
    found = []
    for seed in grid.seeds:
        for variant in grid.variants:
            rates = searches.get(variant.method)
            ended = {rate: results for rate, one in (rates or {}).items() if (results := one.results())}
            if ended or not rates or not known:
                found.append(grid.run(variant, seed, summary.best_rate(ended) if ended else None))
    return found


def estimate(one, took):
    """Returns the seconds that a run will take: the mean of its kind, else of all runs as long; None without any.

    Args:
      took: {kind: [seconds of the finished runs]}.
    """
    similar = [s for kind, seconds in took.items() if kind.startswith("search ") == one.kind.startswith("search ") for s in seconds]
    seconds = took.get(one.kind) or similar
    return sum(seconds) / len(seconds) if seconds else None


def times(runs):
    """Returns {kind: [seconds]} of the finished ones."""
    took = collections.defaultdict(list)
    for one in runs:
        results = one.results()
        if results:
            took[one.kind].append(results["wall_s"])
    return took


def left(runs, took) -> str:
    """Returns how long these runs will take, as text."""
    seconds = [estimate(one, took) for one in runs]
    known = [s for s in seconds if s is not None]
    text = f"about {tables.duration(sum(known))}" if known else ""
    guessed = sum(s is not None and one.kind not in took for one, s in zip(runs, seconds))
    if guessed:
        text += f" ({guessed} run{'s' * (guessed > 1)} guessed from others)"
    if len(known) < len(seconds):
        unknown = len(seconds) - len(known)
        text += (" and " if text else "") + f"{unknown} run{'s' * (unknown > 1)} of a length not known yet"
    return text or "nothing"


def plan(grid, searches) -> str:
    """Returns what is done, what is left and how long that will take."""
    runs = [*(one for found in searches.values() for one in found.values()), *rest(grid, searches, known=False)]
    took = times(runs)
    lines, undone = [], []
    for one in runs:
        results = one.results()
        if results:
            lines.append(f"  done  {one.name}: {outcome(results)}")
        else:
            undone.append(one)
            seconds = estimate(one, took)
            begun = ", begun" if (one.folder / "config.json").exists() else ""
            expected = "no run like it is done yet" if seconds is None else f"about {tables.duration(seconds)}"
            lines.append(f"  left  {one.name}{begun}: {expected}")
    return "\n".join([*lines, f"{len(runs) - len(undone)} of {len(runs)} runs are done; left: {left(undone, took)}"])


def outcome(results) -> str:
    """Returns a finished run in a few words."""
    which = "after" if "after" in results else "validation"
    rows = "" if which == "after" else " of validation rows"
    return f"{tables.percent(results[which]['mean'])}%{rows} in {tables.duration(results['wall_s'])}"


def work(grid, searches, asked) -> int:
    """Does all that is left; returns the exit code."""
    for folder in filter(None, (grid.workdir, grid.publish)):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "grid.json", asked)
    short = [one for found in searches.values() for one in found.values()]
    failed = do(short, rest(grid, searches, known=False), grid)
    for name, found in searches.items():
        ended = {rate: results for rate, one in found.items() if (results := one.results())}
        if ended:
            best = summary.best_rate(ended)
            print(f"learning rate of {name}: {best}, {outcome(ended[best])}", flush=True)
        else:
            failed.append(f"{name} with every seed (no run of its search for a learning rate ended)")
    runs = rest(grid, searches)
    for one in runs:
        one.check()
    failed += do(runs, [], grid)
    done = sum(bool(one.results()) for one in runs)
    if done:
        print("\n" + tables.score_table(summarise(grid)))
    print(f"\n{done} of {len(grid.variants) * len(grid.seeds)} runs are done. Everything is in {grid.workdir}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def do(runs, later, grid) -> list[str]:
    """Does these runs one after the other, without those that are done; returns the names of those that failed.

    Args:
      later: what is to follow them, for the time that is left.
    """
    failed = []
    for i, one in enumerate(runs):
        if not one.results():
            undone = [other for other in [*runs[i:], *later] if not other.results()]
            log = f"{one.folder}.log"
            print(f"[{i + 1}/{len(runs)}] {one.name}, log in {log}; left: {left(undone, times([*runs, *later]))}", flush=True)
            began = time.perf_counter()
            settings = [f"--config.{key}={value}" for key, value in one.settings]
            code = start(["--config", str(grid.config), "--workdir", str(one.folder), *settings], log)
            if code or not one.results():
                failed.append(one.name)
                took = tables.duration(time.perf_counter() - began)
                print(f"  failed with exit code {code} after {took}: {last_line(log)}", flush=True)
                continue
            print(f"  {outcome(one.results())}", flush=True)
            if one.kind in [variant.name for variant in grid.variants]:
                summarise(grid)
        one.publish()
    return failed


COMMAND = (sys.executable, "-m", "experiments.run")


def start(arguments, log) -> int:
    """Returns the exit code of a run in a process of its own, whose output is added to a file; it ends where we are broken off."""
    pathlib.Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        child = subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise


def last_line(log) -> str:
    lines = pathlib.Path(log).read_text(encoding="utf-8", errors="replace").split("\n") if pathlib.Path(log).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def summarise(grid) -> dict:
    """Writes the figures, the tables and the plot of what is done, publishes the plot, and returns the figures."""
    figures = summary.summarise(grid.workdir)
    files.write_json(grid.workdir / "comparison.json", figures)
    (grid.workdir / "table.md").write_text(tables.tables(figures) + "\n", encoding="utf-8")
    tables.draw(figures, grid.workdir / "comparison.png")
    if grid.publish:
        shutil.copyfile(grid.workdir / "comparison.png", grid.publish / "comparison.png")
    return figures


def write_report(results) -> int:
    """Writes RESULTS.md beside a folder of results."""
    if not results.is_dir():
        raise run.Mistake(f"--results={results} is no folder: name the one with the published runs")
    path = results.parent / "RESULTS.md"
    path.write_text(tables.write(results), encoding="utf-8")
    print(f"{path} is written")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended is being broken off: the run ends too
    sys.exit(main())
