#!/usr/bin/env bash
# Create .venv from the CPU lock and install this checkout into it. Done once; done again when the lock or pyproject.toml changes.
# Everything is installed without dependency resolution: the lock is complete, and it leaves out torchvision, torchaudio and
# torchcodec on purpose (their registry builds need CUDA and break `import transformers` beside a CPU torch).
set -euo pipefail
cd "$(dirname "$0")/.."
lock=requirements/cpu.lock
stamp=.venv/.qurl-setup
want=$(cat "$lock" pyproject.toml scripts/setup.sh | sha256sum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

python=${PYTHON:-python3.11}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
    echo "set-up: $python is missing or not Python 3.11 or 3.12; name one with PYTHON=..." >&2
    exit 2
}
echo "set-up: .venv from $lock"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
pip install -qq uv==0.13.9  # unpacks on every core; pip needs five times as long for the same lock
install() { .venv/bin/uv pip install -q --python .venv/bin/python --no-deps "$@"; }

# uv reads no configuration of pip's: where pip is told of local wheels or of another index, uv is told too.
of_pip() { pip config list | sed -n "s/.*[.]$1='\(.*\)'/\1/p" | head -n 1; }
links=$(of_pip find-links) index=$(of_pip index-url)
[ -z "$links" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-${links// /,}}
[ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}

torch=$(grep '^torch==' "$lock")
if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$torch')" 2>/dev/null; then
    # A local wheel where there is one; elsewhere the index of PyTorch's CPU builds, which uv knows.
    install "$torch" 2>/dev/null || install --torch-backend=cpu "${torch%+cpu}"
fi
grep -v '^torch==' "$lock" > .venv/requirements.txt
install -r .venv/requirements.txt
install --no-build-isolation -e .
# Without bytecode, every process of a user who sets PYTHONDONTWRITEBYTECODE would compile all that it imports. What no run imports
# is two thirds of the files and is left out. A folder may hold what this Python cannot parse.
unused='/(tests?|testing|examples?|benchmarks?)/|/(anthropic|openai|numba|fontTools|mypy|mypyc|setuptools|pip|virtualenv)/'
unused+='|/transformers/models/|/vllm/(model_executor/models|models|entrypoints|benchmarks)/|/torch/(onnx|ao)/|/sympy/physics/'
unused+='|/pygments/lexers/|/ray/(rllib|serve|tune|train|data|dashboard|llm)/'
.venv/bin/python -m compileall -q -j 0 -x "$unused" .venv/lib qurl > .venv/compileall.log 2>&1 || true
echo "$want" > "$stamp"
