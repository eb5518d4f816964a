"""Processes that find each other or are told why not, and that learn of each other's end. Threads stand for them."""

import queue
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import distributed
import pytest

import together

LONG = 20.0  # seconds; nothing waits so long unless it fails


def all_meet(*processes, address=None, patience=LONG):
    """What each of (index, count) got: companions, or what was raised."""
    address = address or distributed.free_address()

    def one(process):
        index, count = process
        try:
            return together.meet(address, count, index, patience)
        except (OSError, ValueError) as e:
            return e

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def connected(address):
    """A connection to process 0, as soon as it is there."""
    while True:
        try:
            return socket.create_connection(("localhost", int(address.rpartition(":")[2])))
        except ConnectionRefusedError:
            time.sleep(0.01)


def close(companions):
    for each in companions:
        for peer in each.peers.values():
            peer.close()


def test_all_meet_and_the_port_is_free_for_jax():
    address = distributed.free_address()
    found = all_meet((2, 3), (0, 3), (1, 3), address=address)
    assert [sorted(c.peers) for c in found] == [[0], [1, 2], [0]]
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        close(found)


def test_a_port_that_is_taken_is_told_at_once():
    with socket.create_server(("localhost", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(together.MeetingError, match=f"port {other.getsockname()[1]} can't be had here"):
            together.meet(address, 2, 0)


@pytest.mark.parametrize(
    ("processes", "told"),
    [
        (((0, 3), (1, 3), (1, 3)), "process 1 .* and process 1 .* have the same --process_id"),
        (((0, 2), (1, 3)), "process 1 .* has --num_processes=3, and process 0 has 2"),
    ],
)
def test_processes_that_do_not_fit_are_all_told(processes, told):
    errors = all_meet(*processes)
    assert all(isinstance(e, together.MeetingError) and re.search(told, str(e)) for e in errors), errors


def test_two_processes_with_number_0():
    errors = [e for e in all_meet((0, 2), (0, 2), patience=0.5) if "can't be had here" in str(e)]
    assert len(errors) == 1 and "a second process with --process_id=0" in str(errors[0])


def test_those_who_do_not_come_are_named_after_the_stated_time():
    first, third = all_meet((0, 4), (2, 4), patience=0.5)
    assert "didn't come" in str(first) and str(first).endswith("within 0.5 s: 1, 3.")
    assert str(third) == str(first)
    (alone,) = all_meet((1, 2), patience=0.3)
    assert "process 1 has not been let in by process 0" in str(alone) and "within 0.3 s" in str(alone)


def test_one_that_went_away_while_it_waited_is_named():
    address = distributed.free_address()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(together.meet, address, 3, 0, LONG)
        connection = connected(address)
        together.Peer(connection).send({"index": 1, "count": 3, "pid": 77, "host": "there"})
        connection.close()
        third = pool.submit(together.meet, address, 3, 2, LONG)
        for each in (first, third):
            with pytest.raises(together.MeetingError, match=r"process 1 \(pid 77 on there\) has ended while it waited"):
                each.result(timeout=LONG)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None], ids=["http", "closes", "silent"])
def test_something_else_that_listens_there_is_not_taken_for_process_0(answer):
    with socket.create_server(("localhost", 0)) as other:

        def serve():
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.sendall(answer)
                    connection.close()

        held = []
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(together.MeetingError, match=r"not been let in by process 0 at .* within 0\.5 s"):
            together.meet(f"localhost:{other.getsockname()[1]}", 2, 1, patience=0.5)


@pytest.mark.parametrize("says", [b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1]\n", b"", None], ids=repr)
def test_strangers_at_the_port_are_ignored(says):
    """Whoever looks which ports are open, by a connection that is closed, or reset."""
    address = distributed.free_address()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(together.meet, address, 2, 0, LONG)
        stranger = connected(address)
        if says is None:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            stranger.sendall(says)
        stranger.close()
        second = pool.submit(together.meet, address, 2, 1, LONG)
        close([first.result(timeout=LONG), second.result(timeout=LONG)])


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:http", "localhost:99999", ":1234"])
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match="expected host:port"):
        together.meet(address, 2, 0)


@pytest.fixture
def three(monkeypatch):
    """Three that watch each other, and what each is told of a loss."""
    monkeypatch.setattr(together, "BEAT", 0.05)
    found = all_meet((0, 3), (1, 3), (2, 3))
    told = [queue.Queue() for _ in found]
    yield found, told
    close(found)


@pytest.mark.parametrize("ended", [1, 0])
def test_one_that_ends_is_named_to_all(three, ended):
    found, told = three
    others = sorted({0, 1, 2} - {ended})
    for i in others:
        found[i].watch(told[i].put)
    close([found[ended]])
    for i in others:
        assert re.fullmatch(rf"process {ended} \(pid \d+ on .+\) has ended", told[i].get(timeout=LONG))
        assert re.fullmatch(rf"process {ended} .*", found[i].lost)


def test_one_that_is_silent_is_named_to_all(three):
    found, told = three
    for i in (0, 1):  # The third one never says that it is alive.
        found[i].watch(told[i].put, silence=0.5)
    for i in (0, 1):
        assert re.fullmatch(r"process 2 .* has been silent for 0\.5 s", told[i].get(timeout=LONG))


def test_who_says_farewell_may_end(three):
    found, told = three
    for each, queue_ in zip(found, told, strict=True):
        each.watch(queue_.put)
    found[1].farewell()
    close([found[1]])
    time.sleep(0.3)
    assert all(q.empty() for q in told)
    close([found[0]])  # That one didn't.
    assert "process 0" in told[2].get(timeout=LONG)
    assert told[1].empty()


def test_a_relay_outlives_what_it_leads_to():
    with socket.create_server(("localhost", 0)) as far:
        address = together.relay(f"localhost:{far.getsockname()[1]}")
        near = socket.create_connection(("localhost", int(address.rpartition(":")[2])), timeout=LONG)
        other, _ = far.accept()
        near.sendall(b"question")
        assert other.recv(100) == b"question"
        other.sendall(b"answer")
        assert near.recv(100) == b"answer"
        other.close()
    for _ in range(3):
        near.sendall(b"still there?")
        time.sleep(0.05)
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        near.recv(100)
    near.close()
