"""What slicing ranks send in a training step is what Megatron's count says, and nothing else.

Source: Megatron-LM, arXiv:1909.08053, section 3: two all-reduces a block in the forward and two in
the backward; beside them one each for the embedding and the head, and the loss's three numbers of
each token and rank.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from hf_speed.engine import Engine
from hf_speed.mesh import AxisGroup
from tests.engine.meshes import BOTH, NUM_LAYERS, SLICES, Mesh, attach, own_rows, toy
from tests.engine.toys import NUM_COLUMNS, NUM_ROWS, global_batch
from tests.support import run_ranks

NUM_TOKENS = NUM_ROWS * NUM_COLUMNS
HIDDEN = 16
FP32 = 4


class Traffic(NamedTuple):
    """What one rank did over `tp` in a step.

    Attributes:
        notes: (operation, bytes of the buffer) -> how often.
        sent: bytes.
    """

    notes: Counter[tuple[str, int]]
    sent: int


def _watch(engine: Engine) -> tuple[Counter[tuple[str, int]], list[int]]:
    """Collect the notes on the slicing ranks' group from now on."""
    notes: Counter[tuple[str, int]] = Counter()
    bytes_sent: list[int] = []
    journal = engine.mesh.journal
    note = journal.note

    def watching(
        operation: str, group: AxisGroup, *, num_bytes: int, sent: int
    ) -> Callable[[], None]:
        if group.label == "tp/control":
            notes[operation, num_bytes] += 1
            bytes_sent.append(sent)
        return note(operation, group, num_bytes=num_bytes, sent=sent)

    journal.note = watching  # pyrefly: ignore
    return notes, bytes_sent


def _step(
    mesh: Mesh,
    stage: int,
    schedule: str = "1f1b",
    dtype: torch.dtype | None = None,
    **sections: Mapping[str, Any],
) -> Traffic:
    model = toy()
    engine = attach(model, mesh, stage, dtype=dtype, pipe={"schedule": schedule}, **sections)
    optimizer = torch.optim.AdamW(model.parameters())
    engine.bind_optimizer(optimizer)
    notes, sent = _watch(engine)
    engine.backward(model(**own_rows(engine, global_batch("llama", 0))).loss)
    engine.clip_grad_norm_(1.0)
    optimizer.step()
    found = Traffic(Counter(notes), sum(sent))
    engine.detach()
    return found


def _expected(*, num_layers: int, pieces: int, itemsize: int, ends: int, has_loss: bool) -> Traffic:
    """Of a rank with some of the layers and some of the ends: the embedding, the head."""
    tokens = NUM_TOKENS // pieces
    hidden = tokens * HIDDEN * itemsize
    sums = pieces * (ends + 2 * num_layers + 2 * num_layers)
    notes = Counter({("reduce_scatter", hidden): sums, ("all_gather", hidden): sums})
    # Of two ranks each sends half of a buffer, once for each half of a sum.
    sent = sums * hidden
    if has_loss:
        numbers = 2 * 3 * tokens * FP32
        notes["all_gather", numbers] += pieces
        sent += pieces * numbers // 2
    return Traffic(notes, sent)


def _alone() -> list[Traffic]:
    rows = {"tensor": {"sequence_parallel": True}}
    return [
        _step(SLICES, 1),
        _step(SLICES, 3),
        _step(SLICES, 1, dtype=torch.bfloat16),
        _step(SLICES, 1, **rows),
    ]


def test_slices_alone_send_what_megatron_counts() -> None:
    whole = {"num_layers": NUM_LAYERS, "pieces": 1, "ends": 2, "has_loss": True}
    in_fp32, in_bf16 = _expected(itemsize=4, **whole), _expected(itemsize=2, **whole)
    # Rows divided between regions: the same halves of sums, elsewhere (arXiv:2205.05198); and two
    # gathers, where hidden states come together for the head and their gradients for the embedding.
    hidden = NUM_TOKENS * HIDDEN * FP32
    gathers = Counter({("all_gather", hidden): 2})
    by_rows = Traffic(in_fp32.notes + gathers, in_fp32.sent + hidden)
    for traffic in run_ranks(_alone, 2):
        assert traffic == [in_fp32, in_fp32, in_bf16, by_rows]


def _within_stages() -> list[Traffic]:
    return [_step(BOTH, 1, "1f1b"), _step(BOTH, 3, "zb_h1"), _step(BOTH, 1, "gpipe")]


def test_slices_of_a_stage_send_what_megatron_counts_for_its_layers() -> None:
    half = {"num_layers": NUM_LAYERS // 2, "pieces": 2, "itemsize": 4, "ends": 1}
    for rank, traffic in enumerate(run_ranks(_within_stages, 4)):
        expected = _expected(has_loss=rank >= 2, **half)
        assert traffic == [expected] * 3
