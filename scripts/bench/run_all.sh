#!/usr/bin/env bash
# Runs every bench in full on this machine, writes scripts/bench/results/*.json and README's tables.
#
#   bash scripts/bench/run_all.sh [--quick]     PYTHON: an interpreter that has the [bench] extra
#
# Nothing else should run meanwhile. zero_bytes needs `unshare --net` (root, or user namespaces). Where a GPU is, the
# one-process claim is measured on it too. The exit code is the number of benches in which a bar was missed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
results=scripts/bench/results
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ "${1:-}" = --quick ] && results="$(mktemp -d)"

missed=0
run() {
    echo "== $*"
    "$python" "scripts/bench/$@" --out "$results" || missed=$((missed + 1))
}

run zero_bytes.py "$@"
run zero_memory.py "$@"
run zero_step.py "$@"
run cpu_adam.py "$@"
run disk_io.py "$@"
run cpu_adam.py "$@"
run offload_step.py "$@"
run pipe_bubble.py "$@"
run pipe_zero_bubble.py "$@"
run pipe_train.py "$@"
run mesh_equality.py "$@"
run checkpoint_kills.py "$@"
run checkpoint_save.py "$@"
run checkpoint_export.py "$@"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    run zero_step.py --device cuda "$@"
    run offload_gpu.py "$@"
fi
if [ "${1:-}" = --quick ]; then
    echo "quick records, not kept with the repository: $results"
else
    "$python" scripts/bench/tables.py
fi
echo "benches with a missed bar: $missed"
exit "$missed"
