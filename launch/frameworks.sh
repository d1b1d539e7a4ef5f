#!/usr/bin/env bash
# Create .venv-integrations, with manic and the frameworks that it is used in, 1.8 GB, and run a command there:
# bash launch/frameworks.sh torchrun --nproc-per-node 2 launch/examples/hf_trainer.py --output runs/trainer
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" test,integrations .venv-integrations
# What else these two ask for excludes other packages, and is not used here.
"${pip_install[@]}" --constraint "$constraints" --no-deps torchtitan timm
export PATH=$PWD/.venv-integrations/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$@"
