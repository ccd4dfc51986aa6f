#!/usr/bin/env bash
# Create .venv (or $1) and install ptlab into it, with CUDA torch where an NVIDIA GPU answers and CPU torch everywhere else.
# Set PYTHON to choose the interpreter, TORCH=cpu or TORCH=cuda to overrule the choice of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
torch_version=2.13.0                        # the pin of pyproject.toml

find_python() {                             # run it, do not only look it up: a version manager's shim may stand for nothing
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "ptlab needs Python 3.11, 3.12 or 3.13 (with venv); found: $(${PYTHON:-python3} --version 2>&1 || true)." >&2
    echo "Install one (for example 'apt-get install python3.11 python3.11-venv') or name it: PYTHON=/path/to/python3.11 make setup" >&2
    exit 2
}

if [[ -z ${TORCH:-} ]]; then
    if nvidia-smi -L >/dev/null 2>&1; then TORCH=cuda; else TORCH=cpu; fi
fi
python=$(find_python)
echo "ptlab setup: $("$python" --version), $TORCH torch, into $venv (about a minute, by the network)"
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# CPU torch comes first and by its local version: PyPI's own build for Linux pulls in several GB of CUDA packages.
if [[ $TORCH == cpu && $(uname -s) == Linux ]]; then
    # First from where pip is set up to look (a local wheel, a mirror), then from PyTorch's index of CPU builds.
    "${pip[@]}" install -qq "torch==$torch_version+cpu" 2>/dev/null ||
        "${pip[@]}" install -qq --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch_version+cpu"
fi
"${pip[@]}" install -qq -e .

if [[ $TORCH == cpu ]] && "${pip[@]}" list --format=freeze | grep -qi '^nvidia-'; then
    echo "CUDA packages came in although CPU torch was wanted; remove $venv and try again, or set TORCH=cuda" >&2
    exit 1
fi
"$venv/bin/python" -c 'import torch; print(f"torch {torch.__version__}, CUDA available: {torch.cuda.is_available()}")'
