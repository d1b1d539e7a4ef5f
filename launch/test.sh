#!/usr/bin/env bash
# Create .venv, install manic, and run the test suite. Pass options of pytest: bash launch/test.sh -k layouts
# Include the slow tests, of minutes each: bash launch/test.sh -m "slow or not slow"
# Only the tests with the frameworks that manic is used in, in an environment of its own, .venv-integrations, which has
# them: bash launch/test.sh --integrations. With --write-frameworks they write their outcomes into the docs' table.
set -euo pipefail
extras=train,test folder=.venv tests=()
if [ "${1:-}" = --integrations ]; then
    shift
    extras=test,integrations folder=.venv-integrations tests=(tests/integrations)
    export HF_HUB_OFFLINE=1
fi
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" "$extras" "$folder"
if [ "$folder" = .venv-integrations ]; then # what else these two ask for excludes other packages, and is not used here
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps torchtitan timm
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$folder/bin/python" -m pytest --numprocesses auto --durations 5 "${tests[@]}" "$@"
