"""What a run says while it works: bars in a terminal, plain lines elsewhere, and a log of when it did what."""

import contextlib
import datetime
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable

import tqdm

from metatuner_jax import processes
from metatuner_jax.stopping import Stop


class Progress:
    """Lines on standard output, and progress of what takes longer than a few seconds, which ends where the process is to stop."""

    def __init__(self, stream=None, every_s: float = 20.0, stop: Stop | None = None, log=None):
        """Takes the file of the log, if there is to be one, which lines are added to."""
        self.stream, self.stop, self.log = stream or sys.stdout, stop or Stop(), log and pathlib.Path(log)
        self.doing: str | None = None
        self.tasks: list[Callable] = []  # that are under way, the innermost last
        self.terminal = self.stream.isatty()
        self.every_s = every_s  # between plain lines about the same work

    def line(self, text: str = "") -> None:
        """Prints a line, above the bar where there is one. Of several processes the first one does."""
        if processes.group.index:
            return
        if self.terminal:
            tqdm.tqdm.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Adds text to the log alone, its lines with the time before them. A log that cannot be written ends no run."""
        if self.log and processes.group.index == 0:
            now = datetime.datetime.now().isoformat(" ", "milliseconds")
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                file.write("".join(f"{now} {line.strip()}\n" for line in text.splitlines() if line.strip()))

    def now(self, what: str) -> None:
        """Notes what is done from here on, where that is another thing than before: the last such note tells where a run ended."""
        if what != self.doing:
            self.doing = what
            self.note(f"now: {what}")

    @contextlib.contextmanager
    def wait(self, what: str):
        """Says now and then for how long something has been waited for, in a line of its own."""
        start = time.monotonic()
        with _every(self.every_s, lambda: self.line(f"  {what}, {_duration(time.monotonic() - start)} so far")):
            yield

    @contextlib.contextmanager
    def task(self, what: str, total: int, first: int = 0):
        """Yields advance(count, text=""), to be called as the work goes on; it raises Stopped where the process was asked to stop.

        While the first of it takes long, as it does where there is something to compile, that is said too.
        """
        if self.terminal and processes.group.index == 0:
            width = shutil.get_terminal_size().columns - 1  # a terminal that does not tell its width would get no bar
            with tqdm.tqdm(total=total, initial=first, desc=what, file=self.stream, leave=False, ncols=width, mininterval=0) as bar:

                def move(count, text=""):
                    bar.set_postfix_str(text, refresh=False)
                    bar.update(count)
                    self.stop.check()

                with _every(1.0, bar.refresh):  # the clock goes on where the work does not
                    yield move
            return
        done, start, said = first, time.monotonic(), time.monotonic()
        begun, since = None, start  # how much was done once the first was, and when: it may have waited for the compiler

        def advance(count, text=""):
            nonlocal done, said, begun, since
            done, now = done + count, time.monotonic()
            if begun is None:
                begun, since = done, now
            if now - said >= self.every_s and done < total:
                left = f", {_duration((now - since) / (done - begun) * (total - done))} left" if done > begun else ""
                self.line(f"  {what} {done}/{total}{', ' + text if text else ''}{left}")
                said = now
            self.stop.check()

        def wait():
            if done == first and self.tasks[-1] is advance:  # else what is done within says how it goes
                self.line(f"  {what} {done}/{total}, {_duration(time.monotonic() - start)} so far")

        self.tasks.append(advance)
        try:
            with _every(self.every_s, wait):
                yield advance
        finally:
            self.tasks.remove(advance)


@contextlib.contextmanager
def _every(seconds: float, do):
    """Calls do() in a thread of its own each so many seconds, while this is entered."""
    over = threading.Event()

    def run():
        while not over.wait(max(seconds, 0.05)):
            with contextlib.suppress(OSError):  # who reads has gone: the next line of the work itself meets that too
                do()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _duration(seconds: float) -> str:
    """Returns seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
