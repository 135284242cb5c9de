"""Exchanges and their backwards against sums and concatenations written out, to the bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.journal import Journal
from hf_speed.nn.deferred import Queue, WeightWork, deferred_linear
from hf_speed.nn.sliced import functions
from hf_speed.nn.sliced.exchange import Peers
from tests.nn.sliced.worlds import world
from tests.support import run_ranks

NO_WEIGHTS = functions.Meanwhile(Queue(), ())
SHAPES = ((8,), (3, 5), (2, 3, 4), (1, 1))
"""Those that divide by the ranks, those that need padding, and one smaller than the ranks."""
DTYPES = (torch.float32, torch.bfloat16)


def _value(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _sum(values: list[Tensor]) -> Tensor:
    """In rank order, in fp32, rounded once."""
    total = values[0].float()
    for value in values[1:]:
        total = total + value.float()
    return total.to(values[0].dtype)


def _passes(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Output and gradient of the input."""
    leaf = x.clone().requires_grad_()
    y = function(leaf * 1.0)
    y.backward(grad)
    return y.detach(), leaf.grad


def _sums() -> None:
    place = world()
    peers = Peers(place.tp, place.journal)
    size, rank = peers.size, peers.rank
    for dtype in DTYPES:
        for shape in SHAPES:
            xs = [_value(each, shape, dtype) for each in range(size)]
            grads = [_value(10 + each, shape, dtype) for each in range(size)]
            grad = _value(99, shape, dtype)

            y, dx = _passes(
                lambda x: functions.enter(x, peers=peers, meanwhile=NO_WEIGHTS),
                xs[0],
                grads[rank],
            )
            assert torch.equal(y, xs[0])
            assert dx is not None
            assert torch.equal(dx, _sum(grads))

            y, dx = _passes(lambda x: functions.leave(x, peers=peers), xs[rank], grad)
            assert torch.equal(y, _sum(xs))
            assert dx is not None
            assert torch.equal(dx, grad)
    # What leaves may be changed in place, as models do, and gradients may be laid out in any way.
    leaf = _value(rank, (4, 6)).requires_grad_()
    y = functions.leave(leaf * 1.0, peers=peers)
    y += 1.0
    y.t().backward(torch.ones(6, 4))
    assert torch.equal(leaf.grad, torch.ones(4, 6))
    scattered = _value(rank, (6, 4)).t()
    total = functions.leave(scattered, peers=peers)
    assert torch.equal(total, _sum([_value(each, (6, 4)).t() for each in range(size)]))


