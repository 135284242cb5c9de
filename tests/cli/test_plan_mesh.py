"""`hf-speed plan` of a mesh prints what the planner says, rank by rank."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, LlamaConfig, T5Config

from hf_speed.cli import main
from hf_speed.cli.plan_mesh import merged

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    architectures=["LlamaForCausalLM"],
)
MEMORY = ["--memory", "1GiB", "--host", "1GiB"]


def _plan(
    tmp_path: Path, tree: dict[str, Any], *words: str, config: Any = LLAMA, num_ranks: int = 8
) -> int:
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "speed.yaml").write_text(yaml.safe_dump(tree))
    where = [str(tmp_path / "model"), "--config", str(tmp_path / "speed.yaml")]
    return main(["plan", *where, "-n", str(num_ranks), *MEMORY, *words])


def _rows(out: str, title: str) -> dict[str, list[str]]:
    """The lines under a table's title: ranks -> cells."""
    lines = iter(out.splitlines())
    next(line for line in lines if line.startswith(title))
    rows = {}
    for line in lines:
        label, place, *cells = [*line.split(), "", ""]
        if label != "pp":
            return rows
        rows[place] = cells[:-2]
    return rows


def test_each_pipeline_rank_has_a_line_and_ranks_that_are_alike_share_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"mesh": {"pp": 4}, "pipe": {"schedule": "1f1b", "balance": [1, 2, 2, 1]}}
    assert _plan(tmp_path, tree, "--batch", "16", "--sequence", "16384") == 0
    out = capsys.readouterr().out
    assert "A step of 16 rows of 16384 tokens on each of 2 data-parallel ranks\n" in out
    assert "1f1b with 16 microbatches on 4 pipeline ranks: they wait 15.8% of the time" in out
    memory = _rows(out, "GiB per rank        layers")
    assert {place: cells[0] for place, cells in memory.items()} == {
        "0": "1",
        "1": "2",
        "2": "2",
        "3": "1",
    }
    # Ranks 1 and 2 differ in activations alone: what 1f1b holds.
    assert memory["1"][:-1] == memory["2"][:-1]
    assert "1-2" in _rows(out, "GiB sent")
    assert "whole sums of its gradients are in flight at every stage" in out
    assert "pipe.balance                [1, 2, 2, 1]" in out


def test_a_v_has_two_stages_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"mesh": {"pp": 2, "tp": 2}, "pipe": {"schedule": "zb_v"}}
    assert _plan(tmp_path, tree) == 0
    out = capsys.readouterr().out
    layers = [cells[0] for cells in _rows(out, "GiB per rank        layers").values()]
    assert sum(int(count) for each in layers for count in each.split("+")) == 6
    assert all(len(each.split("+")) == 2 for each in layers)
    assert "A step of 8 rows of 2048 tokens on each of 2 data-parallel ranks" in out
    assert "mesh.tp" in out


def _numbers(out: str, title: str, place: str = "0") -> list[float]:
    return [float(cell) for cell in _rows(out, title)[place][-3:]]


def test_batch_and_recomputing_change_what_a_step_keeps_and_sends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"mesh": {"tp": 2}, "zero": {"stage": 1}}
    found = []
    for words in (("--batch", "512"), ("--batch", "1024"), ("--batch", "512", "--recompute")):
        assert _plan(tmp_path, tree, *words) == 0
        out = capsys.readouterr().out
        kept = _numbers(out, "GiB per rank        layers")[-1]
        found.append((kept, _numbers(out, "GiB sent")[1]))
    (kept, sent), (kept_2, sent_2), (kept_less, sent_more) = found
    assert kept_2 == pytest.approx(2 * kept, abs=0.002)
    assert sent_2 == pytest.approx(2 * sent, abs=0.002)
    assert kept_less < kept / 4
    assert sent < sent_more < 1.5 * sent
    assert "blocks recomputed" in out


def test_without_a_mesh_a_step_is_shown_where_a_batch_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _plan(tmp_path, {}) == 0
    assert "A step of" not in capsys.readouterr().out
    assert _plan(tmp_path, {}, "--batch", "3") == 0
    assert "A step of 3 rows of 2048 tokens on each of 8 data" in capsys.readouterr().out


def test_a_tied_model_is_planned_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPT2Config(
        n_embd=64, n_layer=4, n_head=4, vocab_size=128, architectures=["GPT2LMHeadModel"]
    )
    assert _plan(tmp_path, {"mesh": {"pp": 2, "tp": 2}}, config=config) == 0
    rows = _rows(capsys.readouterr().out, "GiB per rank        layers")
    # Both ends have the embedding; the first has positions besides.
    assert [cells[0] for cells in rows.values()] == ["2", "2"]


def test_larger_models_fit_on_more_pipeline_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    largest = []
    for pp in (1, 2):
        assert _plan(tmp_path, {"mesh": {"pp": pp}}) == 0
        row = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("device")
        )
        largest.append(float(row.split()[3]))
    # Sums over micro-steps are counted in both; a pipeline keeps those of a run beside older ones.
    assert 1.6 * largest[0] < largest[1] < 2 * largest[0]


T5 = T5Config(
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    vocab_size=64,
    architectures=["T5ForConditionalGeneration"],
)


@pytest.mark.parametrize(
    ("tree", "words", "config", "message"),
    [
        ({"mesh": {"pp": 3}}, (), LLAMA, "mesh.pp=3 x mesh.dp_replicate=1 does not divide"),
        ({"mesh": {"pp": 8}}, (), LLAMA, "has 8 stages, but the model has 6 layers"),
        ({"mesh": {"tp": 8}}, (), LLAMA, "mesh.tp=8 does not fit LlamaForCausalLM"),
        ({"mesh": {"pp": 2}}, (), T5, "mesh.pp > 1 cannot cut T5ForConditionalGeneration"),
        (
            {"mesh": {"pp": 2}, "pipe": {"microbatches": 8}},
            ("--batch", "4"),
            LLAMA,
            "pipe.microbatches=8 needs a batch of at least 8 rows",
        ),
        (
            {"mesh": {"pp": 2}, "zero": {"stage": 3}, "pipe": {"gather": "microbatch"}},
            (),
            LLAMA,
            "lets go of parameters after each backward, but pipe.schedule='zb_h1'",
        ),
        ({}, ("--batch", "0"), LLAMA, "--batch 0 leaves nothing to compute"),
        ({"mesh": {"pp": 2}}, ("--sequence", "-1"), LLAMA, "--sequence -1 leaves nothing"),
    ],
)
def test_mistake_ends_with_its_message(
    tree: dict[str, Any],
    words: tuple[str, ...],
    config: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _plan(tmp_path, tree, *words, config=config) == 2
    assert message in capsys.readouterr().err


def test_no_ranks_have_no_lines() -> None:
    assert list(merged([], lambda _: ())) == []
