"""What one step computes on a rank, and the activations that wait for the backward meanwhile.

Activations are an estimate from a formula, not a count: no model is run. A token of one layer
keeps, with h features in e bytes each and layers divided over t ranks (Korthikanti et al.,
arXiv:2205.05198, section 4, for a GPT block with dropout; bytes):

    what                                       whole        divided over t
    inputs of attention and of the MLP         2 e h
    inputs of the norms, dropout masks         (2 e + 2) h  with tensor.sequence_parallel
    queries, keys, values, their product       4 e h        always
    the MLP's inner features, before and after 8 e h        always

In 16 bit that is 34 h, or (10 + 24 / t) h where t ranks divide the layers. The 5 a s h more of the
paper, of a heads on s tokens, are those of attention weights, which flash and sdpa kernels do not
keep. With sequence parallelism the paper has 34 h / t; here the inputs of attention and MLP stay
whole for the weight gradients, which saves an all-gather: (4 + 30 / t) h. Recomputed blocks keep
their input: e h, over t with sequence parallelism. The last stage keeps for the head its input, its
logits' input and the logits in fp32: (2 e h + 4 v / t) for v words.

What I leaves for W, in schedules that split the backward, counts as all that F kept.

Blocks that are not fused keep more. Counted with autograd's saved tensors (transformers 5.23, sdpa
on a CPU, bf16, t = 1): 46 h to 49 h for a Llama block, 114 h for one of GPT-2 with its dropouts.
"""

from math import ceil
from typing import NamedTuple

from hf_speed.config import ResolvedPipe
from hf_speed.pipe.batch import choose_count
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.schedules import make_plan
from hf_speed.pipe.simulate import Costs, simulate


class Workload(NamedTuple):
    """One step of one data-parallel rank.

    Attributes:
        num_rows: of its batch.
        num_tokens: of a row.
        hidden: features of a token between layers.
        vocabulary: words.
        itemsize: bytes of a hidden state's feature.
        recomputes: blocks are run again in the backward (gradient checkpointing).
    """

    num_rows: int
    num_tokens: int
    hidden: int
    vocabulary: int
    itemsize: int
    recomputes: bool = False

    def rows_of(self, num_microbatches: int) -> int:
        """Rows of the largest microbatch."""
        return ceil(self.num_rows / num_microbatches)

    @property
    def state_bytes(self) -> int:
        """Hidden states of the whole batch, at one place between two layers."""
        return self.num_rows * self.num_tokens * self.hidden * self.itemsize


def plan_of(pipe: ResolvedPipe, workload: Workload, *, num_ranks: int) -> Plan | None:
    """The plan that a batch runs, compute actions only; None for one pipeline rank.

    Raises:
        ConfigError: it has fewer rows than pipe.microbatches.
    """
    if num_ranks == 1:
        return None
    count = choose_count(pipe.microbatches, rows=workload.num_rows, num_ranks=num_ranks)
    return make_plan(pipe.schedule, num_ranks=num_ranks, num_microbatches=count, chunks=pipe.chunks)


def layer_bytes(workload: Workload, *, num_slices: int, sequence_parallel: bool) -> float:
    """Activations of one token in one layer, by the formula above."""
    hidden, itemsize = workload.hidden, workload.itemsize
    divides_rows = num_slices if sequence_parallel else 1
    if workload.recomputes:
        return itemsize * hidden / divides_rows
    between = (2 * itemsize + 2) / divides_rows
    return hidden * (2 * itemsize + between + 12 * itemsize / num_slices)


def head_bytes(workload: Workload, *, num_slices: int) -> float:
    """Activations of one token in the head and the loss."""
    return 2 * workload.itemsize * workload.hidden + 4 * workload.vocabulary / num_slices


def activation_bytes(
    workload: Workload,
    plan: Plan | None,
    *,
    num_layers: tuple[int, ...],
    num_slices: int,
    sequence_parallel: bool,
) -> tuple[int, ...]:
    """The most that each pipeline rank keeps for the backward, by the schedule.

    Args:
        workload: of a step.
        plan: the schedule; None where there is no pipeline: the whole batch at once.
        num_layers: of each stage.
        num_slices: ranks that divide each layer.
        sequence_parallel: they divide the sequence too.
    """
    of_layer = layer_bytes(workload, num_slices=num_slices, sequence_parallel=sequence_parallel)
    of_stage = [count * of_layer for count in num_layers]
    of_stage[-1] += head_bytes(workload, num_slices=num_slices)
    if plan is None:
        return (int(of_stage[0] * workload.num_rows * workload.num_tokens),)
    tokens = workload.rows_of(plan.num_microbatches) * workload.num_tokens
    costs = Costs(activation=tuple(tokens * each for each in of_stage))
    return tuple(int(peak) for peak in simulate(plan, costs).peak_activations)
