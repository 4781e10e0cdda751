"""`spice-dist completion`: the script that completes commands, options and files in a shell.

It is printed once and holds all names, so that a press of Tab starts no Python.
"""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands

EXAMPLES = """examples:
  eval "$(spice-dist completion bash)"                                  in this shell; in ~/.bashrc: in every new one
  spice-dist completion zsh > ~/.zfunc/_spice-dist                      with ~/.zfunc in the fpath of ~/.zshrc
"""


def add(commands: Commands) -> None:
    command = commands.add_parser("completion", help="print the completion of bash or zsh", epilog=EXAMPLES)
    command.set_defaults(call=completion)
    command.add_argument("shell", choices=("bash", "zsh"))


def completion(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.errors import UserError

    try:
        import shtab
    except ImportError as error:
        raise UserError("the package that writes completions is missing: pip install shtab") from error
    _complete_files(options.root, shtab.FILE)
    print(shtab.complete(options.root, options.shell))


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    """Complete the names of files wherever an argument is a path, or DATA, which mostly is one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.type is Path or action.dest == "data":
            action.complete = files  # pyright: ignore[reportAttributeAccessIssue]
