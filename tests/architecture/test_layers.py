"""The rooms import downwards only, and every room has its place in the contract."""

import configparser
import subprocess
import sysconfig
from pathlib import Path

from tests.architecture.sources import ROOT


def test_rooms_import_downwards_only() -> None:
    # A process of its own: import-linter configures logging, which silences loggers made before.
    tool = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run(
        [str(tool), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_is_in_the_contract() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    layers = parser["importlinter:contract:layers"]["layers"].replace("|", " ").split()
    rooms = {
        f"hf_speed.{path.stem}"
        for path in (ROOT / "hf_speed").iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
    }
    assert rooms == set(layers)
