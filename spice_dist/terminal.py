"""The progress bar of a command, and the signals that ask it to stop."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from spice_dist.errors import Interrupted

LINE_S = 30.0  # between two lines of progress in a log


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Takes Ctrl-C, SIGTERM and SIGUSR1 as requests to save and stop; a second Ctrl-C stops at once.

    A request that nothing has met is raised as Interrupted at the end of the block.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.raises = False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in STOPPING}
        with contextlib.suppress(ValueError):  # raised outside of the main thread, whose owner handles signals
            for number in self.before:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(ValueError):
            for number, handler in self.before.items():
                signal.signal(number, handler)
        if kind is None:
            self.check()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Interrupted wherever the block is when a signal arrives: it has no state to save first."""
        self.check()
        self.raises = True
        try:
            yield
        finally:
            self.raises = False

    def _receive(self, number: int, _frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.raises:
            self.check()
        tqdm.write("stopping after this step; the state is being saved", sys.stderr)

    def requested(self) -> bool:
        return self.received is not None

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)


class Bar:
    """Shows a stage's progress: done of total, rate, time left, loss.

    A bar on a terminal and in a notebook; elsewhere, where nothing can be redrawn, a line every LINE_S seconds.
    """

    def __init__(self, stage: str, stop: StopSignal | None = None):
        self.stage, self.stop = stage, stop
        self.tqdm: Any = None  # until the first progress, so that an early error is one line

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tqdm is not None:
            self.tqdm.delay = 0  # a stage of a moment has its line too
            self.tqdm.close()

    def fill(self) -> None:
        """Show the stage as done."""
        if self.tqdm is not None:
            self.tqdm.update(self.tqdm.total - self.tqdm.n)

    def show(self, done: int, total: int, loss: float | None = None) -> None:
        """Show the progress; a stage without a loss saves no state, and stops here when asked to."""
        if loss is None and self.stop is not None:
            self.stop.check()
        start = done if loss is not None and done > 1 else 0
        if self.tqdm is None:
            self.tqdm = _bar(self.stage, total, start)
        elif self.tqdm.total != total:
            self.tqdm.reset(total)
            self.tqdm.initial = self.tqdm.n = start
        if loss is not None:
            self.tqdm.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.tqdm.update(done - self.tqdm.n)


def _bar(stage: str, total: int, start: int) -> Any:
    from tqdm.asyncio import tqdm as plain
    from tqdm.auto import tqdm as bar  # in a notebook its own

    options: dict[str, Any] = {"desc": f"{stage:<11}", "total": total, "initial": start, "unit": ""}
    if bar is plain and not sys.stderr.isatty():
        parts = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        return plain(**options, mininterval=LINE_S, delay=LINE_S, bar_format=parts, file=_Lines(sys.stderr))
    return bar(**options, mininterval=0.2, dynamic_ncols=True)


class _Lines:
    """A stream on which each state of a bar is a line."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():  # without the return to the start of the line, and blanks over what stood there
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
