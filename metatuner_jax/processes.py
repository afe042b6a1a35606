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
import struct
import sys
import threading
import time
from typing import Any

BEAT_S, SILENT_S = 2.0, 20.0  # between signs of life, and without any before a process counts as gone
WAIT_S = 300  # for all processes to be there
END_S = 10  # for the others to end before the first one


class Group:
    """The processes of a run. Its methods are called by all of them, in the same order."""

    def __init__(self, index: int = 0, count: int = 1, links=()):
        """Takes this process's number, how many there are, and the links (socket) to those it talks to, by their number."""
        self.index, self.count = index, count
        self._links = {peer: _Link(self, peer, link) for peer, link in dict(links).items()}
        self._lock, self._calls = threading.Lock(), 0
        for link in self._links.values():
            link.start()

    def gather(self, value) -> list:
        """Returns the value (what JSON can hold) that each process gives, in their order."""
        if self.count == 1:
            return [value]
        self._calls += 1
        if self.index:
            self._links[0].send({"value": value, "call": self._calls})
            return self._links[0].values.get()
        values = [value]
        for peer in range(1, self.count):
            theirs, call = self._links[peer].values.get()
            if call != self._calls:
                self.lost(f"process {peer} does not do what process 0 does: all must have the same command, files and versions")
            values.append(theirs)
        for link in self._links.values():
            link.send({"value": values})
        return values

    def from_first(self, make):
        """Returns make() as the first process gets it."""
        return self.gather(None if self.index else make())[0]

    def shared(self, do, *items) -> list:
        """Returns `do(*item)` for all items, of which each process does its share."""
        if self.count == 1:
            return [do(*item) for item in zip(*items, strict=True)]
        mine = [do(*item) for item in itertools.islice(zip(*items, strict=True), self.index, None, self.count)]
        shares = self.gather(mine)
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def fail(self, text: str, code: int) -> None:
        """Where there are others, ends this process, and tells them why; they end too. jax would wait for them."""
        if self.count > 1:
            self._end(f"process {self.index} has failed: {text}", code, said=True)

    def wait_for_news(self) -> None:
        """Gives the news that another process is gone the time to come, and to end this one."""
        if self.count > 1:
            time.sleep(3)

    def end(self, code: int) -> None:
        """Where there are others, ends this process once they are as far, the first one last: it has what they need of jax until they end."""
        if self.count > 1:
            self.gather(None)
            for link in self._links.values():
                link.leave()
            if self.index == 0:
                for link in self._links.values():
                    link.gone.wait(END_S)
            sys.stdout.flush()
            os._exit(code)  # jax would wait at its exit for each process, and hang where one dies meanwhile

    def lost(self, text: str, code: int = 1) -> None:
        """Ends this process, at once, because of another one."""
        self._end(text, code)

    def _end(self, text, code, said=False):
        with self._lock:  # never left: one thread ends the process
            try:
                for link in self._links.values():
                    link.send_at_last({"failed": text, "code": code})
                if not said:
                    more = "; the same command, in all processes, goes on from what is saved" if code == 1 else ""
                    sys.stderr.flush()
                    errors = os.dup(2)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what jax logs of it in its own threads would stand after the line
                    os.write(errors, f"{'failed' if code == 1 else 'ended'}: {text}{more}\n".encode())
                sys.stdout.flush()
            finally:
                os._exit(code)


