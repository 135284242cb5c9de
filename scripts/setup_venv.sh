#!/usr/bin/env bash
# Creates .venv beside this checkout and installs hf_speed into it, editable, with pinned versions.
#
#   bash scripts/setup_venv.sh [EXTRAS]      EXTRAS: comma-separated, of recipes, test, dev, bench
#
# Run again, it does nothing unless the pins, pyproject.toml, csrc/ or the extras changed. csrc/ is compiled: there must
# be a C++17 compiler. PYTHON names another interpreter (>= 3.11). Which torch build arrives, CPU or CUDA, is the package
# index's choice: `torch` is pinned by its release number alone, and pip's own settings (PIP_EXTRA_INDEX_URL,
# PIP_FIND_LINKS) may prefer a CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-recipes}"
base="${PYTHON:-python3}"
constraints=scripts/constraints.txt

if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup_venv: $base is $("$base" -V 2>&1); hf_speed needs Python >= 3.11. Set PYTHON=/path/to/python3.11." >&2
    exit 1
fi
if [ ! -x .venv/bin/python ]; then
    echo "setup_venv: creating .venv with $("$base" -V)"
    "$base" -m venv .venv
fi

stamp=".venv/installed-${extras//,/-}"
fingerprint="$(cat "$constraints" pyproject.toml csrc/* | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ]; then
    exit 0
fi

# The build backend first, pinned, and no build isolation: an isolated build would fetch an unpinned one each time.
.venv/bin/python -m pip install --disable-pip-version-check --constraint "$constraints" setuptools
.venv/bin/python -m pip install --disable-pip-version-check --constraint "$constraints" \
    --no-build-isolation --editable ".[$extras]"
.venv/bin/python -c '
import torch
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"setup_venv: torch {torch.__version__} on {device}")'
echo "$fingerprint" > "$stamp"
