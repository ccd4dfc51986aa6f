#!/usr/bin/env bash
# scripts/setup_trl_venv.sh [DIR]         make a venv in DIR (default .venv-trl) with TRL 1.16 and what it trains with (transformers, PEFT,
#                                         accelerate, datasets), and nothing of ptlab: benchmarks/trl_worker.py runs there, ptlab beside it.
# PYTHON=... chooses the interpreter, TORCH=cpu|cuda overrules the choice of builds. One to two minutes; 1.6 GB with CPU torch.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-trl}
constraints=requirements/cpu.txt            # known-good versions, the project's own: both systems are measured on the same libraries
torch_version=2.13.0                        # the pins of pyproject.toml
transformers_version=5.19.0
peft_version=0.21.0
trl_version="1.16.*"

fail() { echo "trl venv: $*" >&2; exit 1; }

if [[ -e $venv/.complete ]]; then
    echo "trl venv: $venv is there already"
    exit
fi
[[ -x $venv/bin/python ]] || "${PYTHON:-python3.11}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

torch=${TORCH:-}
if [[ -z $torch ]]; then
    if nvidia-smi -L >/dev/null 2>&1; then torch=cuda; else torch=cpu; fi
fi
# CPU torch by its local version and first: PyPI's own build for Linux pulls in several GB of CUDA packages.
if [[ $torch == cpu && $(uname -s) == Linux ]]; then
    "${pip[@]}" install -qq "torch==$torch_version+cpu" 2>/dev/null ||
        "${pip[@]}" install -qq --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch_version+cpu" ||
        fail "no CPU build of torch $torch_version could be installed (above)"
else
    "${pip[@]}" install -qq "torch==$torch_version"
fi
"${pip[@]}" install -q --constraint "$constraints" "torch==$torch_version" "transformers==$transformers_version" "peft==$peft_version" \
    accelerate datasets "trl==$trl_version" || fail "TRL $trl_version could not be installed (above)"
if [[ $torch == cpu && -n $("${pip[@]}" list --format=freeze | grep -i '^nvidia-') ]]; then
    fail "CUDA packages came in although CPU torch was wanted; remove $venv and try again, or set TORCH=cuda"
fi
"$venv/bin/python" -c 'from trl import GRPOTrainer'
touch "$venv/.complete"
echo "trl venv: $venv has $("${pip[@]}" list --format=freeze | grep -E '^(trl|torch|transformers|peft|accelerate)==' | paste -sd' ')"
