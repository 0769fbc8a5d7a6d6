#!/usr/bin/env bash
# One machine, its own Ray: launch/local.sh recipe=quickstart quantization=int8
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
qurl plan "$@"
exec qurl train "$@"
