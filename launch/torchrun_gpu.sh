#!/usr/bin/env bash
# Train on all GPUs of this machine, in an environment that has manic and a CUDA build of torch.
# Pass options of launch/train.py; they override those below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ranks=${RANKS:-$(python3 -c 'import torch; print(torch.cuda.device_count())')}
if [ "$ranks" -lt 1 ]; then
    echo "torch sees no CUDA device; to train without one, run bash launch/train_cpu.sh" >&2
    exit 1
fi
# Use a new store after a restart: torchrun's shared store still holds the addresses of dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec torchrun --standalone --nproc-per-node "$ranks" --max-restarts 3 launch/train.py \
    --device cuda --dtype bf16 --parallel fsdp2 --layers 12 --width 768 --heads 12 --seq-len 1024 --batch-size $((16 * ranks)) \
    --steps 5000 --checkpoint-every 500 --checkpoint-dir runs/gpu/checkpoints --metrics runs/gpu/metrics.jsonl "$@"
