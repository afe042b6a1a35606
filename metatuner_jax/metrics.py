"""Where the metrics of a run go: metrics.jsonl, TensorBoard's files, and Weights & Biases where it is asked for."""

import contextlib
import importlib.util
import pathlib
import secrets
import time

from metatuner_jax import config as config_lib
from metatuner_jax import files, processes


def check(config: config_lib.TrainConfig) -> None:
    """Raises ValueError where Weights & Biases is asked for and not installed."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"train.wandb={config.wandb!r} needs wandb, which is not installed: pip install wandb, or set train.wandb=none")


class Metrics:
    """The log of a run, which goes on from a step; of several processes the first one writes it."""

    def __init__(self, workdir, config: config_lib.Config, first: int, began: float, say=lambda text: None):
        """Opens the log and drops the lines of steps from `first` on.

        Args:
          began: `time.perf_counter()` at the start of this process; what the run took before is taken off.
          say: takes a line where something goes wrong that ends no run.
        """
        self.say = say
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        files.write_lines(self.path, [line for line in files.read_lines(self.path) if line["step"] < first])
        logged = self.lines()
        self.began = began - (logged[-1]["wall_s"] if logged else 0)
        self.board = self.wandb = None
        if processes.group.index == 0 and config.train.tensorboard:
            self.board = Board(self.path.with_name("tensorboard"), first)
        if processes.group.index == 0 and config.train.wandb is not None:
            self.wandb = _start_wandb(self.path.parent, config)

    def lines(self) -> list[dict]:
        """Returns the lines so far."""
        return files.read_lines(self.path)

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken, those before it was resumed included."""
        return round(time.perf_counter() - self.began, 1)

    def add(self, line: dict) -> None:
        """Logs a line, which has its `step`. Lines of metrics.jsonl are on disk when this returns."""
        line = {**line, "wall_s": self.wall_s}
        files.append_lines(self.path, [line])
        self._show(numbers(line), line["step"])

    def finish(self, results: dict) -> None:
        """Logs the scores of a run that has ended, under `results/`. What cannot be written is said, as the run is done."""
        shown = {name: results[name] for name in ("before", "after", "adapter", "prompt", "validation") if name in results}
        found = {f"results/{name}": value for name, value in numbers(shown).items()}
        try:
            if self.board:
                self.board.add(found, results["checkpoint"])
        except OSError as error:
            self.say(f"note: {self.path.with_name('tensorboard')} lacks the results: {error.strerror}")
        self._send(lambda run: run.summary.update(found))  # not by a step, which may be before the newest one

    def _show(self, found, step):
        if self.board:
            self.board.add(found, step)
        self._send(lambda run: run.log(found, step=step))

    def _send(self, do):
        """Does something with the run at Weights & Biases, which gets no more once that has failed: it ends no run."""
        try:
            if self.wandb:
                do(self.wandb)
        except Exception as error:  # it has kinds of its own
            self.wandb = None
            self.say(f"note: Weights & Biases gets no more of this run: {' '.join(str(error).split())}")

    def close(self) -> None:
        """Writes what is not on disk yet."""
        if self.board:
            with contextlib.suppress(OSError):  # all was written at once, and what could not be has been said
                self.board.close()
        self._send(lambda run: run.finish())


class Board:
    """TensorBoard's files, written at once and not by a thread, whose errors nobody would hear of."""

    def __init__(self, folder: pathlib.Path, first: int):
        """Opens a new file, in which what older ones hold of steps from `first` on counts no more."""
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        # The time in a file's name is in seconds: two files could have one name.
        self.make, self.writer = event_pb2.Event, event_file_writer.EventsWriter(str(folder / "metrics"), f".{time.time_ns()}")
        self._write(step=first, session_log={"status": event_pb2.SessionLog.START})

    def add(self, found: dict[str, float], step: int) -> None:
        """Writes numbers of a step by their names."""
        self._write(step=step, summary={"value": [{"tag": name, "simple_value": value} for name, value in found.items()]})

    def _write(self, **event):
        self.writer.write_event(self.make(wall_time=time.time(), **event))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def numbers(line: dict) -> dict[str, float]:
    """Returns the numbers of a line, those of a section with its name before theirs: `validation/mean`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name}/{part}": number for part, number in numbers(value).items()}
        elif isinstance(value, (int, float)) and name != "step":
            found[name] = value
    return found


def _start_wandb(workdir, config):
    """Returns the run of Weights & Biases that belongs to a run folder, which keeps its id."""
    import wandb

    path = workdir / "wandb_id"
    with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(secrets.token_hex(8))
    how = {"project": config.train.wandb, "id": path.read_text(encoding="utf-8"), "name": workdir.name, "resume": "allow"}
    try:
        return wandb.init(**how, config=config_lib.plain(config), dir=str(workdir))
    except Exception as error:  # it has kinds of its own: nobody is logged in, there is no network
        text = " ".join(str(error).split())
        raise RuntimeError(f"train.wandb={config.train.wandb!r}: {text}; log in, set WANDB_MODE=offline, or train.wandb=none") from error
