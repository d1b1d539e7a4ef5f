"""python -m manic.inspect DIR: the public path of :mod:`manic.checkpoint.inspect`."""

import os
import sys

from manic.checkpoint.inspect import inspect, main

__all__ = ["inspect", "main"]

if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at its end
        code = 141  # as a shell reports SIGPIPE
    sys.exit(code)
