#!/usr/bin/env bash
# Create .venv, install manic, and train a small GPT on two CPU ranks in a few minutes.
# Pass options of launch/train.py: bash launch/train_cpu.sh --steps 2000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" train
# Use a new store after a restart: torchrun's shared store still holds the addresses of dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/torchrun --standalone --nproc-per-node "${RANKS:-2}" launch/train.py \
    --device cpu --steps 500 --checkpoint-dir runs/cpu/checkpoints --metrics runs/cpu/metrics.jsonl "$@"
