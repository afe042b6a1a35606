"""Several processes that do one run together: what they tell one another, and that each of them ends when another one is gone.

Arrays are jax's affair. What the hosts decide, such as scores, what is found on disk and whether to stop, goes as JSON through the first
process, and so does the news that a process has failed: jax alone would hang in its exit barrier, and then abort.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import socket
import sys
import threading
import time

BEAT_S, SILENT_S = 2.0, 20.0  # between signs of life, and without any before a process counts as gone
WAIT_S = 300  # for all processes to be there


class Group:
    """The processes of a run. Its methods are called by all of them, in the same order."""

    def __init__(self, index: int = 0, count: int = 1, links=()):
        """Takes this process's number, how many there are, and the links (socket) to those it talks to, by their number."""
        self.index, self.count = index, count
        self._links = {peer: _Link(self, peer, link) for peer, link in dict(links).items()}
        self._lock = threading.Lock()
        for link in self._links.values():
            link.start()

    def gather(self, value) -> list:
        """Returns the value (what JSON can hold) that each process gives, in their order."""
        if self.count == 1:
            return [value]
        if self.index:
            self._links[0].send({"value": value})
            return self._links[0].values.get()
        values = [value, *(self._links[peer].values.get() for peer in range(1, self.count))]
        for link in self._links.values():
            link.send({"value": values})
        return values

    def from_first(self, make):
        """Returns make() as the first process gets it."""
        return self.gather(None if self.index else make())[0]

    def shared(self, do, *items) -> list:
        """Returns do(*item) for all items, of which each process does its share."""
        if self.count == 1:
            return [do(*item) for item in zip(*items, strict=True)]
        mine = [do(*item) for item in itertools.islice(zip(*items, strict=True), self.index, None, self.count)]
        shares = self.gather(mine)
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def fail(self, text: str, code: int) -> None:
        """Where there are others, ends this process, and tells them why; they end too. jax would wait for them."""
        if self.count > 1:
            self._end(f"process {self.index} has failed: {text}", code)

    def wait_for_news(self) -> None:
        """Gives the news that another process is gone the time to come, and to end this one."""
        if self.count > 1:
            time.sleep(3)

    def close(self) -> None:
        """Takes leave: from here on no process misses another one."""
        self.gather(None)
        for link in self._links.values():
            link.leave()

    def lost(self, text: str) -> None:
        """Ends this process, at once, because of another one."""
        self._end(text, 1, f"failed: {text}; the same command, in all processes, goes on from the newest checkpoint")

    def _end(self, text, code, line=None):
        with self._lock:  # never left: one thread ends the process
            for link in self._links.values():
                link.send({"failed": text})
            sys.stdout.flush()
            if line:
                print(line, file=sys.stderr, flush=True)
            os._exit(code)


class _Link:
    """What one process hears from another one, and tells it."""

    def __init__(self, group, peer: int, link: socket.socket):
        self.group, self.peer, self.link = group, peer, link
        self.values, self.heard, self.left, self.lock = queue.SimpleQueue(), time.monotonic(), False, threading.Lock()

    def start(self):
        for work in (self._hear, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def send(self, message):
        with contextlib.suppress(OSError), self.lock:  # `_hear` finds out too
            self.link.sendall((json.dumps(message) + "\n").encode())

    def leave(self):
        self.left = True
        self.send({"left": True})

    def _hear(self):
        with contextlib.suppress(OSError, ValueError):  # a link that breaks, and half a line
            for line in self.link.makefile("r", encoding="utf-8"):
                self.heard = time.monotonic()
                message = json.loads(line)
                if "value" in message:
                    self.values.put(message["value"])
                elif "failed" in message:
                    self.group.lost(message["failed"])
                elif "left" in message:
                    self.left = True
        if not self.left:
            self.group.lost(f"process {self.peer} has died")

    def _beat(self):
        while not self.left:
            time.sleep(BEAT_S)
            self.send({})
            if not self.left and time.monotonic() - self.heard > SILENT_S:
                self.group.lost(f"nothing has been heard from process {self.peer} for {SILENT_S:.0f} s")


group = Group()  # that this process belongs to: alone, until `join`


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the processes of a run, before jax is used: those that are named, or those that jax finds on TPU pods, on Slurm and the like.

    Args:
      coordinator: host:port at which the first process listens.

    Raises:
      ValueError: the coordinator does not answer, or the processes do not come together.
    """
    global group
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    if coordinator and index:
        _await(coordinator)
    try:
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=WAIT_S)
    except (ValueError, RuntimeError) as error:
        # jax knows no cluster; or it is in use already, by this process alone
        if coordinator is None and re.search("coordinator_address should be defined|before any JAX calls", str(error)):
            return
        raise ValueError(
            f"the processes of this run did not come together ({str(error).splitlines()[0]}): start all of them, each with the same address "
            "and a number of its own"
        ) from None
    if jax.process_count() > 1:
        group = _connect()


def _await(coordinator):
    """Waits until the first process listens; jax itself would say nothing for minutes, and then abort."""
    host, _, port = coordinator.rpartition(":")
    deadline, said = time.monotonic() + WAIT_S, False
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"--coordinator={coordinator}: nothing answers there after {WAIT_S} s ({error}): start process 0, or mend the address") from None
            if not said:
                print(f"waiting for process 0 at {coordinator}", flush=True)
                said = True
            time.sleep(0.2)


def _connect() -> Group:
    """Returns the group of all of jax's processes: each has a link with the first one."""
    import jax
    import numpy as np
    from jax._src import distributed  # where jax keeps the coordinator's address, found or given
    from jax.experimental import multihost_utils

    index, count = jax.process_index(), jax.process_count()
    server = socket.create_server(("", 0), backlog=count) if index == 0 else None
    port = int(multihost_utils.broadcast_one_to_all(np.int32(server.getsockname()[1] if server else 0)))
    if server is None:
        host = distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")
        link = socket.create_connection((host, port), timeout=WAIT_S)
        link.settimeout(None)
        link.sendall(index.to_bytes(4, "big"))
        return Group(index, count, {0: link})
    links = {}
    while len(links) < count - 1:
        link, _ = server.accept()
        links[int.from_bytes(link.recv(4, socket.MSG_WAITALL), "big")] = link
    server.close()
    return Group(index, count, links)
