#!/usr/bin/env bash
# Make the tables and pictures of docs/ again: those that a command of this repository makes. Each goes to a file of its
# own, with its command; docs/ is not changed. All of them take some hours on two cores, and 24 GB of memory.
#   --quick         the smallest sizes: shows that the commands work, and gives no figures
#   --output FOLDER write to this folder (default: build/figures)
#   --python FILE   use this interpreter, which has manic's dependencies and extras, instead of creating .venv
#   NAME ...        make only these; without a name, all
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=$root/build/figures quick='' python='' chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=yes && shift && continue ;;
        --output | --python) [ $# -ge 2 ] || { echo "$1 needs a value" >&2 && exit 2; } ;;
        -*) echo "unknown option $1; the head of launch/figures.sh lists them" >&2 && exit 2 ;;
        *) chosen+=("$1") && shift && continue ;;
    esac
    case $1 in
        --output) output=$(realpath -m -- "$2") ;;
        --python) python=$(realpath -s -- "$(command -v -- "$2" || echo "$2")") ;;
    esac
    shift 2
done
cd "$root"
names=(step step-124M small-tensors host latency scale train train-optax checkpoint run run-optax run-untuned
    tuning-held-out tuning-choosing tuning-named tuning-ladder)
for name in "${chosen[@]}"; do
    [[ " ${names[*]} " == *" $name "* ]] || { echo "no figure $name; there are: ${names[*]}" >&2 && exit 2; }
done
if [ -z "$python" ]; then
    # shellcheck source=launch/venv.sh
    source launch/venv.sh train,test,bench
    python=$root/.venv/bin/python
fi
# What runs is this checkout, whatever is installed.
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$output"
failed=()

quoted() { # words as they are typed
    local word
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_./=-]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
    done
}

figure() { # its name, the number of threads, and the arguments of the interpreter
    local name=$1 threads=$2
    shift 2
    if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
    printf 'OMP_NUM_THREADS=%s python%s\n\n' "$threads" "$(quoted "$@")" >"$output/$name.txt"
    echo "$name: $(head -n 1 "$output/$name.txt")"
    OMP_NUM_THREADS=$threads "$python" "$@" >>"$output/$name.txt" 2>"$output/$name.errors" || {
        failed+=("$name")
        echo "  failed: see $output/$name.errors"
    }
}

mechanic='Mechanic(AdamW), variant="optax"'
step=(--params 25M)
step_124=(--params 124M --repeats 10 --methods 'AdamW, fused' "$mechanic" "$mechanic, nonfinite=\"ignore\""
    "$mechanic, store_delta=False" mechanic-pytorch)
small=(--params 10k-small --repeats 5)
host=(--layers 32 --repeats 40)
latency=()
scale=(--models 8B 405B --ranks 1024 16384 --repeats 3)
train=(--ranks 1 2)
train_optax=(--ranks 1 2 --repeats 2 --options '--variant optax')
checkpoint=(--params 25M --ranks 1 2 4)
run=(--device cpu --steps 500)
runs=()
if [ -n "$quick" ]; then
    step=(--params 1M --repeats 1 --methods 'AdamW, fused' 'Mechanic(AdamW)')
    step_124=("${step[@]}")
    small=("${step[@]}")
    host=(--layers 1 --repeats 2 --methods 'AdamW, fused' 'Mechanic(AdamW)')
    latency=(--params 1M --delays 0.002 --repeats 2)
    scale=(--models 8B --ranks 1024 --repeats 1)
    tiny='--steps 20 --layers 1 --width 32 --heads 2 --seq-len 32 --data docs'
    train=(--ranks 1 --repeats 1 --steps 20 --options "$tiny")
    train_optax=(--ranks 1 --repeats 1 --steps 20 --options "--variant optax $tiny")
    checkpoint=(--params 1M --ranks 1 --repeats 1)
    # shellcheck disable=SC2206
    run=(--device cpu $tiny)
    runs=(--no-runs)
fi
torchrun=(-m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py)

figure step 2 launch/benchmark.py step "${step[@]}" --plot "$output/step.png"
figure step-124M 2 launch/benchmark.py step "${step_124[@]}"
figure small-tensors 2 launch/benchmark.py step "${small[@]}"
figure host 1 launch/benchmark.py host "${host[@]}"
figure latency 2 launch/benchmark.py latency "${latency[@]}"
figure scale 2 launch/benchmark.py scale "${scale[@]}"
figure train 2 launch/benchmark.py train "${train[@]}"
figure train-optax 1 launch/benchmark.py train "${train_optax[@]}"
figure checkpoint 2 launch/benchmark.py checkpoint "${checkpoint[@]}"
figure run 1 "${torchrun[@]}" "${run[@]}" --metrics "$output/run.jsonl" # draws run.png
figure run-optax 1 "${torchrun[@]}" "${run[@]}" --variant optax --metrics "$output/run-optax.jsonl"
figure run-untuned 1 "${torchrun[@]}" "${run[@]}" --tuner none --metrics "$output/run-untuned.jsonl"
# The runs that docs/ has are taken from there; only runs of other code are made again.
cp docs/tuning.jsonl docs/tuning-generated.jsonl docs/tuning-ladder.jsonl "$output"
figure tuning-held-out 1 launch/benchmark.py tuning --held-out --seeds 3 --base-lrs 1 \
    --results "$output/tuning-generated.jsonl" --profile "$output/tuning-profile.png" --sweeps "$output/sweeps.png" \
    --methods sweep 'fixed lr' multiplicative optax pytorch Prodigy D-Adaptation Schedule-Free "${runs[@]}"
figure tuning-choosing 1 launch/benchmark.py tuning --generated --seeds 1 \
    --results "$output/tuning-generated.jsonl" "${runs[@]}"
figure tuning-named 1 launch/benchmark.py tuning --seeds 3 --base-lrs 1 \
    --results "$output/tuning.jsonl" --plot "$output/tuning.png" "${runs[@]}"
figure tuning-ladder 1 launch/benchmark.py tuning --ladder --seeds 1 --methods sweep multiplicative optax \
    --results "$output/tuning-ladder.jsonl" --plot "$output/ladder.png" "${runs[@]}"

echo "tables and pictures are in $output"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
