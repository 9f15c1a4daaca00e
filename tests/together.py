"""Several processes that find each other over gloo, as torchrun would start them."""

import os
import socket

from .warm import WarmProcess


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def meeting_place(size: int) -> dict[str, str]:
    """The environment that as many processes share; each adds its RANK and LOCAL_RANK."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    # Two processes with a thread for each core would fight over them.
    shared |= {"OMP_NUM_THREADS": "1"}
    if "lo" in {name for _, name in socket.if_nameindex()}:
        # Else gloo looks this machine's name up, which not every container knows.
        shared |= {"GLOO_SOCKET_IFNAME": "lo"}
    return shared


def run_together(size: int, *arguments: str) -> list[tuple[str, str, int]]:
    """Output, errors and exit status of each process, started with what torchrun tells them."""
    shared = {**os.environ, **meeting_place(size)}
    processes = [
        WarmProcess(*arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
