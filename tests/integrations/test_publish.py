"""Publishing: what the Hub gets is what was trained, with a card that says how."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

import hf_speed
from hf_speed.checkpoint import read_manifest
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.integrations.hub.card import CardFacts, facts_of_checkpoint, make_card, write_card
from hf_speed.integrations.hub.notes import notes_of
from tests.integrations.hub_server import HubServer
from tests.integrations.toys import llama, stage, trainer
from tests.support import run_ranks

NAME = "my-org/my-model"


def _train(directory: str) -> dict[str, Any]:
    """Two ranks, stage 3, 16-bit weights with fp32 masters; exported while it is in memory."""
    home = Path(directory)
    half = llama(tie_word_embeddings=True).bfloat16()
    made = trainer(
        home / "run",
        stage(3),
        model=half,
        bf16=True,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    made.train()
    exported = hf_speed.export(made.model, home / "live", dtype="float32", max_shard_size="60KB")
    masters = {
        name: hf_speed.get_full_parameter(made.model, name).clone()
        for name in ("model.norm.weight", "model.embed_tokens.weight")
    }
    with pytest.raises(CheckpointError, match=r"is not empty; export to a new directory"):
        hf_speed.export(made.model, home / "live")
    _save_experts(home)
    return {"files": exported.files, "masters": masters}


def _save_experts(home: Path) -> None:
    """Mixtral: experts are one tensor in memory, one by one on the Hub. A state, and live."""
    accelerator = hf_speed.Accelerator(mixed_precision="bf16", hf_speed=stage(3))
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, **heads, num_local_experts=2)
    model = MixtralForCausalLM(config).bfloat16()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    ids = torch.arange(3, 15)[None]
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    accelerator.save_state(str(home / "experts"))
    hf_speed.export(model, home / "experts-live", torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two ranks: run/checkpoint-4 and live."""
    home = tmp_path_factory.mktemp("trained")
    results = run_ranks(_train, 2, str(home))
    assert results[0]["files"] == results[1]["files"]
    words = Tokenizer(WordLevel({"a": 3, "b": 4, "[UNK]": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.save_pretrained(home / "run" / "checkpoint-4")
    return home, results[0]


def test_a_model_in_training_is_exported_by_all_ranks_with_its_masters(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    home, result = trained
    assert "model.safetensors.index.json" in result["files"]
    model = AutoModelForCausalLM.from_pretrained(home / "live")
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    for name, master in result["masters"].items():
        assert torch.equal(parameters[name], master)
        assert not torch.equal(master, master.bfloat16().float())


def test_an_export_in_float32_is_the_masters_of_the_checkpoint(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, result = trained
    source = home / "run" / "checkpoint-4"
    hf_speed.export(source, tmp_path / "wide", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    parameters = dict(model.named_parameters())
    for name, master in result["masters"].items():
        assert torch.equal(parameters[name], master)
    assert (tmp_path / "wide" / "generation_config.json").is_file()


def test_masters_of_fused_experts_are_exported_under_the_names_of_the_hub(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, _ = trained
    hf_speed.export(home / "experts", tmp_path / "wide", "float32", max_shard_size="20KB")
    wide, live = (
        MixtralForCausalLM.from_pretrained(each)
        for each in (tmp_path / "wide", home / "experts-live")
    )
    for (name, mine), other in zip(wide.named_parameters(), live.parameters(), strict=True):
        assert torch.equal(mine, other), name
        assert not torch.equal(mine, mine.bfloat16().float()), name
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())
    assert any("experts.1." in name for name in index["weight_map"])


def test_the_card_says_how_it_was_trained(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, _ = trained
    source = home / "run" / "checkpoint-4"
    hf_speed.export(f"file://{source}", tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["hf_speed", "generated_from_trainer"]
    state = json.loads((source / "trainer_state.json").read_text())
    last = [line for line in state["log_history"] if "loss" in line][-1]
    evaluated = [line for line in state["log_history"] if "eval_loss" in line][-1]
    row = f"| 4 | {last['epoch']:.4g} | {last['loss']:.4g} | {evaluated['eval_loss']:.4g} |"
    for text in (
        "# model",
        "A LlamaForCausalLM, trained with",
        "- data set: rows 24",
        "- optimizer steps: 4",
        "- sequences a step: 8",
        "- computes in: bfloat16",
        "- optimizer: AdamW",
        "weight_decay 0.0",
        "- ZeRO stage: 3",
        "dp_shard 2",
        "(2 processes)",
        row,
        f"- torch: {torch.__version__}",
        '"zero": {',
    ):
        assert text in card.text, text
    assert str(home) not in str(card)


def test_markup_and_places_do_not_get_into_the_card() -> None:
    meta = {
        "stage": "3 <script>alert(1)</script>",
        "config": {"offload": {"paths": ["/fast/disk"]}, "checkpoint": {"mirror": "s3://secret"}},
        "notes": {"dataset": {"name": "[x](http://bad)\n# Title", "hub_id": "org/data"}},
    }
    history = [{"step": step, "loss": 1 / step, "epoch": 0.1} for step in range(1, 100)]
    text = make_card(CardFacts("m`x", meta, 2, {"log_history": history}, {"architectures": [1]}))
    for bad in ("<script>", "[x](http://bad", "\n# Title", "/fast/disk", "s3://secret"):
        assert bad not in text
    assert "datasets:\n- org/data" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 12
    assert rows[2].startswith("| 1 |")
    assert rows[-1].startswith("| 99 |")


def test_a_card_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "trainer_state.json").write_text("not JSON")
    assert not write_card(tmp_path, facts_of_checkpoint(tmp_path, "x"))
    assert (tmp_path / "README.md").read_text() == "mine"


class _Data:
    """As datasets.Dataset describes itself."""

    split = "train"

    def __len__(self) -> int:
        return 3

    info = SimpleNamespace(
        dataset_name="wikitext",
        config_name="default",
        download_checksums={"hf://datasets/org/wikitext@123/a.parquet": {}},
    )


def test_notes_name_the_data_and_the_start_but_no_directory(tmp_path: Path) -> None:
    made = trainer(tmp_path, stage(1))
    made.train_dataset = _Data()
    made.model.config.name_or_path = "my-org/base"
    notes = notes_of(made)
    assert notes["dataset"] == {
        "name": "wikitext",
        "split": "train",
        "hub_id": "org/wikitext",
        "rows": 3,
    }
    assert notes["base_model"] == "my-org/base"
    made.model.config.name_or_path = str(tmp_path)
    assert "base_model" not in notes_of(made)
    assert str(tmp_path) not in json.dumps(notes_of(made))


def test_what_is_pushed_loads_by_its_name(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, scratch = str(trained[0] / "run" / "checkpoint-4"), tmp_path / "scratch"
    scratch.mkdir()
    with HubServer() as server:
        done = subprocess.run(
            [sys.executable, "-m", "tests.integrations.hub_session", source, str(scratch)],
            env={**os.environ, **server.environment(tmp_path / "cache"), "TMPDIR": str(scratch)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        saw = json.loads(done.stdout.splitlines()[-1])
    kept, pushed = saw.pop("run"), server.repositories["my-org/run"].branches["main"].files
    assert {"latest", "checkpoint-1", "model.safetensors"} <= set(kept)
    assert {"model.safetensors", "config.json"} <= set(pushed)
    assert not [name for name in pushed if "latest" in name or "checkpoint" in name]
    message, repository = saw.pop("refused"), server.repositories[NAME]
    assert message.startswith(f"The Hub did not take {NAME}: ")
    assert "Log in with `hf auth login` or set HF_TOKEN" in message
    commits = [each for each in server.requests if "/commit/" in each and "/run/" not in each]
    assert server.requests[0] == "POST /api/repos/create"
    assert len(commits) == 4, "the refused one is not among them, and each push is one"
    directory, url, files = saw.pop("first")
    assert directory is None
    assert url.startswith(f"{server.endpoint}/{NAME}/commit/")
    assert "model.safetensors.index.json" in files
    assert saw == {
        "first is the model": True,
        "tokenizer": [4, 3],
        "status": 0,
        "second is the model": True,
        "trial": "torch.bfloat16",
        "live is the model": True,
        "left behind": [],
    }
    assert repository.private
    main, trial = repository.branches["main"], repository.branches["trial"]
    weights = [name for name in main.files if name.startswith("model")]
    assert weights == ["model.safetensors"]
    assert main.title == "Upload model trained with hf_speed"
    assert "README.md" in trial.files
    assert not {"trainer_state.json", "training_args.bin", "optimizer.pt"} & main.files.keys()
    assert not any(name.startswith("hf_speed") for name in main.files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "x"}, "revision, private and commit_message are of a commit on the Hub"),
        ({"private": False}, "revision, private and commit_message are of a commit on the Hub"),
        ({"push_to_hub": True}, r"dst='.*/out' must be a repository on the Hub, as in 'my-org/"),
    ],
)
def test_arguments_without_effect_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_speed.export(tmp_path, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match=r"dst='s3://bucket/x' is an address. Export to a dir"):
        hf_speed.export(tmp_path, "s3://bucket/x")


def test_without_the_hub_it_says_so(trained: tuple[Path, dict[str, Any]]) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(CheckpointError, match=f"The Hub did not take {NAME}: .*ffline"):
        hf_speed.export(trained[0] / "run" / "checkpoint-4", NAME, push_to_hub=True)


# transformers calls a name deprecated that peft still reads.
@pytest.mark.filterwarnings("ignore::FutureWarning")
# peft 0.19 looks on the Hub for the config of a model that has no name.
@pytest.mark.filterwarnings("ignore:Could not find a config file in :UserWarning")
def test_adapters_in_memory_are_exported_as_they_are(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="carries PEFT adapters, which are exported as they are"):
        hf_speed.export(model, tmp_path / "cast", dtype="bfloat16")
    exported = hf_speed.export(model, tmp_path / "adapter")
    assert "adapter_model.safetensors" in exported.files
    assert not (tmp_path / "cast").exists()


def test_a_checkpoint_that_is_damaged_is_not_published(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint-4"
    shutil.copytree(trained[0] / "run" / "checkpoint-4", source)
    assert read_manifest(source).meta["notes"]["arguments"]["seed"] == 42
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: .*another checksum"):
        hf_speed.export(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
