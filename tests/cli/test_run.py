"""`python -m hf_speed.run train.py` runs an unmodified script, and puts everything back."""

import sys
from pathlib import Path

import pytest
import transformers

from hf_speed.errors import ConfigError
from hf_speed.run import main

SCRIPT = """
import sys
from transformers import TrainingArguments
import neighbour

assert __name__ == "__main__"
assert neighbour.VALUE == 1
args = TrainingArguments(sys.argv[1], use_cpu=True, report_to=[])
with open(sys.argv[1], "w") as file:
    file.write(f"{sys.argv[2:]} {args.hf_speed_config.zero.stage}")
"""


def test_stock_classes_see_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("VALUE = 1\n")
    monkeypatch.setenv("HF_SPEED_CONFIG", '{"zero": {"stage": 2}}')
    before = sys.argv[:], sys.path[:], dict(vars(transformers.Trainer))
    out = tmp_path / "out"
    main([str(tmp_path / "train.py"), str(out), "--lr", "1"])
    assert out.read_text() == "['--lr', '1'] 2"
    assert (sys.argv[:], sys.path[:], dict(vars(transformers.Trainer))) == before


def test_what_it_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.delenv("HF_SPEED_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="No script given"):
        main([])
    with pytest.raises(ConfigError, match=r"There is no script at .*absent\.py"):
        main([str(tmp_path / "absent.py")])
    with pytest.raises(ConfigError, match=r"HF_SPEED_CONFIG is unset, so that hf_speed.run would"):
        main([str(script)])
    monkeypatch.setenv("HF_SPEED_CONFIG", "{}")
    monkeypatch.setenv("HF_SPEED_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="=2 processes were asked for"):
        main([str(script)])
