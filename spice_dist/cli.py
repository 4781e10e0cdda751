"""The command `spice-dist`: parse, call, print. Imports nothing heavy before it knows what to do."""

import argparse
import contextlib
import io
import os
import select
import sys
from typing import Any, NoReturn

from spice_dist.command import (
    apply,
    completion,
    doctor,
    evaluate,
    export,
    fit,
    pack,
    predict,
    report,
    settings,
    slurm,
    suggest_k,
    tune,
)

OK, MISTAKE, REQUEUE, INTERRUPTED, CLOSED = 0, 1, 75, 130, 141
COMMANDS = (fit, tune, doctor, suggest_k, settings, pack, predict, report, apply, export, evaluate, slurm, completion)


FIRST_STEPS = """spice-dist clusters images without labels.

  spice-dist fit digits --out runs/digits        a first run: 1,797 handwritten digits, minutes on two cores
  spice-dist fit photos/ --out runs/photos       your images; then look at runs/photos/report.html
  spice-dist predict runs/photos new.jpg         the group of another image
  spice-dist doctor                              check this machine
  spice-dist --help                              all commands; spice-dist fit --help: options and examples of one
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, of the command line by default, and do what they ask for.

    Returns:
        0 done; 1 a mistake, named in one line; 75 state saved, run me again; 130 the same after Ctrl-C; 141 what reads
        the output, such as head, has closed it.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None:
        from spice_dist.redaction import hide_arguments

        hide_arguments()
    _open_streams()
    try:
        try:
            return _run(given)
        finally:
            sys.stdout.flush()  # here, not when the interpreter ends: also what --help has printed
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _discard(sys.stdout) | _discard(sys.stderr):
            return CLOSED
        from spice_dist.errors import of_system

        print(f"spice-dist: {of_system(error)}", file=sys.stderr)
        _write_to_nothing(sys.stdout)  # it may be what cannot be written, once more when the interpreter ends
        return MISTAKE


def _open_streams() -> None:
    """Make the standard streams usable: closed ones take and give nothing, characters that they lack are escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # gets the lowest free number, this one, which no other file may get; children have it too
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin, sys.stdout = sys.stdin or os.fdopen(0), sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(given: list[str]) -> int:
    if not given:
        print(FIRST_STEPS, end="")
        return OK
    root = parser()
    if empty := _empty(given):
        root.error(f"the value after {empty} is empty, as that of a variable which is not set; give one")
    options = root.parse_args(given)
    from spice_dist.errors import Interrupted, UserError, plain, warn_in_one_line
    from spice_dist.redaction import hidden, without_secrets
    from spice_dist.terminal import StopSignal

    warn_in_one_line()
    try:
        with StopSignal() as stop, stop.at_once():  # until a command has a state to save
            options.call(options, [without_secrets(argument) for argument in given])
    except UserError as error:
        text = plain(str(error))
        for argument in given:
            text = hidden(text, argument)
        print(f"spice-dist: {text}", file=sys.stderr)
        return MISTAKE
    except Interrupted as signal:
        print("spice-dist: stopped, the state is saved; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED if str(signal) in ("", "SIGINT") else REQUEUE
    except KeyboardInterrupt:
        print("spice-dist: stopped at once; the same command goes on from what is saved", file=sys.stderr)
        os._exit(INTERRUPTED)  # threads of loaders and workers must not hold the process
    return OK


def _empty(given: list[str]) -> str:
    """Return what stands before the first empty argument, "" if there is none: a path, it would be this folder."""
    for before, argument in zip(["spice-dist", *given], given, strict=False):
        option, equals, value = argument.partition("=")
        if not argument.strip():
            return before
        if option.startswith("--") and equals and not value.strip():
            return option
    return ""


def _discard(stream: Any) -> bool:
    """Return whether the reader of a stream has closed it; what is written to it from now on is lost then."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            return False
    except (OSError, ValueError):  # no file behind it
        return False
    _write_to_nothing(stream)
    return True


def _write_to_nothing(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line, as everywhere; examples as they are written."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        from spice_dist.errors import plain

        self.exit(MISTAKE, f"spice-dist: {plain(message)}; see {self.prog} --help\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from spice_dist import __version__

        print(f"spice-dist {__version__}")
        parser.exit(OK)


def parser() -> argparse.ArgumentParser:
    """The options of all sub-commands; `call` of what it parses is the action."""
    root = _Parser(
        prog="spice-dist",
        description="Cluster images without labels, on one machine or many (SPICE).",
        epilog=FIRST_STEPS.partition("\n\n")[2],
    )
    root.add_argument("--version", action=_Version, nargs=0, help="print the version")
    root.set_defaults(root=root)  # what `completion` completes
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return root


if __name__ == "__main__":
    sys.exit(main())
