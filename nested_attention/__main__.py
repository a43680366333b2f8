"""`python -m nested_attention COMMAND`: what can be done without the app."""

import argparse

from nested_attention import bench, released
from nested_attention.errors import spoken_at_exit
from nested_attention.heap import keep_freed

COMMANDS = {"bench": bench, "import-released": released}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nested_attention", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, description=module.__doc__, help=(module.__doc__ or "").splitlines()[0]))
    options = parser.parse_args()
    keep_freed()
    with spoken_at_exit():
        COMMANDS[options.command].run(options)


if __name__ == "__main__":
    main()
