"""python -m manic.inspect DIR: the public path of :mod:`manic.checkpoint.inspect`."""

import sys

from manic.checkpoint.inspect import inspect, main

__all__ = ["inspect", "main"]

if __name__ == "__main__":
    sys.exit(main())
