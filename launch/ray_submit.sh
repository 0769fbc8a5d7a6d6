#!/usr/bin/env bash
# A Ray cluster that is up, with qurl installed on every node and output_dir on a shared file system:
#   RAY_ADDRESS=http://head:8265 launch/ray_submit.sh recipe=gsm8k cluster=ray output_dir=/shared/runs
set -euo pipefail
: "${RAY_ADDRESS:?set it to the dashboard of the cluster, e.g. http://head:8265}"
cd "$(dirname "$0")/.."
exec "${RAY:-.venv/bin/ray}" job submit --address "$RAY_ADDRESS" --entrypoint-num-cpus 1 -- qurl train "$@"
