#!/usr/bin/env bash
# Make .venv, install, and run the test suite. Options of pytest may follow: bash launch/test.sh -k layouts
# The tests that take minutes each: bash launch/test.sh -m "slow or not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" train,test
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest --numprocesses auto --durations 5 "$@"
