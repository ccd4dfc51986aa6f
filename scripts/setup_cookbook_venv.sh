#!/usr/bin/env bash
# scripts/setup_cookbook_venv.sh [DIR]    make a venv in DIR (default .venv-cookbook) with tinker-cookbook 0.6.1 and the official Tinker SDK
#                                         0.38.0, and nothing of ptlab: tests/cookbook runs the recipes there, against `ptlab serve`.
# PYTHON=... chooses the interpreter. One to two minutes; 1.6 GB.
#
# The cookbook's own metadata says what it needs, with one exception: tml-renderers >=0.4.1 is not to be had everywhere (nor is it needed:
# the cookbook imports it only for Inkling and Kimi K3.1-Pro models, and has its own renderers for all others). So it is left out, and
# that is why the cookbook itself comes with --no-deps. pip says so in two lines that begin with ERROR; they do not stop it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-cookbook}
python=${PYTHON:-python3.11}
constraints=requirements/cpu.txt            # known-good versions, the project's own: wheels already in the cache
torch_version=2.13.0                        # the pin of pyproject.toml
tinker_version=0.38.0
cookbook_version=0.6.1
extras="math-rl multiplayer-rl"             # rl_loop, rl_basic and math_rl grade with sympy; text_arena plays TextArena's games

fail() { echo "cookbook venv: $*" >&2; exit 1; }

if [[ -e $venv/.complete ]]; then
    echo "cookbook venv: $venv is there already"
    exit
fi
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# CPU torch by its local version: the client needs no GPU, and PyPI's own build for Linux pulls in several GB of CUDA packages.
if [[ $(uname -s) == Linux ]]; then
    "${pip[@]}" install -qq "torch==$torch_version+cpu" 2>/dev/null ||
        "${pip[@]}" install -qq --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch_version+cpu" ||
        fail "no CPU build of torch $torch_version could be installed (above)"
else
    "${pip[@]}" install -qq "torch==$torch_version"
fi
"${pip[@]}" install -q --no-deps "tinker-cookbook==$cookbook_version"
needs=$("$venv/bin/python" - $extras <<'PYTHON'
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for need in map(Requirement, requires("tinker-cookbook")):
    wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ["", *sys.argv[1:]])
    if wanted and need.name not in ("tml-renderers", "torch", "tinker"):
        print(f"{need.name}{need.specifier}")
PYTHON
)
mapfile -t needs <<<"$needs"
"${pip[@]}" install -q --constraint "$constraints" "torch==$torch_version" "tinker==$tinker_version" "${needs[@]}"
"$venv/bin/python" -c 'import tinker_cookbook.rl.train, tinker_cookbook.recipes.rl_loop'
touch "$venv/.complete"
echo "cookbook venv: $venv has tinker $tinker_version and tinker-cookbook $cookbook_version (without tml-renderers)"
