"""`hf-speed launch` starts the world that was asked for, or says why not."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_speed.cli import build_parser
from hf_speed.cli.launch import LaunchPlan, Machine, plan_launch
from hf_speed.config import env, load_config
from hf_speed.errors import ConfigError

NO_GPU = Machine(num_cores=8, num_gpus=0)
FOUR_GPUS = Machine(num_cores=8, num_gpus=4)

WORLD_SCRIPT = """
import json, os, sys
import torch.distributed as dist
from hf_speed.config import env
from hf_speed.integrations.accelerate import Accelerator

accelerator = Accelerator()
env.check_promised_world()
names = ("OMP_NUM_THREADS", "HF_SPEED_CONFIG")
report = {name: os.environ.get(name) for name in names}
report |= {"rank": accelerator.process_index, "world": accelerator.num_processes,
           "device": accelerator.device.type, "argv": sys.argv[1:]}
with open(f"{sys.argv[1]}-{accelerator.process_index}", "w") as file:
    json.dump(report, file)
accelerator.end_training()
"""


def _arguments(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["launch", *words])


def _plan(*words: str, machine: Machine = NO_GPU, threads: str = "") -> LaunchPlan:
    return plan_launch(
        _arguments(*words), machine=machine, environment={"OMP_NUM_THREADS": threads}
    )


def test_cpu_world_goes_through_the_multi_process_launcher() -> None:
    plan = _plan("--cpu", "-n", "2", "train.py", "--lr", "1", "-n", "7")
    assert plan.variables == {
        "ACCELERATE_USE_CPU": "1",
        "HF_SPEED_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "4",
    }
    assert "--multi_gpu" in plan.command
    assert "--cpu" not in plan.command
    assert plan.command[-5:] == ("train.py", "--lr", "1", "-n", "7")
    assert plan.summary == "hf-speed: 2 process(es) on cpu, 4 thread(s) each"


def test_threads_that_the_user_set_stay() -> None:
    assert _plan("--cpu", "-n", "2", "t.py", threads="3").variables["OMP_NUM_THREADS"] == "3"
    assert _plan("--cpu", "-n", "64", "t.py").variables["OMP_NUM_THREADS"] == "1"


def test_gpus_are_all_used_unless_told() -> None:
    plan = _plan("train.py", machine=FOUR_GPUS)
    assert plan.variables == {"HF_SPEED_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2"}
    assert _plan("-n", "1", "t.py", machine=FOUR_GPUS).variables["HF_SPEED_WORLD_SIZE"] == "1"


def test_module_and_several_machines_reach_accelerate() -> None:
    words = ["--cpu", "-n", "4", "--num_machines", "2", "--main_process_ip", "10.0.0.1"]
    plan = _plan(*words, "--main_process_port", "2950", "--mixed_precision", "bf16", "-m", "a.b")
    text = " ".join(plan.command)
    assert "--num_machines 2 --machine_rank 0 --mixed_precision bf16 --multi_gpu" in text
    assert text.endswith("--main_process_ip 10.0.0.1 --main_process_port 2950 -m a.b")
    assert plan.variables["OMP_NUM_THREADS"] == "4"


def test_config_is_checked_and_carried(tmp_path: Path) -> None:
    path = tmp_path / "zero3.yaml"
    path.write_text("zero: {stage: 3}\n")
    plan = _plan("--cpu", "-n", "2", "--config", str(path), "train.py")
    carried = load_config(plan.variables[env.CONFIG_VARIABLE])
    assert carried == load_config({"zero": {"stage": 3}})


def test_section_is_split_out_of_an_accelerate_config(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\nnum_processes: 2\nuse_cpu: true\n"
        "hf_speed_config:\n  zero: {stage: 2}\n"
    )
    plan = _plan("--config", str(path), "train.py")
    assert plan.accelerate_config == {
        "compute_environment": "LOCAL_MACHINE",
        "num_processes": 2,
        "use_cpu": True,
    }
    assert load_config(plan.variables[env.CONFIG_VARIABLE]).zero.stage == 2
    assert plan.variables["ACCELERATE_USE_CPU"] == "1"
    with pytest.raises(
        ConfigError, match=r"-n 3 contradicts num_processes: 2 in .*accelerate\.yaml"
    ):
        _plan("-n", "3", "--config", str(path), "train.py")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-n", "2", "t.py"), r"2 processes on this machine need as many GPUs.*finds 0.*--cpu"),
        (("--cpu", "-n", "0", "t.py"), r"-n 0 is out of range: at least 1"),
        (("--cpu", "-n", "3", "--num_machines", "2", "t.py"), r"3 processes do not divide over"),
        (("--cpu", "--config", "absent.yaml", "t.py"), r"absent\.yaml' cannot be read"),
    ],
)
def test_impossible_world_is_an_error(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(*words)


def test_world_of_the_config_must_be_the_world_launched(tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    path.write_text(json.dumps({"mesh": {"dp_shard": 3}}))
    with pytest.raises(ConfigError, match=r"asks for 3 processes, but the world has 2"):
        _plan("--cpu", "-n", "2", "--config", str(path), "t.py")


def test_two_processes_really_start(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(WORLD_SCRIPT)
    done = _hf_speed("launch", "--cpu", "-n", "2", str(script), str(out), "--flag")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        report = json.loads((tmp_path / f"out-{rank}").read_text())
        assert report["rank"] == rank
        assert report["world"] == 2
        assert report["device"] == "cpu"
        assert report["argv"] == [str(out), "--flag"]


def test_status_of_a_failing_script_is_not_zero(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(3)")
    assert _hf_speed("launch", "--cpu", "-n", "1", str(script)).returncode != 0


def _hf_speed(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_speed", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
