# SPDX-License-Identifier: LGPL-2.1-or-later
"""New TCP connections, one after the other: no kept tool of Debian's counts these alone.

    connections.py serve PORT
    connections.py connect ADDRESS PORT SECONDS CLIENTS

Each connection is opened, carries one octet from the server, and is reset by the client, so neither
side runs out of ports.  ``connect`` prints, as JSON, the connections a second of all clients
together, and the median time of a connection.
"""

import contextlib
import json
import os
import socket
import statistics
import struct
import sys
import time

BACKLOG = 1024
WORKERS = 2
LIMIT = 5.0
"""Seconds after which a connection counts as failed, and the run with it."""

RESET = struct.pack("ii", 1, 0)


def serve(port: int) -> None:
    """Answer with two processes, for ever."""
    listener = socket.create_server(("", port), backlog=BACKLOG)
    for _ in range(WORKERS - 1):
        if os.fork() == 0:
            break
    while True:
        connection, _ = listener.accept()
        with contextlib.suppress(OSError):  # reset already
            connection.send(b"x")
        connection.close()


def connect(address: str, port: int, seconds: float) -> list[float]:
    """Return the duration of each connection, in seconds, one after the other."""
    taken = []
    end = time.perf_counter() + seconds
    start = 0.0
    while start < end:
        start = time.perf_counter()
        with socket.socket() as link:
            link.settimeout(LIMIT)
            link.connect((address, port))
            link.recv(1)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        taken.append(time.perf_counter() - start)
    return taken


def report(address: str, port: int, seconds: float, clients: int) -> None:
    """Run the clients, each in a process of its own, and print what they found."""
    pipes = []
    for _ in range(clients):
        reader, writer = os.pipe()
        if os.fork() == 0:
            found = connect(address, port, seconds)
            result = {"count": len(found), "median": statistics.median(found)}
            os.write(writer, json.dumps(result).encode())
            os._exit(0)
        os.close(writer)
        pipes.append(reader)
    results = [json.loads(os.read(pipe, 4096)) for pipe in pipes]
    rate = sum(result["count"] for result in results) / seconds
    median = statistics.median(result["median"] for result in results)
    print(json.dumps({"rate": rate, "microseconds": median * 1e6}))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        report(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
