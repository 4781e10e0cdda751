"""`spice-dist settings`: every setting with its value, its range and its meaning."""

import argparse

from spice_dist.command.options import Commands

EXAMPLES = """examples:
  spice-dist settings moco                                        the settings of one group
  spice-dist settings --recipe cifar10                            the values of a recipe
  spice-dist fit photos/ --out runs/photos --set data.size=160    change one
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "settings", help="print the settings that --set changes: default, range, meaning", epilog=EXAMPLES
    )
    command.set_defaults(call=settings)
    command.add_argument(
        "group", nargs="?", default="", metavar="GROUP", help="moco, spice_self.weak, ... or one setting (default: all)"
    )
    command.add_argument("--recipe", metavar="NAME", help="the values of this recipe in place of the defaults")


def settings(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.config import Config
    from spice_dist.recipes import recipe
    from spice_dist.settings_table import settings_table

    config = Config() if options.recipe is None else recipe(options.recipe)
    print(settings_table(config, options.group))
