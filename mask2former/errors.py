"""Errors that are the user's to mend, and how commands show them."""

import logging
import sys
from collections.abc import Callable

__all__ = ["INTERRUPTED", "PREEMPTED", "UserError", "command"]

# Exit code of a run that SIGTERM ended behind a checkpoint: "try again", with --resume (EX_TEMPFAIL in sysexits.h).
PREEMPTED = 75
# Of a program that Ctrl-C ended.
INTERRUPTED = 130


class UserError(ValueError):
    """A mistake in what the user gave: a path, a key, a file's contents.

    The message is one line that says what was expected, what came, and what to do.
    """


def command(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a command-line program and exit with the code it returns (None: 0).

    A ``UserError`` becomes one line on standard error and exit code 1; Ctrl-C exits with ``INTERRUPTED``, and training
    that SIGTERM ended with ``PREEMPTED``. Any other exception is a defect of the program and keeps its traceback.
    """
    try:
        code = main() or 0
    except UserError as error:
        logging.shutdown()
        message = str(error).strip()
        if message.startswith("Caught UserError in DataLoader worker"):  # a traceback that ends in the message
            message = message.rpartition("UserError: ")[2]
        print(f"error: {message}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)
