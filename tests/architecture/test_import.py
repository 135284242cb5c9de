"""Importing prints nothing, starts nothing, patches nothing, and loads no more than it must."""

import subprocess
import sys

from tests.architecture.sources import ROOT


def _run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:hf_speed", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_loads_no_framework() -> None:
    _run(
        "import sys, hf_speed\n"
        "assert not {'torch', 'transformers', 'accelerate', 'yaml'} & set(sys.modules)"
    )


def test_rooms_load_without_transformers() -> None:
    _run(
        "import sys, threading\n"
        "import hf_speed.config, hf_speed.mesh, hf_speed.shard, hf_speed.zero\n"
        "import hf_speed.checkpoint.export, hf_speed.engine, hf_speed.cli\n"
        "assert not {'transformers', 'accelerate', 'peft', 'trl', 'datasets'} & set(sys.modules)\n"
        "assert threading.active_count() == 1"
    )


def test_importing_the_integrations_patches_nothing() -> None:
    _run(
        "import accelerate, transformers, torch.distributed as dist\n"
        "classes = (accelerate.Accelerator, transformers.Trainer, transformers.TrainingArguments,\n"
        "           transformers.PreTrainedModel, transformers.HfArgumentParser)\n"
        "before = [dict(vars(kind)) for kind in classes]\n"
        "import hf_speed.integrations.accelerate, hf_speed.integrations.transformers\n"
        "assert [dict(vars(kind)) for kind in classes] == before\n"
        "assert not dist.is_initialized()"
    )
