"""Progress is a bar where it can be redrawn, and lines elsewhere."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence
from contextlib import redirect_stderr

import pytest
import tqdm.auto

from spice_dist import terminal
from spice_dist.errors import Interrupted
from spice_dist.terminal import Bar, StopSignal

COUNT = """
import time
from spice_dist.terminal import Bar
with Bar("count") as bar:
    for done in range(1, 6):
        time.sleep(0.25)
        bar.show(done, 5)
"""


def on_a_terminal(program: str) -> str:
    """What a program prints whose standard error is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    try:
        subprocess.run([sys.executable, "-c", program], stderr=theirs, check=True, timeout=60)
    finally:
        os.close(theirs)
    with os.fdopen(ours, "rb", closefd=True) as file:
        printed = b""
        while True:
            try:
                printed += os.read(file.fileno(), 4096)
            except OSError:  # the other end is closed and all is read
                return printed.decode()


def test_a_terminal_gets_a_bar_that_is_redrawn():
    printed = on_a_terminal(COUNT)
    assert printed.count("\r") > 2
    assert "5/5" in printed


def test_a_log_gets_lines_without_anything_that_redraws_or_colours():
    with redirect_stderr(io.StringIO()) as log, Bar("count") as bar:
        for done in range(1, 1001):
            bar.show(done, 1000)
    printed = log.getvalue()
    assert not {"\r", "\x1b", "█"} & set(printed)
    assert printed.count("\n") == 1, "a bar of a moment is one line, its end"
    assert "count      : 100% 1000/1000" in printed


def test_a_log_gets_a_line_every_so_often(monkeypatch):
    monkeypatch.setattr(terminal, "LINE_S", 1e-9)
    with redirect_stderr(io.StringIO()) as log, Bar("count") as bar:
        for done in range(1, 6):
            bar.show(done, 5, loss=1 / done)
    lines = log.getvalue().splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines[:5]] == ["20", "40", "60", "80", "100"]
    assert "loss 0.2000" in lines[-1]


def test_a_notebook_gets_its_own_bar(monkeypatch):
    class Widget(tqdm.auto.tqdm):
        shown: list[int] = []

        def update(self, n=1):
            self.shown.append(int(n or 0))
            return super().update(n)

    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    with redirect_stderr(io.StringIO()), Bar("count") as bar:
        bar.show(2, 4)
        bar.show(4, 4)
    assert Widget.shown == [2, 2]


def test_a_stage_that_goes_on_starts_where_it_stopped():
    with redirect_stderr(io.StringIO()), Bar("count") as bar:
        bar.show(50, 100, loss=1.0)
        assert (bar.tqdm.initial, bar.tqdm.n) == (50, 50)
        bar.show(60, 200, loss=1.0)
        assert (bar.tqdm.total, bar.tqdm.n) == (200, 60)


@pytest.mark.parametrize("done", [1, 3])
def test_filling_shows_the_end(done):
    with redirect_stderr(io.StringIO()) as log, Bar("count") as bar:
        bar.show(done, 3)
        bar.fill()
    assert "3/3" in log.getvalue()


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def asked(numbers: Sequence[int]) -> None:
    with StopSignal() as stop:
        assert not stop.requested()
        for number in numbers:
            signal.raise_signal(number)
        assert stop.requested()


def at_once(number: int) -> None:
    with StopSignal() as stop, stop.at_once():
        with contextlib.suppress(Exception):
            signal.raise_signal(number)
        raise AssertionError("it goes on")


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_kept_for_the_end_and_raised_at_once_where_there_is_nothing_to_save(number):
    before = [signal.getsignal(each) for each in STOPPING]
    for block in (lambda: asked([number]), lambda: at_once(number)):
        with pytest.raises(Interrupted, match=signal.Signals(number).name):
            block()
        assert [signal.getsignal(each) for each in STOPPING] == before


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt):
        asked([signal.SIGINT, signal.SIGTERM, signal.SIGINT])