def _rows() -> None:
    place = world()
    peers = Peers(place.tp, place.journal)
    size, rank = peers.size, peers.rank
    for num_rows in (2 * size, 2 * size + 1, 1):
        part = -(-num_rows // size)
        mine = slice(rank * part, min((rank + 1) * part, num_rows))
        count = max(0, mine.stop - mine.start)

        def padded(whole: Tensor, mine: slice = mine, part: int = part) -> Tensor:
            rows = whole[mine]
            return torch.cat([rows, rows.new_zeros(part - rows.size(0), rows.size(1))])

        whole, grad = _value(1, (num_rows, 3)), _value(2, (num_rows, 3))
        xs = [_value(20 + each, (num_rows, 3)) for each in range(size)]
        part_grad = _value(30 + rank, (part, 3))
        part_grads = torch.cat([_value(30 + each, (part, 3)) for each in range(size)])[:num_rows]

        y, dx = _passes(lambda x: functions.split_rows(x, peers=peers), whole, part_grad)
        assert torch.equal(y, padded(whole))
        assert torch.equal(dx, part_grads)

        y, dx = _passes(
            lambda x, n=num_rows: functions.join_rows(x, n, peers=peers), padded(whole), grad
        )
        assert torch.equal(y, whole)
        assert torch.equal(dx[:count], grad[mine])

        y, dx = _passes(
            lambda x, n=num_rows: functions.enter_rows(x, n, peers=peers, meanwhile=NO_WEIGHTS),
            padded(whole),
            xs[rank],
        )
        assert torch.equal(y, whole)
        assert torch.equal(dx, padded(_sum(xs)))

        y, dx = _passes(lambda x: functions.leave_rows(x, peers=peers), xs[rank], part_grad)
        assert torch.equal(y, padded(_sum(xs)))
        assert torch.equal(dx, part_grads)


def _pieces() -> None:
    place = world()
    peers = Peers(place.tp, place.journal)
    rank = peers.rank
    lengths = [3, 1, 2, 2][: peers.size]
    for dim, shape in ((-1, (2, sum(lengths))), (0, (sum(lengths), 2)), (1, (2, sum(lengths), 3))):
        place_of_mine = {"dim": dim, "start": sum(lengths[:rank]), "length": lengths[rank]}
        whole, grad = _value(1, shape), _value(2, shape)
        part = whole.narrow(**place_of_mine)
        options = {"dim": dim, "lengths": lengths, "peers": peers}

        y, dx = _passes(lambda x, o=options: functions.join_along(x, **o), part, grad)
        assert torch.equal(y, whole)
        assert torch.equal(dx, grad.narrow(**place_of_mine))

        y, dx = _passes(
            lambda x, o=options: functions.split_along(x, **o), whole, grad.narrow(**place_of_mine)
        )
        assert torch.equal(y, part)
        assert torch.equal(dx, grad)


def _all() -> None:
    _sums()
    _rows()
    _pieces()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_exchanges_and_their_backwards_are_exact_on_every_rank(num_ranks: int) -> None:
    run_ranks(_all, num_ranks)


def test_over_one_rank_exchanges_change_and_send_nothing() -> None:
    peers = Peers(IDENTITY, Journal(enabled=True))
    x, grad = _value(0, (3, 4)), _value(1, (3, 4))
    options = {"dim": 1, "lengths": (4,), "peers": peers}
    for function in (
        lambda x: functions.enter(x, peers=peers, meanwhile=NO_WEIGHTS),
        lambda x: functions.leave(x, peers=peers),
        lambda x: functions.split_rows(x, peers=peers),
        lambda x: functions.join_rows(x, 3, peers=peers),
        lambda x: functions.enter_rows(x, 3, peers=peers, meanwhile=NO_WEIGHTS),
        lambda x: functions.leave_rows(x, peers=peers),
        lambda x: functions.join_along(x, **options),
        lambda x: functions.split_along(x, **options),
    ):
        y, dx = _passes(function, x, grad)
        assert torch.equal(y, x)
        assert torch.equal(dx, grad)
    assert peers.journal.total_bytes_sent == 0


def test_weight_gradients_are_computed_between_start_and_end_of_the_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Watched:
        def __init__(self, value: Tensor) -> None:
            self._value = value

        def wait(self) -> Tensor:
            events.append("wait")
            return self._value

    def start(x: Tensor, *, peers: Peers) -> Watched:  # noqa: ARG001
        events.append("start")
        return Watched(x)

    compute = WeightWork.weight_gradient
    monkeypatch.setattr(functions, "start_sum", start)
    monkeypatch.setattr(functions, "start_sum_rows", start)
    monkeypatch.setattr(
        WeightWork, "weight_gradient", lambda work: (events.append("weight"), compute(work))[1]
    )
    peers = Peers(IDENTITY, Journal(enabled=False))
    first, second = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
    first.weight.register_post_accumulate_grad_hook(lambda _: events.append("hook"))
    leaves = (first.weight, first.bias, second.weight)
    for enters in (
        lambda x, m: functions.enter(x, peers=peers, meanwhile=m),
        lambda x, m: functions.enter_rows(x, 2, peers=peers, meanwhile=m),
    ):
        events.clear()
        queue = Queue()
        x = _value(0, (2, 3)).requires_grad_()
        inside = enters(x * 1.0, functions.Meanwhile(queue, leaves))
        y = deferred_linear(inside, first.weight, first.bias, queue)
        (y * deferred_linear(inside, second.weight, None, queue)).sum().backward()
        assert events == ["start", "weight", "weight", "wait", "hook"]
        assert len(queue) == 0
        found = [x.grad, *(leaf.grad for leaf in leaves)]
        x.grad = first.weight.grad = first.bias.grad = second.weight.grad = None
        (first(x) * second(x)).sum().backward()
        for mine, theirs in zip(found, [x.grad, *(leaf.grad for leaf in leaves)], strict=True):
            assert torch.equal(mine, theirs)
        first.zero_grad()
        second.zero_grad()
