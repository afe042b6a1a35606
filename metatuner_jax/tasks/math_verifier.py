"""Whether two formulas are equal, by math-verify in a process of its own, which is ended when it takes too long.

SymPy can work on a few characters such as 9**9**9 for hours, and holds the interpreter while it does: neither an exception
nor a thread can stop it. This file is also what that process runs, so nothing but the standard library is imported at its top.
"""

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading

MAX_GIB = 4  # memory of the process, where the system can limit it
_START_S = 120  # importing SymPy on a busy machine


class Verifier:
    """Compares formulas in one process, started when needed and anew after one that hung; any thread may ask."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.num_started = 0
        self._lock = threading.Lock()
        self._process = None
        atexit.register(self.close)

    def equal(self, gold: str, texts: list[str]) -> bool:
        """Returns whether one of the texts holds what the gold text holds; False where that takes more than `seconds` in all.

        Raises:
          RuntimeError: math-verify cannot be run.
        """
        with self._lock:
            if self._process is None:
                self._start()
            request = json.dumps({"gold": gold, "texts": texts, "alarm": int(self.seconds) + 10})
            reply = self._ask(request, self.seconds)
            return reply == "1"

    def close(self):
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _start(self):
        # -P: the folder of this file is no place to import from. By path, so that the package itself is not imported.
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        self.num_started += 1
        reply = self._ask(None, _START_S)
        if reply != "ready":
            self.close()
            raise RuntimeError(f"math-verify cannot be run by {command[0]}: {reply or 'it ends, or hangs, without a word'}")

    def _ask(self, request, seconds):
        """Returns the next line that the process writes, or "" where it ended or was ended before."""
        process, ended = self._process, threading.Event()

        def end():
            ended.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            reply = process.stdout.readline().strip()
        except BrokenPipeError:
            reply = ""
        timer.cancel()
        timer.join()
        if ended.is_set() or not reply:
            self.close()
        return reply


def _serve():
    """Answers requests from standard input, one JSON object a line, until it ends."""
    try:
        import math_verify
    except ImportError as error:
        print(error, flush=True)
        return
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # parsers print what they cannot read
    os.dup2(silence, 2)
    _limit_memory()
    _equal(math_verify, "$x+1$", ["$1+x$"])  # what is imported late is imported now
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "alarm"):  # ends this process if nobody is left who would
            signal.alarm(request["alarm"])
        print(int(_equal(math_verify, request["gold"], request["texts"])), file=replies, flush=True)
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _equal(math_verify, gold, texts):
    def parse(text):
        return math_verify.parse(text, parsing_timeout=None)

    try:
        gold = parse(gold)
        return any(math_verify.verify(gold, parse(text), timeout_seconds=None) for text in texts)
    except Exception:  # MemoryError, RecursionError and whatever SymPy raises: not equal
        return False


def _limit_memory():
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MAX_GIB * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):  # not every system can
        pass


if __name__ == "__main__":
    _serve()
