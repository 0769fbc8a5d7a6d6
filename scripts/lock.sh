#!/usr/bin/env bash
# Rewrite requirements/cpu.lock and requirements/gpu.lock from the extras in pyproject.toml: pip resolves, nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -qq --upgrade "pip>=25"  # resolves from metadata, without downloading the wheels

lock() {  # lock NAME EXTRAS TORCH [EXCLUDED...]
    local name=$1 extras=$2 torch=$3
    shift 3
    pip install -qq --dry-run --ignore-installed --report "$work/report.json" "$torch" ".[$extras]" hatchling editables
    "$work/venv/bin/python" scripts/lock.py "$work/report.json" "$extras" "$@" > "$work/lock"
    mv "$work/lock" "requirements/$name.lock"
    echo "requirements/$name.lock: $(grep -c == "requirements/$name.lock") packages"
}

case ${1:-all} in cpu | all)
    # torchvision, torchaudio, torchcodec: the registry's builds need CUDA and break `import transformers` beside a CPU torch.
    lock cpu cpu,dev "$(grep '^torch==' requirements/cpu.lock)" torchvision torchaudio torchcodec ;;
esac
case ${1:-all} in gpu | all)
    lock gpu gpu,dev torch===2.13.0 ;;  # three equal signs: not the +cpu build of that version
esac
