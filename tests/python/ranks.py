"""Processes that form a torch.distributed group on this machine, kept between tests: starting one takes seconds."""

from __future__ import annotations

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# On a machine that does other things too, where one rank may be far behind another. A fault is seen sooner than that.
START_TIMEOUT = 300  # seconds until all ranks have imported torch and met
CHECK_TIMEOUT = 400  # seconds for one check
COLLECTIVE_TIMEOUT = timedelta(seconds=300)  # of a rank that waits for another


class Ranks:
    """`size` processes. `run` has each call a function with the mesh of them all; nothing can hang for ever."""

    def __init__(self, size: int, device: str = "cpu") -> None:
        # Forks of one process that has imported what takes each of them ten seconds, and started no thread.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["octavo.transformers", "torch.distributed.fsdp", "torch.distributed.tensor"])
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"  # a file, so that there is no port to be taken by somebody else
        self._calls = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(
                target=_serve, args=(rank, size, device, str(store), self._calls[rank], self._results), daemon=True
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()
        self._await("start", START_TIMEOUT)

    def run(self, check: Callable[..., None], *args: Any) -> None:
        """``check(mesh, *args)`` in every rank, a function of a module's own; raises what went wrong in any of them."""
        if not self.alive:
            raise AssertionError(f"{check.__name__}: the processes have ended: use `pool`, which starts new ones")
        for calls in self._calls:
            calls.put((check, args))
        self._await(check.__name__, CHECK_TIMEOUT)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def _await(self, what: str, timeout: float) -> None:
        failures: dict[int, str] = {}
        answered: set[int] = set()
        try:
            while len(answered) < self.size:
                # The others wait for a rank that failed until a collective gives up: not worth waiting for.
                rank, failure = self._results.get(timeout=5 if failures else timeout)
                answered.add(rank)
                if failure is not None:
                    failures[rank] = failure
        except queue.Empty:
            failures.setdefault(-1, f"ranks {set(range(self.size)) - answered} did not answer in {timeout} s")
        if failures:
            self.stop()  # a group is of no use after a fault; whoever comes next starts a new one
            raise AssertionError(f"{what}: " + "\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))


def pool(pools: dict[tuple[int, str], Ranks], size: int, device: str = "cpu") -> Ranks:
    """Those of `pools`, or new ones where there are none yet or a fault ended them."""
    key = size, device
    if key not in pools or not pools[key].alive:
        pools[key] = Ranks(size, device)
    return pools[key]


def _serve(rank: int, size: int, device: str, store: str, calls: Any, results: Any) -> None:
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks what this machine's name resolves to
        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        mesh: DeviceMesh = init_device_mesh(device, (size,), mesh_dim_names=("tp",))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        return
    results.put((rank, None))
    while True:
        check, args = calls.get()
        try:
            check(mesh, *args)
            results.put((rank, None))
        except BaseException:
            results.put((rank, traceback.format_exc()))
