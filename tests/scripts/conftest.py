"""Makes the modules of scripts/bench, dev and the quickstart importable, as among themselves."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
for folder in ("bench", "dev", "recipes/parallel", "recipes/quickstart"):
    sys.path.append(str(SCRIPTS / folder))
