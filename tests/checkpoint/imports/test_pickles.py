"""Foreign pickles: what they may say, and that nothing they name is run."""

import io
import os
import pickle  # what is refused is written with it
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_speed.checkpoint.imports import open_foreign
from hf_speed.checkpoint.imports.archive import StoredTensor, load_archive
from hf_speed.checkpoint.imports.pickles import PlainDict, Record, load_pickle
from hf_speed.errors import CheckpointError
from tests.checkpoint.imports.toys import toy_weights, write_zero2, zero2_trees

EXAMPLES = int(os.environ.get("HF_SPEED_FUZZ_EXAMPLES", "150"))
"""More for a longer search."""


class _Runs:
    """Its pickle would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "run")


class _Shell:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("attack", "says"), [(_Runs, "reads an attribute"), (_Shell, r"wants posix.system .* not run")]
)
def test_what_a_pickle_would_run_is_refused_by_name(
    tmp_path: Path, attack: type, says: str
) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(CheckpointError, match=says):
        load_pickle(pickle.dumps(attack(mark), 2), "a file")
    assert not mark.exists()


def test_an_attack_is_refused_in_each_kind_of_checkpoint(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    attack = _Shell(mark)
    model, optims = zero2_trees(toy_weights())
    write_zero2(tmp_path / "zero", model | {"client_state": attack}, optims)
    dcp = tmp_path / "dcp"
    dcp.mkdir()
    (dcp / ".metadata").write_bytes(pickle.dumps(attack))
    full = tmp_path / "full"
    full.mkdir()
    torch.save({"weight": torch.ones(2), "other": attack}, full / "pytorch_model_fsdp.bin")
    hub = tmp_path / "hub"
    hub.mkdir()
    torch.save({"weight": torch.ones(2), "other": attack}, hub / "pytorch_model.bin")
    for directory in (tmp_path / "zero", dcp, full, hub):
        with pytest.raises(CheckpointError, match=r"wants .*system .*not run"):
            open_foreign(directory)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        # GLOBAL, then BUILD: would change a function, or a class, of ours.
        (b"ctorch.serialization\n_get_layout\n(dX\x01\x00\x00\x00aK\x01sb.", "changes a function"),
        (b"ctorch\ndevice\n(dX\x01\x00\x00\x00aK\x01sb.", "changes a function"),
        (b"ctorch\nTensor\n(dX\x01\x00\x00\x00aK\x01sb.", "missing 1 required"),
        (b"ccollections\nOrderedDict\n(dX\x01\x00\x00\x00aK\x01sb.", "missing 1 required"),
        # Would read an attribute of a class that is no enum's.
        (b"cbuiltins\ngetattr\n(ctorch\nSize\nX\x08\x00\x00\x00__init__tR.", "reads an attribute"),
        (
            b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nX\x08\x00\x00\x00fromkeystR.",
            "reads an attribute",
        ),
        (b"ctorch\nFloatStorage\n)R.", "storage from nothing"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00hex_ctR.", "encodes text"),
        (b"\x80\x04\x95", "damaged"),
        (b"", "damaged"),
        (b"N\x8a\xff.", "damaged"),
    ],
)
def test_code_that_bends_the_stand_ins_is_refused(code: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_pickle(code, "a file")
    # The table is as it was.
    assert load_pickle(b"ccollections\nOrderedDict\n)R.", "a file") == PlainDict()


def test_a_pickle_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_speed.checkpoint.imports.pickles.MAX_PICKLE_BYTES", 10)
    with pytest.raises(CheckpointError, match="pickle of 11 bytes; more than 10"):
        load_pickle(b"N" * 11, "a file")


def test_storages_are_refused_where_there_are_none() -> None:
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return "storage" if value is buffer else None

    out = io.BytesIO()
    Pickler(out, 2).dump([buffer])
    with pytest.raises(CheckpointError, match="storages that are not there"):
        load_pickle(out.getvalue(), "a file")


def test_tensors_come_back_bitwise(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    values = {
        **{str(dtype): torch.arange(5).to(dtype) for dtype in
           (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
            torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.uint16)},
        "slice": base[1:3, 2:5],
        "transposed": base.t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base[0]),
    }  # fmt: skip
    torch.save(values, tmp_path / "file.pt")
    loaded = load_archive(tmp_path / "file.pt")
    for name, value in values.items():
        assert isinstance(loaded[name], StoredTensor)
        assert loaded[name].dtype == value.dtype
        found = loaded[name].read()
        assert found.shape == value.shape
        assert torch.equal(found.contiguous().view(-1).view(torch.uint8),
                           value.detach().contiguous().view(-1).view(torch.uint8))  # fmt: skip
    assert loaded["slice"].read_flat(1, 4).tolist() == [9, 10, 14, 15]
    assert loaded["parameter"].read_flat(2, 3).tolist() == [2, 3, 4]
    with pytest.raises(CheckpointError, match=r"asked for elements \[4, 9\) of a tensor of 6"):
        loaded["parameter"].read_flat(4, 5)


def test_an_archive_within_a_file_is_read_alone(tmp_path: Path) -> None:
    first, second = io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(3), first)
    torch.save({"a": torch.full((2,), 7.0)}, second)
    path = tmp_path / "both"
    path.write_bytes(first.getvalue() + second.getvalue())
    start, nbytes = len(first.getvalue()), len(second.getvalue())
    assert load_archive(path, offset=start, nbytes=nbytes)["a"].read().tolist() == [7.0, 7.0]
    with pytest.raises(CheckpointError, match="cut short"):
        load_archive(path, offset=start, nbytes=nbytes + 1)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.arange(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is cut short"):
        load_archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 0}, 2))
    with pytest.raises(CheckpointError, match="is compressed"):
        load_archive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 0}, 2))
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian"):
        load_archive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        load_archive(path)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save([1], path)
    data = bytearray(path.read_bytes())
    # The flags of data.pkl in the directory at the end of the zip, 8 bytes into its entry.
    entry = data.index(b"PK\x01\x02")
    data[entry + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        load_archive(path)


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.arange(1000)}, path)
    tensor = load_archive(path)["a"]
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError, match=r"file\.pt ends before byte"):
        tensor.read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"file\.pt cannot be read"):
        tensor.read()


def _original() -> bytes:
    buffer = io.BytesIO()
    torch.save(
        {"a": torch.arange(12.0).view(3, 4)[:, 1:], "b": [1, {"c": torch.Size([2])}]}, buffer
    )
    return buffer.getvalue()


ORIGINAL = _original()


@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_damaged_archives_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes change: a value of plain data, or a CheckpointError; nothing else."""
    damaged = bytearray(ORIGINAL)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    path = tmp_path / "file.pt"
    path.write_bytes(bytes(damaged))
    try:
        loaded = load_archive(path)
        tensor = loaded["a"] if isinstance(loaded, dict) and "a" in loaded else None
        if isinstance(tensor, StoredTensor):
            assert tensor.read().numel() <= 12
    except CheckpointError:
        pass
    else:
        assert isinstance(loaded, (dict, list, tuple, str, int, float, Record, StoredTensor, bytes))
