"""What must not stand in the files: postponed work, paths of one machine, letters beyond ASCII."""

import re

from tests.architecture.sources import ROOT, sources

POSTPONED = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")))
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt)/\w")
TEXTS = ("README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg", ".ci/run")


def test_no_work_is_postponed_in_comments() -> None:
    for path, text in sources("hf_speed", "integrations", "scripts", "tests"):
        assert not POSTPONED.search(text), path


def test_no_path_of_one_machine() -> None:
    texts = dict(sources("hf_speed", "integrations", "scripts", "tests"))
    texts |= {path: path.read_text() for path in ROOT.glob("scripts/**/*.sh")}
    texts |= {ROOT / name: (ROOT / name).read_text() for name in TEXTS if (ROOT / name).is_file()}
    for path, text in texts.items():
        found = MACHINE.search(text)
        assert found is None, f"{path}: {found}"


def test_sources_are_ascii() -> None:
    for path, text in sources("hf_speed", "integrations"):
        assert text.isascii(), path
