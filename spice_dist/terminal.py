"""The progress bar of a command, and the signals that ask it to stop."""

import contextlib
import signal
import sys
from typing import Any

from tqdm import tqdm

from spice_dist.errors import Interrupted


class StopSignal:
    """Takes Ctrl-C, SIGTERM and SIGUSR1 as requests to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        with contextlib.suppress(ValueError):  # raised outside of the main thread, whose owner handles signals
            for number in self.before:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError):
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        tqdm.write("stopping after this step; the state is being saved", sys.stderr)

    def requested(self) -> bool:
        return self.received is not None

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)


class Bar:
    """Shows a stage's progress: done of total, rate, time left, loss."""

    def __init__(self, stage: str, stop: StopSignal):
        self.stage, self.stop = stage, stop
        self.tqdm: Any = None  # until the first progress, so that an early error is one line

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tqdm is not None:
            self.tqdm.close()

    def fill(self) -> None:
        """Show the stage as done."""
        if self.tqdm is not None:
            self.tqdm.update(self.tqdm.total - self.tqdm.n)

    def show(self, done: int, total: int, loss: float | None = None) -> None:
        """Show the progress; a stage without a loss saves no state, and stops here when asked to."""
        if loss is None:
            self.stop.check()
        if self.tqdm is None:
            slow = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no redrawing
            options = {"unit": "", "mininterval": slow, "dynamic_ncols": True, "file": sys.stderr}
            self.tqdm = tqdm(desc=f"{self.stage:<11}", **options)
        if self.tqdm.total != total:
            self.tqdm.reset(total)
            self.tqdm.initial = self.tqdm.n = done if loss is not None and done > 1 else 0
        if loss is not None:
            self.tqdm.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.tqdm.update(done - self.tqdm.n)
