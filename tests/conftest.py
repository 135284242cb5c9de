"""Settings of every test: one thread a process, no network, no GPU test without a GPU."""

import os

# Before torch is imported: its thread pool takes its size from here, in every rank as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: how long an example takes here depends on who else runs. Derandomised: a change that
# breaks nothing never fails, and one that fails does so again.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch.cuda finds none here"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count and name the skipped tests, so that none passes by not running."""
    skipped = terminalreporter.getreports("skipped")
    if not skipped:
        return
    terminalreporter.section(f"{len(skipped)} skipped")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.line(f"{report.nodeid}: {reason}")
