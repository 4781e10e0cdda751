"""The command `spice-dist`: parse, call, print. Imports nothing heavy before it knows what to do."""

import argparse
import os
import sys
from typing import NoReturn

from spice_dist.command import doctor, evaluate, export, fit, pack, predict, report, settings, suggest_k, tune

OK, MISTAKE, REQUEUE, INTERRUPTED = 0, 1, 75, 130
COMMANDS = (fit, tune, doctor, suggest_k, settings, pack, predict, report, export, evaluate)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 a mistake, told in one line; 75 state saved, run me again; 130 the same after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    from spice_dist.errors import Interrupted, UserError, warn_in_one_line

    warn_in_one_line()
    try:
        options.call(options, given)
    except UserError as error:
        print(f"spice-dist: {error}", file=sys.stderr)
        return MISTAKE
    except Interrupted as signal:
        print("spice-dist: stopped, the state is saved; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED if str(signal) in ("", "SIGINT") else REQUEUE
    except KeyboardInterrupt:
        print("spice-dist: stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        os._exit(INTERRUPTED)  # threads of loaders and workers must not hold the process
    return OK


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"spice-dist: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The options of all sub-commands; `call` of what it parses is the action."""
    root = _Parser(prog="spice-dist", description="Cluster images without labels, on one machine or many (SPICE).")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return root


if __name__ == "__main__":
    sys.exit(main())
