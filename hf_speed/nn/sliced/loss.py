"""Cross entropy of logits whose words are divided over ranks. The logits are never gathered.

    each rank   its largest logit, the sum of exp(logit - largest), the target's logit if it has it
    together    log(sum over ranks) - target, from three numbers of each token and rank
    backward    softmax of this rank's words, minus 1 at the target: nothing is sent

Source: Megatron-LM, arXiv:1909.08053, section 3; the numbers of all ranks are gathered in one
exchange and added up in rank order, so every rank has the same bits.

Legend: N tokens, W words of this rank, T ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_speed.errors import EngineError
from hf_speed.mesh.collectives import all_gather_flat
from hf_speed.nn.sliced.exchange import Peers
from hf_speed.nn.sliced.layers import LogitsSwitch
from hf_speed.nn.sliced.plan import Loss

CHUNK_ELEMENTS = 1 << 22
"""Logits that are looked at together: 16 MiB of fp32 values at a time."""


class Words(NamedTuple):
    """This rank's words are [start, start + count) of `total`; `peers` have the others."""

    peers: Peers
    start: int
    count: int
    total: int


def sliced_cross_entropy(
    logits: Tensor, targets: Tensor, words: Words, *, ignore_index: int
) -> Tensor:
    """The sum over tokens of -log softmax(logits)[target].

    Args:
        logits: (N, W), of this rank's words; any float dtype, looked at in fp32.
        targets: (N,) words, alike on all ranks.
        words: which words this rank has.
        ignore_index: the target of tokens that do not count.

    Returns:
        0-d, fp32, the same bits on all ranks. One all-gather of 3 N numbers of each rank.

    Raises:
        RuntimeError: a target is no word (raised later where targets are on a GPU).
    """
    return _CrossEntropy.apply(logits, targets, words, ignore_index)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, words: Words, ignore: int) -> Tensor:
        ignored = targets == ignore
        is_word = (targets >= 0) & (targets < words.total)
        torch._assert_async((ignored | is_word).all(), "a label is not in the vocabulary")
        places = targets - words.start
        absent = (places < 0) | (places >= words.count) | ignored
        places = places.masked_fill(absent, 0)

        # Finite, also where all words of a rank are masked out with -inf.
        largest = logits.amax(-1).float().clamp_min(torch.finfo(torch.float32).min)
        sums = torch.empty_like(largest)
        for rows in _chunks(logits):
            torch.sum((logits[rows].float() - largest[rows, None]).exp_(), -1, out=sums[rows])
        target = logits.gather(-1, places[:, None])[:, 0].float().masked_fill_(absent, 0.0)

        largest, sums, target = _combine(largest, sums, target, words.peers)
        losses = (sums.log() - (target - largest)).masked_fill_(ignored, 0.0)
        ctx.save_for_backward(logits, largest, sums, places, absent, ignored)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits, largest, sums, places, absent, ignored = ctx.saved_tensors
        scale = grad.float().expand_as(sums).masked_fill(ignored, 0.0)
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = (logits[rows].float() - largest[rows, None]).exp_()
            part.mul_((scale[rows] / sums[rows])[:, None])
            part.scatter_add_(
                -1, places[rows, None], -scale[rows, None].masked_fill(absent[rows, None], 0.0)
            )
            result[rows] = part
        return result, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, logits.size(-1)))
    for start in range(0, logits.size(0), step):
        yield slice(start, start + step)


def _combine(
    largest: Tensor, sums: Tensor, target: Tensor, peers: Peers
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each of the whole vocabulary, from those of every rank's words."""
    if peers.tp.is_identity:
        return largest, sums, target
    numbers = largest.new_empty(peers.size, 3, largest.size(0))
    torch.stack([largest, sums, target], out=numbers[peers.rank])
    all_gather_flat(numbers.view(-1), group=peers.tp, journal=peers.journal).wait()
    whole = numbers[:, 0].amax(0)
    scaled = numbers[:, 1] * (numbers[:, 0] - whole).exp_()
    total, found = scaled[0].clone(), numbers[0, 2].clone()
    for rank in range(1, peers.size):
        total += scaled[rank]
        found += numbers[rank, 2]
    return whole, total, found


class SlicedLoss:
    """Stands in for a model's `loss_function`: takes the slices where the head leaves them.

    Args:
        kind: "causal" moves the labels by one token, as transformers' ForCausalLMLoss does;
            "masked" takes them as they are.
        words: which words this rank has.
        switch: whether the logits are slices.
        original: what the model had; called with whole logits.
    """

    def __init__(
        self, kind: Loss, words: Words, switch: LogitsSwitch, original: Callable[..., Tensor]
    ) -> None:
        self._kind = kind
        self._words = words
        self._switch = switch
        self._original = original

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The mean over the labels that count, or their sum over `num_items_in_batch`.

        Raises:
            EngineError: the logits are not what the head gave: the model's own words only.
        """
        if not self._switch.local:
            given = {} if shift_labels is None else {"shift_labels": shift_labels}
            return self._original(
                logits=logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                **given,
                **options,
            )
        if logits.size(-1) != self._words.count:
            raise EngineError(
                f"The loss got logits of {logits.size(-1)} words, but this rank's head gives "
                f"{self._words.count} of {self._words.total}: the model puts them together in its "
                f"own way. Make its plan with sliced_loss=False, which gathers them first."
            )
        if shift_labels is None:
            shift_labels = labels
            if self._kind == "causal":
                shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        flat = logits.reshape(-1, logits.size(-1))
        total = sliced_cross_entropy(flat, targets, self._words, ignore_index=ignore_index)
        if num_items_in_batch is None:
            return total / (targets != ignore_index).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


class SlicedLogits(Tensor):
    """Stands where a model returns its logits while only slices of them exist: raises when read."""

    @classmethod
    def of(cls, part: Tensor, total: int) -> "SlicedLogits":
        """In the shape of the whole; no memory."""
        shape = torch.Size((*part.shape[:-1], total))
        return cls._made(shape, dtype=part.dtype, device=part.device)

    @classmethod
    def _made(
        cls, shape: torch.Size, *, dtype: torch.dtype, device: torch.device
    ) -> "SlicedLogits":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, storage_size=0)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SlicedLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let casts and detaching through, which say nothing about values."""
        options = kwargs or {}
        first = args[0] if args else None
        aten = torch.ops.aten
        casts = (aten._to_copy.default, aten.detach.default, aten.alias.default)
        if isinstance(first, cls) and func in casts:
            dtype, device = options.get("dtype"), options.get("device")
            return cls._made(first.shape, dtype=dtype or first.dtype, device=device or first.device)
        raise EngineError(
            f"{func.overloadpacket.__name__} reads the logits of a training step, of which each "
            f"tensor-parallel rank has those of its words only: they are not gathered where the "
            f"model computes the loss itself. Call the model without labels, or in eval mode, to "
            f"get whole logits."
        )
