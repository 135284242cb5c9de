"""`python -m hf_speed.run train.py` runs an unmodified script, and puts everything back."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from hf_speed.cli import main as command_line
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


STOCK_SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=32)
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(32)]
arguments = dict(use_cpu=True, max_steps=2, save_steps=2, report_to=[], disable_tqdm=True)
trainer = Trainer(
    model=model, args=TrainingArguments(sys.argv[1], **arguments), train_dataset=rows
)
trainer.train()
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


def test_an_unmodified_trainer_script_trains_at_stage_3_on_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, config, out = tmp_path / "train.py", tmp_path / "zero3.yaml", tmp_path / "out"
    script.write_text(STOCK_SCRIPT)
    config.write_text("zero: {stage: 3}\n")
    words = ["launch", "--cpu", "-n", "2", "--config", str(config), "-m", "hf_speed.run"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_speed", *words, str(script), str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert command_line(["inspect", str(out / "checkpoint-2")]) == 0
    report = capsys.readouterr().out
    assert "written by 2 rank(s)" in report
    assert "stage: 3" in report
