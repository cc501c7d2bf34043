#!/usr/bin/env bash
# All that needs a GPU, in at most ten minutes: the tests marked gpu, then a pair, edits and Jacobians of a 1B-shape model.
#
#     benchmarks/gpu.sh                   # writes benchmarks/results/gpu-<device>.json
#     benchmarks/gpu.sh --tiny --out DIR  # the same path at a tiny shape, on whatever device there is
#
# The JSON is written after every stage, so that what was measured stays when time runs out.
set -euo pipefail
cd "$(dirname "$0")/.."
exec timeout 600 "${PYTHON:-python}" benchmarks/gpu.py "$@"
