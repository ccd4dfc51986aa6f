#!/usr/bin/env bash
# scripts/setup_sdk_venvs.sh [DIRECTORY] [VERSION...]   make DIRECTORY/.venv-sdk-VERSION (default: the repository root, 0.38.0 and 0.25.0): the
#   official Tinker SDK as a user has it, CPU torch, and nothing of ptlab. tests/sdk runs its programs there (`make test-sdk`).
# PYTHON=... chooses the interpreter. uv is used where it is at hand (it links from its cache: seconds a venv), pip otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:-.}
versions=("${@:2}")
if (( ${#versions[@]} == 0 )); then versions=(0.38.0 0.25.0); fi
torch_version=2.13.0                        # the pin of pyproject.toml: a user trains custom losses with the torch he has

fail() { echo "ptlab sdk setup: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "the SDK needs Python 3.11 or newer (with venv); name one: PYTHON=/path/to/python3.11 $0"
}

find_uv() {
    local candidate
    for candidate in "${UV:-}" uv .venv/bin/uv "$(dirname "$(command -v "$python")")/uv"; do
        if [[ -n $candidate ]] && "$candidate" --version >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
}

# Known-good versions are the project's own (requirements/cpu.txt): every wheel is in the cache already when .venv was made before.
# CPU torch goes by its local version and first: PyPI's own build for Linux pulls in several GB of CUDA packages.
install_with_uv() {
    local venv=$1 packages=("${@:2}")
    local options=(--quiet --python "$venv/bin/python" --constraint "$constraints" --override requirements/cpu-overrides.txt)
    if [[ -n ${PIP_FIND_LINKS:-} ]]; then options+=(--find-links "$PIP_FIND_LINKS"); fi   # pip's setting for local wheels; uv reads its own only
    "$uv" pip install "${options[@]}" "${packages[@]}"
}

install_with_pip() {
    local venv=$1 packages=("${@:2}")
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq --constraint "$constraints")
    "${pip[@]}" "${packages[@]}" || "${pip[@]}" --extra-index-url https://download.pytorch.org/whl/cpu "${packages[@]}"
}

python=$(find_python)
uv=$(find_uv)
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep -v '^tinker==' requirements/cpu.txt >"$constraints"   # the version of the SDK is ours to choose
for version in "${versions[@]}"; do
    venv=$directory/.venv-sdk-$version
    if [[ -e $venv/.complete ]]; then
        echo "ptlab sdk setup: $venv is there already"
        continue
    fi
    started=$SECONDS
    rm -rf "$venv"
    "$python" -m venv "$venv"
    torch=torch==$torch_version
    if [[ $(uname -s) == Linux ]]; then torch=$torch+cpu; fi
    if [[ -z $uv ]] || ! install_with_uv "$venv" "$torch" "tinker==$version"; then
        install_with_pip "$venv" "$torch"
        install_with_pip "$venv" "tinker==$version"
    fi
    found=$("$venv/bin/python" -c 'import tinker, torch; print(tinker.__version__, torch.version.cuda)')
    [[ $found == "$version None" ]] || fail "$venv holds tinker and CUDA '$found', wanted '$version None'; remove it and try again"
    touch "$venv/.complete"
    echo "ptlab sdk setup: $venv holds tinker $version ($((SECONDS - started)) s)"
done
