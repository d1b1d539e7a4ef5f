#!/usr/bin/env bash
# Build the wheel and the sdist into dist/, install the wheel into an empty environment, and run the README's first
# lines there, outside of the clone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" build
root=$PWD
rm -rf dist
.venv/bin/python -m build --quiet --outdir dist .
.venv/bin/python -m tarfile --list dist/manic-*.tar.gz | grep '/LICENSE' >/dev/null
.venv/bin/python -m zipfile --list dist/manic-*.whl | grep 'manic/py.typed' >/dev/null
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
.venv/bin/python -m venv "$empty/venv"
"$empty/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/manic-*.whl
cd "$empty" # has no NumPy, of which torch warns
"$empty/venv/bin/python" -W "ignore:Failed to initialize NumPy" "$root/launch/try_wheel.py" "$root/README.md" "$root/src"
ls "$root/dist"
