#!/usr/bin/env bash
# Make .venv, install, and train a small GPT on two CPU ranks to a visible result in a few minutes.
# Options of launch/train.py may follow: bash launch/train_cpu.sh --steps 2000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" train
# A new store after a restart: torchrun's shared one still holds the addresses of ranks that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/torchrun --standalone --nproc-per-node "${RANKS:-2}" launch/train.py \
    --device cpu --steps 500 --checkpoint-dir runs/cpu/checkpoints --metrics runs/cpu/metrics.jsonl "$@"
