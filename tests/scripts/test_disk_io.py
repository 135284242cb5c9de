"""The bench of file I/O names the peers that could not take part, and then proves nothing."""

import shutil
import sys
from argparse import Namespace
from pathlib import Path

import common
import disk_io
import pytest


def test_absent_peers_are_named_rows_and_an_incomplete_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", None)
    monkeypatch.setattr(disk_io, "LARGE_BYTES", 1 << 20)
    args = Namespace(quick=True, json=None, out=None, bench="disk_io")
    with disk_io.scratch(tmp_path, 2 << 20) as target:
        rows = disk_io.measure(target, "read", args, "2 MiB")
    assert [row.peer for row in rows] == [
        "fio (it is not installed): not run",
        "DeepSpeed (deepspeed is not installed): not run",
    ]
    assert common.finish(rows, args, complete=all(row.runs for row in rows)) == 1
    assert "not run" in capsys.readouterr().out


def test_the_peer_reads_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_io, "LARGE_BYTES", 1 << 20)
    if shutil.which("fio") is None:
        pytest.skip("needs fio")
    with disk_io.scratch(tmp_path, 2 << 20) as target:
        if not target.file.direct:
            pytest.skip("needs a temporary directory with O_DIRECT")
        way = disk_io.Fio("io_uring", 1 << 16, huge=False)
        assert disk_io.run_fio(target, way, "read") > 0
        with pytest.raises(RuntimeError, match=r"fio \(none, 64 KiB, 4 KiB pages\) failed"):
            disk_io.run_fio(target, way._replace(engine="none"), "read")
