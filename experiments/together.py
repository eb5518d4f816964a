"""How the processes of one run find each other, and how each is told that another has ended. Plain sockets, no JAX.

JAX alone tells of a port that is taken, or of two processes with one number, by a crash or never; of a process that
died in the middle of a computation, by an abort and its native frames, or after minutes. So process 0 first meets the
others on its port, by `meet`, before JAX starts there; and they stay connected to it: who ends without a farewell, or
says nothing for a while, is named to all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0  # seconds in which all processes have to come
SILENCE = 100.0  # seconds without a sign of life after which a process is given up
BEAT = 2.0  # seconds between two signs of life
FAREWELL = "farewell"


class MeetingError(OSError):
    """Processes that don't find each other, or don't fit together."""


def meet(address: str, count: int, index: int, patience: float = PATIENCE) -> Companions:
    """Waits until all processes are there.

    Args:
      address: host:port of process 0, the same for all; the port is free again when this returns, for JAX.
      count: how many processes there are.
      index: which one this is, from 0 on.
      patience: seconds.

    Raises:
      MeetingError: the port is taken, two processes have one number, they were told of different numbers, or don't come
        in time; every process that came is told the same.
      ValueError: no such address or number.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator_address: found {address!r}, expected host:port, such as 10.0.0.1:1234.")
    if not 0 <= index < count:
        raise ValueError(f"--process_id: found {index}, expected 0 to {count - 1}, as --num_processes={count}.")
    if index == 0:
        return Companions(0, _receive(address, int(port), count, patience))
    return Companions(index, {0: _join(address, host.strip("[]"), int(port), count, index, patience)})


def _receive(address: str, port: int, count: int, patience: float) -> dict[int, Peer]:
    """Process 0's part."""
    try:
        server = _listen(port)
    except OSError as e:
        raise MeetingError(
            f"--coordinator_address={address}: port {port} can't be had here ({os.strerror(e.errno or 0)}). Another "
            "program has it, an earlier run, or a second process with --process_id=0: choose another port for all."
        ) from e
    met: dict[int, Peer] = {}
    late: list[Peer] = []
    problem, deadline = None, time.monotonic() + patience
    with server:
        while len(met) < count - 1 and problem is None:
            try:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                peer = Peer(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in met)
                problem = f"of {count} processes these didn't come to {address} within {patience:g} s: {missing}"
                continue
            hello = peer.receive(5)
            if not hello or not isinstance(hello.get("index"), int):  # Somebody who looks which ports are open.
                peer.close()
                continue
            i, peer.name = hello["index"], f"process {hello['index']} (pid {hello.get('pid')} on {hello.get('host')})"
            if hello.get("count") != count:
                problem = f"{peer.name} has --num_processes={hello.get('count')}, and process 0 has {count}"
            elif i in met:
                problem = f"{met[i].name} and {peer.name} have the same --process_id"
            if problem is None:
                met[i] = peer
            else:
                late.append(peer)
    if problem is None and (gone := [peer.name for peer in met.values() if peer.ended()]):
        problem = f"{gone[0]} has ended while it waited for others"
    for peer in (*met.values(), *late):
        with contextlib.suppress(OSError):
            peer.send({"problem": problem} if problem else {"go": True, "name": _myself(0)})
    if problem:
        raise MeetingError(f"The processes of this run don't fit together: {problem}.")
    return met


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port))  # IPv6 is there, but switched off.


def _join(address: str, host: str, port: int, count: int, index: int, patience: float) -> Peer:
    """Any other process's part."""
    deadline, why = time.monotonic() + patience, "it doesn't answer"
    hello = {"index": index, "count": count, "host": socket.gethostname(), "pid": os.getpid()}
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = Peer(socket.create_connection((host, port), timeout=min(10, left)))
            peer.send(hello)
            answer = peer.receive(patience + min(5, patience))  # As long as process 0 waits for others, and a little.
        except OSError as e:
            why = str(e)
            time.sleep(min(0.2, left))
            continue
        if answer and "problem" in answer:
            raise MeetingError(f"The processes of this run don't fit together: {answer['problem']}.")
        if answer and "go" in answer:
            peer.name = answer["name"]
            return peer
        why = "what listens there doesn't answer as process 0 would" if answer is None else "it closed the connection"
        peer.close()
        time.sleep(min(0.2, left))
    raise MeetingError(
        f"process {index} has not been let in by process 0 at {address} within {patience:g} s: {why}. Is it running, "
        "with this --coordinator_address, and can its host be reached?"
    )


def _myself(index: int) -> str:
    return f"process {index} (pid {os.getpid()} on {socket.gethostname()})"


