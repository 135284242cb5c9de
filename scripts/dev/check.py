"""Runs what CI checks besides the tests: format, lint, types, layers, spelling, whitespace.

    .venv/bin/python scripts/dev/check.py [NAME ...]     all, or those named
    .venv/bin/python scripts/dev/check.py --fix          let the formatters rewrite, then check

Every check runs, even after one has failed; the exit status is 1 if any did.
"""

import argparse
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sysconfig.get_path("scripts"))
NATIVE = sorted(
    str(path.relative_to(ROOT))
    for folder in ("csrc", "tests/csrc", "scripts/bench")
    for path in (ROOT / folder).iterdir()
    if path.suffix in {".cpp", ".h"}
)

CHECKS: dict[str, list[str]] = {
    "format": ["ruff", "format", "--check", "."],
    "native": ["clang-format", "--dry-run", "--Werror", *NATIVE],
    "lint": ["ruff", "check", "."],
    "types": ["pyrefly", "check"],
    "layers": ["lint-imports", "--no-cache"],
    "spelling": ["codespell"],
}
FIXES: list[list[str]] = [
    ["ruff", "check", "--fix", "."],
    ["ruff", "format", "."],
    ["clang-format", "-i", *NATIVE],
]


def main() -> int:
    """Run the checks and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--fix", action="store_true", help="let the formatters rewrite first")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    if arguments.fix:
        for command in FIXES:
            _run(command)
    failed = [name for name in arguments.names or CHECKS if not _check(name)]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall checks passed")
    return int(bool(failed))


def _check(name: str) -> bool:
    print(f"--- {name}: {' '.join(CHECKS[name])}", flush=True)
    start = time.perf_counter()
    passed = _run(CHECKS[name]) == 0
    print(f"{'ok' if passed else 'FAILED'} in {time.perf_counter() - start:.1f} s", flush=True)
    return passed


def _run(command: list[str]) -> int:
    tool, *arguments = command
    return subprocess.run([str(TOOLS / tool), *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
