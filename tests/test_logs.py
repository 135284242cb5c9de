"""Loggers speak on rank 0, on every rank when asked, and once when asked."""

import logging

import pytest

from hf_speed.logs import get_logger


def test_rank_0_speaks_and_the_record_names_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    get_logger("hf_speed.test").info("built %d units", 3)
    (record,) = caplog.records
    assert record.getMessage() == "built 3 units"
    assert record.filename == "test_logs.py"


def test_other_ranks_speak_only_when_asked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    log = get_logger("hf_speed.test")
    log.warning("unheard")
    log.warning("heard", extra={"all_ranks": True})
    assert [record.getMessage() for record in caplog.records] == ["heard"]


def test_log_once_counts_message_and_values(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("hf_speed.test")
    for value in (1, 1, 2):
        log.log_once(logging.WARNING, "value %d", value)
    assert [record.getMessage() for record in caplog.records] == ["value 1", "value 2"]
    assert {record.filename for record in caplog.records} == {"test_logs.py"}
