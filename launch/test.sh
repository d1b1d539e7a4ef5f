#!/usr/bin/env bash
# Create .venv, install manic, and run the test suite. Pass options of pytest: bash launch/test.sh -k layouts
# Include the slow tests, of minutes each: bash launch/test.sh -m "slow or not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" train,test
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest --numprocesses auto --durations 5 "$@"
