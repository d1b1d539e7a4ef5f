#!/usr/bin/env bash
# Create .venv, install manic, and run the test suite. Pass options of pytest: bash launch/test.sh -k layouts
# Include the slow tests, of minutes each: bash launch/test.sh -m "slow or not slow"
# Only the tests with the frameworks that manic is used in, in the environment of launch/frameworks.sh:
# bash launch/test.sh --integrations. With --write-frameworks they write their outcomes into the docs' table.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
if [ "${1:-}" = --integrations ]; then
    shift
    export HF_HUB_OFFLINE=1
    exec bash "$launch/frameworks.sh" python -m pytest --numprocesses auto --durations 5 -rs tests/integrations "$@"
fi
source "$launch/venv.sh" train,test
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest --numprocesses auto --durations 5 -rs "$@"
