#!/usr/bin/env bash
# Runs the whole test suite in .venv, which it sets up first. Arguments go to pytest: bash scripts/test.sh -k config
#
# WORKERS (default 2) test files run at a time: most of a test's time one core waits, for a spawn or for another rank.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_venv.sh test,dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile "$@"
