"""Ending a run between two steps: on a signal, or where the next images cannot be had."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from wejepa.errors import DataError

__all__ = ["Interruption", "RunInterrupted", "RunStopped"]


class RunStopped(DataError):
    """The next images cannot be had; a checkpoint of the last whole step is written. All processes of a run raise it at the same step.

    Args:
        fault: what keeps a process from its next batch.
        checkpoint: what to resume from; None where there is no step yet.
        step: its step.
    """

    def __init__(self, fault: str, checkpoint: Path | None = None, step: int = 0):
        super().__init__(f"{fault}; {checkpoint} holds step {step}: go on with resume='auto'" if checkpoint else fault)


class RunInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run after a whole step, and a checkpoint of that step is written.

    Attributes:
        signum: the signal.
        checkpoint: what to resume from.
    """

    def __init__(self, signum: int, checkpoint: Path, step: int):
        super().__init__(f"{signal.Signals(signum).name} after step {step}; {checkpoint} holds it: go on with resume='auto'")
        self.signum, self.checkpoint = signum, checkpoint


class Interruption:
    """Notes SIGINT and SIGTERM, so that the loop can end between two steps; a SIGINT after that acts at once.

    A further SIGTERM does not: torchrun and `timeout` pass on to the trainer what the whole process group, and so the trainer, got already.

    Attributes:
        signum: the signal that came, or 0.
    """

    def __init__(self):
        self.signum, self._before = 0, {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]  # as nohup and & have it
            self._before = {signum: signal.signal(signum, self._note) for signum in heard}
        return self

    def _note(self, signum: int, frame) -> None:
        self.signum = self.signum or signum
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
