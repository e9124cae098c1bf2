"""``python -m mask2former.model_zoo``: the table, as in MODEL_ZOO.md, or models downloaded."""

import argparse
import logging

from ..errors import command
from .document import document
from .weights import download_weights


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m mask2former.model_zoo",
        description="Print the table of published models as Markdown, or, with names, download the models.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a model: download it and print where it is")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not arguments.names:
        print(document(), end="")
    for name in arguments.names:
        print(download_weights(name))


if __name__ == "__main__":
    command(main)
