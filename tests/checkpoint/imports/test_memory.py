"""An import holds a file's or a tensor's worth, not the model."""

import sys
from pathlib import Path

import torch

import hf_speed
from tests.checkpoint.imports.toys import write_zero2, zero2_trees
from tests.support import run_ranks

MIB = 1 << 20


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _import_rank(source: str, target: str) -> tuple[int, int]:
    # The first one imports modules and warms allocators.
    hf_speed.import_checkpoint(f"{source}/small", f"{target}/small")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _peak_bytes()
    hf_speed.import_checkpoint(f"{source}/large", f"{target}/large", max_shard_size=4 * MIB)
    return before, _peak_bytes()


def test_peak_memory_is_a_fraction_of_the_model(tmp_path: Path) -> None:
    weights = {f"layer.{index}.weight": torch.ones(512, 512) for index in range(24)}
    write_zero2(tmp_path / "small", *zero2_trees({"a": torch.ones(2, 2)}))
    write_zero2(tmp_path / "large", *zero2_trees(weights))
    assert sys.platform == "linux"
    ((before, peak),) = run_ranks(
        _import_rank, 1, str(tmp_path), str(tmp_path / "out"), backend=None
    )
    model = sum(path.stat().st_size for path in (tmp_path / "out" / "large").rglob("*.safetensors"))
    assert model > 70 * MIB
    # Measured: around 24 MiB, on either side of it.
    assert peak - before < model / 2
