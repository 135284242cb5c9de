"""The rooms import downwards only, and every room has its place in the contract."""

import configparser

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.architecture.sources import ROOT


def test_rooms_import_downwards_only() -> None:
    status = lint_imports(config_filename=str(ROOT / "setup.cfg"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, "run lint-imports to see which import goes upwards"


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
