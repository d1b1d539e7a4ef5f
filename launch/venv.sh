# Create a virtual environment in the folder $2 (default: .venv) and install manic in it with the extras in $1. Sourced
# by the other scripts. Set PYTHON to choose the interpreter, PIP_EXTRA_INDEX_URL to choose the index for torch, TORCH to
# choose another torch than the pinned one: a version, newest or nightly.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${2:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; assert sys.version_info >= (3, 11), "manic needs Python 3.11 or newer"'
    "${PYTHON:-python3}" -m venv "$venv"
fi
# Without an NVIDIA GPU, use PyTorch's CPU build, a tenth of the download.
cpu_index=https://download.pytorch.org/whl/cpu
if [ "$(uname)" = Linux ] && [ -z "${PIP_EXTRA_INDEX_URL:-}" ] && ! command -v nvidia-smi >/dev/null &&
    curl --silent --fail --head --max-time 5 --output /dev/null "$cpu_index/torch/"; then
    export PIP_EXTRA_INDEX_URL=$cpu_index
fi
pip_install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
constraints=constraints.txt
if [ -n "${TORCH:-}" ]; then # another torch than the pinned one
    constraints=$venv/constraints.txt
    grep --invert-match '^torch==' constraints.txt >"$constraints"
    case $TORCH in
        nightly) "${pip_install[@]}" --pre torch --index-url https://download.pytorch.org/whl/nightly/cpu ;;
        newest) "${pip_install[@]}" --upgrade torch ;;
        *) "${pip_install[@]}" "torch==$TORCH" ;;
    esac
fi
"${pip_install[@]}" --constraint "$constraints" --editable ".[$1]"
