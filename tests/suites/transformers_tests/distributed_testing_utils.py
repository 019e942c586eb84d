"""Stand-in: runs a function on several gloo ranks, which stay up: starting them takes longer than any test."""

import atexit
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT = 180  # seconds until ranks that do not answer are given up


def _serve(rank: int, world_size: int, meeting_point: str, calls: Any, answers: Any) -> None:
    """Be a rank: run what comes, answer with None or the traceback."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world_size)
    while (call := calls.get()) is not None:
        function, arguments = call
        try:
            function(rank, *arguments)
        except BaseException:
            answers.put((rank, traceback.format_exc()))
        else:
            answers.put((rank, None))
    dist.destroy_process_group()


class Ranks:
    """Processes that form one gloo group."""

    def __init__(self, world_size: int):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.answers = context.Queue()
        self.calls = [context.SimpleQueue() for _ in range(world_size)]
        common = (world_size, str(Path(self.folder.name, "meeting_point")))
        self.processes = [
            context.Process(target=_serve, args=(rank, *common, calls, self.answers), daemon=True)
            for rank, calls in enumerate(self.calls)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *arguments: Any) -> None:
        """Run `function(rank, *arguments)` on all ranks; the first failure is raised, and ends them."""
        for calls in self.calls:
            calls.put((function, arguments))
        try:
            for _ in self.processes:
                rank, failure = self.answers.get(timeout=TIMEOUT)
                if failure:
                    raise AssertionError(f"Rank {rank} failed:\n{failure}")
        except (AssertionError, queue.Empty):
            self.stop()  # the other rank may wait for ever
            raise

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()
        RUNNING.pop(len(self.processes), None)
        self.folder.cleanup()


RUNNING: dict[int, Ranks] = {}


@atexit.register
def _stop_all() -> None:
    for ranks in list(RUNNING.values()):
        ranks.stop()


def run_distributed(world_size: int) -> Callable:
    """Give a decorator: the function then runs on `world_size` ranks, its first argument the rank."""

    def decorate(function: Callable) -> Callable:
        def run(*arguments: Any) -> None:
            if world_size not in RUNNING:
                RUNNING[world_size] = Ranks(world_size)
            RUNNING[world_size].run(function, *arguments)

        return run

    return decorate
