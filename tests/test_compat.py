"""Versions are compared as versions, and the message says what to run."""

import pytest

from hf_speed import compat
from hf_speed.compat import Requirement, check_versions, complaint, installed
from hf_speed.errors import ConfigError


def test_what_is_installed_here_is_enough() -> None:
    check_versions()
    assert installed("torch") is not None
    assert installed("no-such-distribution") is None


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint(Requirement("no-such-distribution", "1.0", optional=True)) == ""
    monkeypatch.setattr(
        compat,
        "REQUIREMENTS",
        (
            Requirement("no-such-distribution", "1.0", optional=False),
            Requirement("torch", "100.0", optional=False),
        ),
    )
    with pytest.raises(
        ConfigError, match=r"not installed; run: pip install 'no-such.*torch: 2\..* too old"
    ):
        check_versions()
