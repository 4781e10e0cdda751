"""What every part of the check is given: device, folders, time; and blocks that run in a process of their own."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic

import psutil
import torch

from spice_dist.data.dataset import open_data
from spice_dist.data.sources import Source
from spice_dist.errors import UserError
from tests.gpu.results import OutOfTime, Results, in_one_line

GRACE = 20.0  # seconds that a part has to end after its share
OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Context:
    folder: Path  # of everything that the check writes
    device: torch.device
    deadline: float  # of this part, in `time.monotonic`
    labels: Path | None  # reliable labels to start stage 3 from
    results: Results

    @property
    def tiny(self) -> bool:
        """On a CPU everything is small: it only shows that the check works."""
        return self.device.type == "cpu"

    @property
    def cifar(self) -> Path | None:
        """The folder with cifar10.npz, if it is there."""
        folder = self.folder / "data"
        return folder if (folder / "cifar10.npz").exists() else None

    def source(self, split: str = "whole") -> Source:
        """CIFAR-10, or the digits where that is missing or the check is tiny."""
        if self.cifar is None or self.tiny:
            return open_data("digits")
        return open_data(f"cifar10:{self.cifar}", split=split)

    def out_of_time(self) -> bool:
        return monotonic() > self.deadline

    def require_time(self) -> None:
        if self.out_of_time():
            raise OutOfTime

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def apart(function: Callable[..., None], *args: object, deadline: float) -> str:
    """Call the function in a forked process, which no crash, hang or broken CUDA context outlives.

    This process must not have used CUDA, nor threads of OpenMP, which a fork does not survive.

    Args:
        deadline: GRACE seconds after it the process is killed.

    Returns:
        "" if it has ended well, else why not in one line.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, function, args))
    process.start()
    theirs.close()
    message = None
    if ours.poll(max(0.0, deadline - monotonic()) + GRACE):
        with suppress(EOFError):  # it died without a word
            message = ours.recv()
    else:
        message = f"killed: it did not end {GRACE:g} s after its time"
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            each.kill()
    process.join()
    return f"ended with exit code {process.exitcode}" if message is None else message


def _report(pipe: Connection, function: Callable[..., None], args: tuple) -> None:
    try:
        function(*args)
        pipe.send("")
    except OutOfTime:
        pipe.send(OUT_OF_TIME)
    except BaseException as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        pipe.send(in_one_line(error))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # buffers and threads that were forked with it are not this process's to end
