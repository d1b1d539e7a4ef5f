#!/usr/bin/env bash
# Run the GPU tests, checks and benchmarks on the NVIDIA GPUs of this machine, and write docs/gpu.md. It takes five
# hours at most. A section that fails or reaches its time limit is in the page, and the others run.
#   --output FILE   write the page to this file
#   --dry-run       walk through it on a CPU with the smallest sizes; needs --output
#   --python FILE   use this interpreter, which has manic's dependencies and extras, instead of creating .venv
#   --limit SECONDS give each section no more time than this
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output='' dry_run='' python='' most=''
told='bash launch/gpu_report.sh'
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=yes && shift && continue ;;
        --output | --python | --limit) ;;
        *) echo "unknown option $1; the head of launch/gpu_report.sh lists them" >&2 && exit 2 ;;
    esac
    [ $# -ge 2 ] || { echo "$1 needs a value" >&2 && exit 2; }
    case $1 in
        --output) output=$(realpath -m -- "$2") ;;
        --python) python=$(realpath -s -- "$(command -v -- "$2" || echo "$2")") ;;
        --limit) most=$2 ;;
    esac
    shift 2
done
cd "$root"
if [ -z "$dry_run" ]; then
    output=${output:-$root/docs/gpu.md}
elif [ -z "$output" ] || [ "$output" = "$(realpath docs/gpu.md)" ]; then
    echo "--dry-run needs --output FILE, and another file than docs/gpu.md" >&2
    exit 2
fi
if [ ! -w "$(dirname "$output")" ] || [ -d "$output" ]; then
    echo "cannot write $output" >&2
    exit 2
fi
if [ -z "$python" ]; then
    # shellcheck source=launch/venv.sh
    source launch/venv.sh train,test,bench
    python=$root/.venv/bin/python
fi
# What runs is this checkout, whatever is installed.
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$dry_run" ]; then
    export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
    told+=' --dry-run --output FILE'
    gpus=0
else
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -lt 1 ]; then
        echo "torch sees no CUDA device; to walk through it without one, pass --dry-run --output FILE" >&2
        exit 1
    fi
fi

sections=$(mktemp -d)
child=''
trap 'rm -rf "$sections"' EXIT
trap '[ -z "$child" ] || kill "$child"; echo "interrupted: no page is written" >&2; exit 130' INT TERM
number=10

new_section() { # its title
    number=$((number + 1))
    folder=$sections/$number
    mkdir "$folder"
    printf %s "$1" >"$folder/title"
}

skip() { # the title of a section, and why it does not run
    new_section "$1"
    printf %s "$2" >"$folder/skipped"
    echo "$1: skipped: $2"
}

section() { # its title, its time limit in seconds, and the arguments of the interpreter
    local limit=$2 status=0 start=$SECONDS
    new_section "$1"
    shift 2
    if [ -n "$most" ] && [ "$most" -lt "$limit" ]; then limit=$most; fi
    printf '%s\0' "$python" "$@" >"$folder/command"
    echo "$(<"$folder/title"): at most $limit s"
    # In the background, because bash handles a signal only when a command in the foreground has ended.
    timeout --kill-after 30 "$limit" "$python" "$@" >"$folder/output" 2>"$folder/errors" &
    child=$!
    wait "$child" || status=$?
    child=''
    printf %s "$limit" >"$folder/limit"
    printf %s "$status" >"$folder/status"
    printf %s "$((SECONDS - start))" >"$folder/seconds"
    [ "$status" -eq 0 ] || echo "  exit status $status"
}

mechanic='Mechanic(AdamW)'
tests=(-m pytest tests -m gpu -rs --tb short -p no:cacheprovider)
step=(launch/benchmark.py step --device cuda)
step_25m=(--params 25M)
step_1b=(--params 1B --repeats 10)
step_small=(--params 10k-small --repeats 5)
methods_1b=("$mechanic" "$mechanic, nonfinite=\"ignore\"" "$mechanic, variant=\"optax\""
    "$mechanic, variant=\"optax\", nonfinite=\"ignore\"")
device=cuda
train=(launch/benchmark.py train)
model='--device cuda --dtype bf16 --parallel fsdp2 --layers 12 --width 768 --heads 12 --seq-len 1024 --batch-size'
if [ -n "$dry_run" ]; then
    tests=(-m pytest tests/test_gpu.py -m gpu -rs -p no:cacheprovider)
    device=cpu
    step=(launch/benchmark.py step --device cpu --repeats 1)
    step_25m=(--params 1M --methods 'AdamW, fused')
    step_1b=(--params 1M)
    step_small=("${step_25m[@]}")
    methods_1b=("$mechanic, variant=\"optax\", nonfinite=\"ignore\"")
    train+=(--steps 20 --repeats 1)
    model='--device cpu --layers 1 --width 32 --heads 2 --seq-len 32 --data docs --batch-size'
fi

section 'GPU tests' 3600 "${tests[@]}"
section 'Host syncs of a step' 600 launch/benchmark.py gpu-syncs --device "$device"
section 'A step in a CUDA graph' 600 launch/benchmark.py gpu-capture --device "$device"
section 'A step, 25M parameters' 1800 "${step[@]}" "${step_25m[@]}"
for method in "${methods_1b[@]}"; do # one at a time, so that they fit the memory
    section "A step, 1B parameters, \`$method\`" 900 "${step[@]}" "${step_1b[@]}" --methods "$method"
done
section 'A step, 10,000 small tensors' 1800 "${step[@]}" "${step_small[@]}"
section 'Training with and without, one GPU' 1800 "${train[@]}" --ranks 1 --options "$model 16"
if [ "$gpus" -ge 2 ]; then
    section "Training with and without, $gpus GPUs" 1800 \
        "${train[@]}" --ranks "$gpus" --options "$model $((16 * gpus))"
else
    skip 'Training with and without, all GPUs' "needs two or more GPUs, and there are $gpus"
fi

status=0
"$python" launch/benchmark.py gpu-page --sections "$sections" --output "$output" --command "$told" \
    ${dry_run:+--dry-run} || status=$?
if [ "$output" = "$root/docs/gpu.md" ]; then
    echo "README.md, docs/guide.md, docs/benchmarks.md and docs/appendix/benchmarks.md say that nobody has run manic on a GPU: change that, too"
fi
exit "$status"
