"""The processes that decode images: they live as long as their source, and nothing but its end and their own death ends them.

A launcher, a scheduler and `timeout` send SIGTERM to the whole process group, a terminal SIGINT. The trainer then has a step to finish and
a checkpoint to write, for which it needs its workers: so they ignore both.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch

from wejepa.errors import DataError

__all__ = ["DeadWorker", "Workers", "deaths_wait"]

STOPPING = (signal.SIGINT, signal.SIGTERM)


class DeadWorker(DataError):
    """A process that decodes images died."""


class Workers:
    """Processes that turn lists of items into batches; the first pass starts them, later ones find them running.

    Args:
        dataset: what gives an item's content; it is copied to the processes.
        collate: makes a batch of a list of contents.
        count: how many processes; with 0 this one does the work.

    Attributes:
        death: what there is to say about a process that died, or None.
    """

    def __init__(self, dataset, collate, count: int):
        self.dataset, self.collate, self.count = dataset, collate, count
        self.death: str | None = None
        self._loader: torch.utils.data.DataLoader | None = None
        self._processes: list[multiprocessing.Process] = []
        self._owner, self._lists, self._busy = os.getpid(), _Lists(), False
        _running.add(self)

    def load(self, items: Iterable[list]) -> Iterator[Any]:
        """One pass: a batch of each list of items, in their order.

        While one pass is unfinished, another one has processes of its own; a pass that is closed or forgotten frees them for the next.

        Raises:
            DeadWorker: a process died; the next pass starts new ones.
        """
        if not self.count:
            yield from map(self.here, items)
        elif self._busy:
            yield from Workers(self.dataset, self.collate, self.count).load(items)
        else:
            self._busy = True
            try:
                with self._naming_the_dead():
                    for batch in self._begin(items):
                        yield batch
                        if not all(process.is_alive() for process in self._processes):
                            raise RuntimeError("DataLoader worker (pid or reason not told) exited unexpectedly")
            finally:
                self._busy = False

    def here(self, items: list) -> Any:
        """The batch of a list of items, made in this process."""
        return self.collate([self.dataset[item] for item in items])

    def close(self) -> None:
        """End the processes, if there are any; the next pass starts new ones."""
        if self._loader is not None and self._owner == os.getpid():
            iterator, self._loader = self._loader._iterator, None
            if iterator is not None:
                iterator._shutdown_workers()
            for process in self._processes:  # one that hangs does not heed SIGTERM
                if process.is_alive():
                    process.kill()
        self._processes = []

    def _begin(self, items: Iterable[list]) -> Iterator[Any]:
        self._lists.now = items
        if self._loader is not None:
            return iter(self._loader)
        self._owner, before = os.getpid(), multiprocessing.active_children()
        self._loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=self._lists,
            num_workers=self.count,
            collate_fn=self.collate,
            worker_init_fn=_ignore_signals,
            persistent_workers=True,
            generator=torch.Generator(),  # it draws a number in each pass, which is not to be the caller's
        )
        with _signals_wait(), deaths_wait():
            batches = iter(self._loader)
        self._processes = [process for process in multiprocessing.active_children() if process not in before]
        return batches

    @contextlib.contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        try:
            yield
        except GeneratorExit:  # nobody wants the rest; what the processes have begun is thrown away at the next pass
            raise
        except BaseException as error:
            died = str(error).startswith("DataLoader worker (pid") or (
                # In the middle of handing over a batch: its end of a connection is gone a moment before it is.
                isinstance(error, EOFError | OSError) and any(_is_dead(process) for process in self._processes)
            )
            self.close()
            if not died:
                raise
            self.death = (
                f"a process that decodes images died, probably for want of memory ({' '.join(str(error).split()) or 'it hung up'}): "
                f"lower data.num_workers = {self.count}, or set it to 0"
            )
            raise DeadWorker(self.death) from error

    def __del__(self) -> None:
        self.close()


def _is_dead(process: multiprocessing.Process) -> bool:
    process.join(timeout=1.0)
    return not process.is_alive()


class _Lists:
    """A DataLoader's batch sampler whose lists are exchanged for each pass."""

    now: Iterable[list] = ()

    def __iter__(self) -> Iterator[list]:
        return iter(self.now)


_running: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register  # before multiprocessing sends SIGTERM and waits: exit handlers run in the reverse of this order
def _close_all() -> None:
    for workers in list(_running):
        workers.close()


@contextlib.contextmanager
def deaths_wait() -> Iterator[None]:
    """No error about a dead child in the middle of something else.

    PyTorch's handler of SIGCHLD raises wherever the main thread happens to be, also half-way through an update of the weights. Without it
    a death is noticed when the next batch is fetched.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # else something other than Python had set it
            signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Processes started in here, and the server that forks them, do not hear SIGINT and SIGTERM until they say so."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # which, when it starts, lets both signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(_: int) -> None:
    """The first thing that a worker does: it also takes the place of PyTorch's own handler of SIGTERM."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
