"""A run that is asked to stop, by SIGTERM or Ctrl-C, does so where nothing is lost."""

import contextlib
import os
import signal
import socket
import sys
import threading

from metatuner_jax import processes


class Stopped(BaseException):
    """The process was asked to stop. No Exception, so that nothing on the way takes it for a failure of its own."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number  # of the signal
        self.kept: str | None = None  # where what was done is kept, if anywhere


class Stop:
    """Whether this process was asked to stop, and whether it may."""

    def __init__(self):
        self.number = None  # of the first signal that asked
        self.waits = False  # whether what runs looks for itself whether it is to stop, by `check`
        self._held = 0

    @contextlib.contextmanager
    def heard(self):
        """Has signals heard while it is entered; a Ctrl-C that is not the first signal ends the process at once."""

        def hear(number, frame):
            if self.number is None:
                self.number = number
                if not self.waits:
                    raise Stopped(number)

        if threading.current_thread() is not threading.main_thread():  # no other is told of signals
            yield
            return
        before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
        told, tells = socket.socketpair()
        tells.setblocking(False)
        descriptor = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(told,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            tells.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _answer(self, told):
        """Answers signals at once, where `hear` has to wait for the end of what the main thread does, such as compiling."""
        asked = False
        with told:
            while byte := told.recv(1):
                if byte[0] not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if asked and byte[0] == signal.SIGINT:
                    os._exit(128 + signal.SIGINT)
                if not asked and self.waits:
                    text = f"\n{signal.Signals(byte[0]).name}: stopping where nothing is lost by it; Ctrl-C stops at once\n"
                    os.write(sys.stderr.fileno(), text.encode())
                asked = True

    @contextlib.contextmanager
    def held(self):
        """Has `check` let pass what is done while it is entered."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def check(self) -> None:
        """Raises Stopped where the process was asked to stop and may; where one of several was, in all of them."""
        if self._held:
            return
        number = max(processes.group.gather(self.number or 0))
        if number:
            raise Stopped(number)