class _Link:
    """What one process hears from another one, and tells it."""

    def __init__(self, group, peer: int, link: socket.socket):
        self.group, self.peer, self.link = group, peer, link
        self.values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.heard, self.left, self.lock, self.gone = time.monotonic(), False, threading.Lock(), threading.Event()
        # One that takes nothing any more keeps no sender for longer.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SILENT_S), 0))

    def start(self):
        for work in (self._hear, self._beat, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def send(self, message):
        with contextlib.suppress(OSError), self.lock:  # `_hear` and `_watch` find out too
            self.link.sendall((json.dumps(message) + "\n").encode())

    def send_at_last(self, message):
        """Sends, but waits for nothing that another thread is sending."""
        if self.lock.acquire(timeout=1):
            with contextlib.suppress(OSError):
                self.link.sendall((json.dumps(message) + "\n").encode())

    def leave(self):
        self.left = True
        self.send({"left": True})

    def _hear(self):
        rest = b""
        with contextlib.suppress(OSError):
            while chunk := self.link.recv(2**16):
                self.heard = time.monotonic()
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        self.gone.set()
        if not self.left:
            self.group.lost(f"process {self.peer} has died")

    def _take(self, message):
        if "failed" in message:
            self.group.lost(message["failed"], message["code"])
        elif "left" in message:
            self.left = True
        elif "value" in message:
            self.values.put((message["value"], message["call"]) if self.peer else message["value"])

    def _beat(self):
        while not self.left:
            time.sleep(BEAT_S)
            self.send({})

    def _watch(self):
        while not self.left:
            time.sleep(BEAT_S)
            if not self.left and time.monotonic() - self.heard > SILENT_S:
                self.group.lost(f"nothing has been heard from process {self.peer} for {SILENT_S:.0f} s")


group = Group()  # that this process belongs to: alone, until `join`


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the processes of a run, before jax is used: those that are named, or those that jax finds on TPU pods, on Slurm and the like.

    Args:
      coordinator: host:port at which the first process listens.

    Raises:
      ValueError: the processes do not come together.
    """
    global group
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    if coordinator:  # first without jax, which says nothing for minutes where a process is missing, and then aborts
        assert count is not None and index is not None  # the three go together
        host, _, port = coordinator.rpartition(":")
        group = _meet(host.strip("[]"), int(port), count, index)
    try:
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=WAIT_S)
    except (ValueError, RuntimeError) as error:
        # jax knows no cluster; or it is in use already, by this process alone
        if coordinator is None and re.search("coordinator_address should be defined|before any JAX calls", str(error)):
            return
        raise ValueError(f"the processes of this run did not come together ({str(error).splitlines()[0]}): start all of them again") from None
    if coordinator is None:
        try:
            group = _meet_found()
        except (RuntimeError, OSError) as error:
            print(f"error: the processes of this run cannot talk: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            os._exit(2)  # jax would wait for the others


def _meet(host: str, port: int, count: int, index: int) -> Group:
    """Returns the group of the processes that are told of each other: each has a link with the first one."""
    where = f"--coordinator={host}:{port}"
    if index == 0:
        try:
            server = _serve(port, count)
        except OSError as error:
            raise ValueError(f"{where}: process 0 cannot listen there ({error.strerror}): name this machine and a free port of it") from None
        return Group(0, count, _accept(server, count, where))
    deadline, said = time.monotonic() + WAIT_S, False
    while True:
        try:
            return Group(index, count, {0: _call(host, port, count, index)})
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"{where}: nothing answers there after {WAIT_S} s ({error}): start process 0, or mend the address") from None
            if not said:
                print(f"waiting for process 0 at {host}:{port}", flush=True)
                said = True
            time.sleep(0.2)


def _meet_found() -> Group:
    """Returns the group of the processes that jax has found."""
    import numpy as np
    from jax._src import distributed  # where jax keeps what it has found
    from jax.experimental import multihost_utils

    index, count = distributed.global_state.process_id, distributed.global_state.num_processes
    if count == 1:
        return Group()
    server = _serve(0, count) if index == 0 else None
    port = int(multihost_utils.broadcast_one_to_all(np.int32(server.getsockname()[1] if server else 0), is_source=index == 0))
    address = distributed.global_state.coordinator_address
    assert address is not None  # jax has found it
    host = address.rpartition(":")[0].strip("[]")
    return Group(index, count, _accept(server, count, f"{host}:{port}") if server else {0: _call(host, port, count, index)})


def _serve(port, count):
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=count, dualstack_ipv6=both)


def _accept(server, count, where):
    """Returns the links of the first process, by the numbers of the others."""
    links, deadline, said = {}, time.monotonic() + WAIT_S, False
    while len(links) < count - 1:
        missing = ", ".join(str(i) for i in range(1, count) if i not in links)
        server.settimeout(2)
        try:
            link, _ = server.accept()
            link.settimeout(WAIT_S)
            theirs = struct.unpack("!II", link.recv(8, socket.MSG_WAITALL))
        except (TimeoutError, struct.error):  # nobody yet, or somebody who is none of us
            if time.monotonic() > deadline:
                raise ValueError(f"{where}: of {count} processes these did not come within {WAIT_S} s: {missing}; start all of them") from None
            if not said:
                print(f"waiting for the processes {missing}", flush=True)
                said = True
            continue
        index, others = theirs
        if others != count or not 0 < index < count or index in links:
            raise ValueError(
                f"{where}: a process came as number {index} of {others}, and {count} are awaited, each once: start each with the same "
                "--num_processes and a --process_id of its own"
            )
        links[index] = link
    server.close()
    for link in links.values():
        link.settimeout(None)
        link.sendall(b"!")  # the address is free now
    return links


def _call(host, port, count, index):
    """Returns a link with the first process, once it has all of them; raises OSError where it does not answer."""
    link = socket.create_connection((host, port), timeout=WAIT_S)
    link.sendall(struct.pack("!II", index, count))
    if not link.recv(1):
        raise ConnectionError("process 0 has ended")
    link.settimeout(None)
    return link
