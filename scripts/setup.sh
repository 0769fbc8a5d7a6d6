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

torch=$(grep '^torch==' "$lock")
if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$torch')" 2>/dev/null; then
    # A local wheel where pip is told of one; elsewhere uv, which knows the index of PyTorch's CPU builds.
    pip install -qq --no-deps --no-compile "$torch" 2>/dev/null || {
        pip install -qq uv
        .venv/bin/uv pip install -qq --python .venv/bin/python --no-deps --torch-backend=cpu "${torch%+cpu}"
    }
fi
grep -v '^torch==' "$lock" > .venv/requirements.txt
pip install -qq --no-deps --no-compile -r .venv/requirements.txt
pip install -qq --no-deps --no-build-isolation -e .
# On every core, unlike pip's. A folder of tests may hold what this Python cannot parse. Without this, every process of a user who
# sets PYTHONDONTWRITEBYTECODE would compile all that it imports.
.venv/bin/python -m compileall -q -j 0 .venv/lib qurl > .venv/compileall.log 2>&1 || true
echo "$want" > "$stamp"