class Peer:
    """A connection that carries JSON objects, one per line."""

    def __init__(self, connection: socket.socket):
        self.socket, self.name, self.heard, self.gone = connection, "", time.monotonic(), False
        self._rest = b""

    def send(self, value: dict[str, Any]) -> None:
        self.socket.settimeout(5)
        self.socket.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next object; {} where the connection ended, None where something else came, or nothing in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.socket.recv(4096)
            except TimeoutError:
                return None
            except OSError:  # It was reset.
                return {}
            if not data:
                return {}
            self._rest += data
            if len(self._rest) > 1 << 16:
                return None
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            value = json.loads(line)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def ended(self) -> bool:
        """Whether the other side has closed the connection; what it sent stays to be received."""
        self.socket.settimeout(None)
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def pending(self) -> bool:
        return b"\n" in self._rest

    def close(self) -> None:
        self.gone = True
        self.socket.close()


class Companions:
    """The other processes: process 0 is connected to all of them, and they to it.

    Attributes:
      lost: which of them has ended or fallen silent, in words.
    """

    def __init__(self, index: int, peers: dict[int, Peer]):
        self.index, self.peers, self.lost, self._left = index, peers, "", threading.Event()

    def watch(self, lost: Callable[[str], None], silence: float = SILENCE) -> None:
        """Calls `lost` with what happened, once, from a thread, where another process ends or falls silent."""
        threading.Thread(target=self._watch, args=(lost, silence), name="companions", daemon=True).start()

    def what_was_lost(self, seconds: float) -> str:
        """`lost`, if it is known within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.lost

    def farewell(self) -> None:
        """This process is through: the others are not to take its end for a loss."""
        self._left.set()
        self._tell({FAREWELL: True})

    def _tell(self, value: dict[str, Any]) -> None:
        for peer in self.peers.values():
            if not peer.gone:
                with contextlib.suppress(OSError):
                    peer.send(value)

    def _watch(self, lost: Callable[[str], None], silence: float) -> None:
        selector = selectors.DefaultSelector()
        for peer in self.peers.values():
            peer.heard = time.monotonic()
            selector.register(peer.socket, selectors.EVENT_READ, peer)
        beaten = looked = time.monotonic()
        while selector.get_map():
            ready, now = selector.select(min(BEAT, silence) / 2), time.monotonic()
            if now - looked > silence / 2:  # This process itself was stopped: it can't say who was silent.
                for peer in self.peers.values():
                    peer.heard = now
            looked = now
            what = None
            for key, _ in ready:
                peer = key.data
                found = self._read(peer, now)
                if peer.gone:
                    selector.unregister(peer.socket)
                what = what or found
            if now - beaten >= BEAT:
                self._tell({"alive": True})
                beaten = now
            silent = [p for p in self.peers.values() if not p.gone and now - p.heard > silence]
            if silent and not what:
                what = f"{silent[0].name} has been silent for {silence:g} s"
                with contextlib.suppress(OSError):
                    silent[0].send(
                        {"lost": f"{_myself(self.index)} gave this one up, as it was silent for {silence:g} s"}
                    )
            if what and not self._left.is_set():
                self.lost = what
                self._tell({"lost": what})  # Process 0 tells the others, who don't know each other.
                lost(what)
                return

    def _read(self, peer: Peer, now: float) -> str | None:
        """What is bad in the news from a process."""
        while True:
            news = peer.receive(0.1)
            if news == {}:
                peer.gone = True
                return f"{peer.name} has ended"
            peer.heard = now
            if news and FAREWELL in news:
                peer.gone = True
                return None
            if news and "lost" in news:
                return news["lost"]
            if not peer.pending():
                return None


# --- JAX's own connection ---------------------------------------------------------------------------------------------


def relay(address: str) -> str:
    """An address on this host from which connections go on to `address`.

    Where what they lead to dies, they stay open: JAX aborts a process, with its native frames, as soon as its
    connection to process 0 ends. `Companions` ends it in words.
    """
    host, _, port = address.rpartition(":")
    server = socket.create_server(("localhost", 0))

    def serve():
        kept = []
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
                far.settimeout(None)
            except OSError:
                if kept:  # It has been there.
                    kept.append(near)
                else:  # It isn't there yet: JAX tries again.
                    near.close()
                continue
            kept.append(near)
            threading.Thread(target=_onward, args=(near, far), daemon=True).start()
            threading.Thread(target=_back, args=(near, far), daemon=True).start()

    threading.Thread(target=serve, name="relay", daemon=True).start()
    return f"localhost:{server.getsockname()[1]}"


def _onward(near: socket.socket, far: socket.socket) -> None:
    while data := near.recv(1 << 16):
        with contextlib.suppress(OSError):
            far.sendall(data)
    far.close()


def _back(near: socket.socket, far: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := far.recv(1 << 16):
            near.sendall(data)
