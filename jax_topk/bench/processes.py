"""Runs the bench in several processes on this machine, joined by `jax.distributed`.

Each process holds an equal share of the devices and runs the same command with its own `--rank`;
collectives between them go through gloo. Rank 0 alone prints and writes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

SECONDS_BETWEEN_LOOKS = 0.2


def launch(arguments: Sequence[str], processes: int) -> int:
    """Starts the command once per rank and waits for all.

    Args:
        arguments: of the command, `--processes` among them.
        processes: how many to start.

    Returns:
        0 if all succeeded, else the exit status of the first that did not.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    commands = [_command(arguments, coordinator, rank) for rank in range(processes)]
    # The words of the other ranks are those of rank 0, unless one of them fails.
    with tempfile.TemporaryFile("w+") as errors:
        running = [subprocess.Popen(commands[0])] + [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            for command in commands[1:]
        ]
        try:
            status = _wait(running)
        finally:
            for process in running:
                process.kill()
                process.wait()
        if status and running[0].returncode != status:
            errors.seek(0)
            print(errors.read(), file=sys.stderr)
    return status


def _command(arguments: Sequence[str], coordinator: str, rank: int) -> list[str]:
    place = ["--coordinator", coordinator, "--rank", str(rank)]
    return [sys.executable, "-m", "jax_topk.bench", *arguments, *place]


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Returns the first exit status that is not 0, as soon as there is one, else 0 at the end.

    The others would wait for a process that is gone.
    """
    while True:
        found = [process.poll() for process in running]
        if failed := [status for status in found if status]:
            return failed[0]
        if None not in found:
            return 0
        time.sleep(SECONDS_BETWEEN_LOOKS)


def join(coordinator: str, processes: int, rank: int) -> None:
    """Joins the other processes; before anything starts JAX's devices.

    Args:
        coordinator: `host:port` of rank 0.
        processes: of all ranks together.
        rank: of this process.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=rank)
