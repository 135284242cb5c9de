"""The CPU backend: csrc/update.cpp called with the addresses of tensors.

    request(rule, master, grad, moments, table) -> Request -> run(Request)

Nothing is checked here but what would make the native code read wild memory through the spans:
`hf_speed.ops.update` checks the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_speed.ops.native import library
from hf_speed.ops.reference import Moment
from hf_speed.ops.spans import ROW, SpanTable

ISAS = {"best": 0, "scalar": 1, "avx2": 2, "avx512": 3}
"""Instruction sets that a run can be held to; best: the widest that this machine has."""

_RULES = {"adam": 0, "lion": 1, "adagrad": 2, "sgd": 3, "sgd_plain": 4}
_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
_FAULTS = {
    -1: "an argument that the kernel does not know",
    -2: "spans that do not cover the chunk in order",
    -3: "an instruction set that this machine does not have",
    -4: "no memory for partial sums",
}


class Request(ctypes.Structure):
    """HfsUpdate of csrc/update.h. Holds addresses, not tensors: those must outlive the run."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rule", "grad_type", "moment_type", "out_type")),
        ("numel", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "master", "grad", "first", "second", "first_scale", "second_scale", "out",
                "stops", "rows",
            )
        ),
        *((name, ctypes.c_int32) for name in ("num_spans", "num_threads", "isa", "reserved")),
    )  # fmt: skip


def _declare(native: ctypes.CDLL) -> ctypes.CDLL:
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    native.hfs_update.argtypes = (ctypes.POINTER(Request),)
    native.hfs_update_norms.argtypes = (ctypes.POINTER(Request), pointer)
    native.hfs_square_sum.argtypes = (pointer, i32, i64, i32, i32, pointer)
    for function in (native.hfs_update, native.hfs_update_norms, native.hfs_square_sum):
        function.restype = i32
    native.hfs_best_isa.restype = i32
    return native


_native = _declare(library)


def best_isa() -> str:
    """The widest instruction set that this machine has."""
    widest = int(_native.hfs_best_isa())
    return next(name for name, number in ISAS.items() if number == widest)


def request(
    rule: str,
    master: Tensor,
    grad: Tensor,
    moments: Sequence[Moment],
    table: SpanTable,
    *,
    out: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> Request:
    """Gather the addresses of an update; the arguments are `reference.update_`'s.

    Raises:
        ValueError: the span table has another form.
    """
    stops, rows = table
    flat = stops.is_contiguous() and rows.is_contiguous() and not stops.is_cuda
    shaped = stops.dim() == 1 and rows.shape == (len(stops), ROW) and not rows.is_cuda
    if not (flat and shaped and (stops.dtype, rows.dtype) == (torch.int64, torch.float32)):
        raise ValueError(
            f"spans must be contiguous (num_spans,) int64 stops and (num_spans, {ROW}) float32 "
            f"rows on the CPU; they are {tuple(stops.shape)} {stops.dtype} on {stops.device} and "
            f"{tuple(rows.shape)} {rows.dtype} on {rows.device}."
        )
    addresses = [(moment.values.data_ptr(), _address(moment.scales)) for moment in moments]
    first, second = [*addresses, (None, None), (None, None)][:2]
    return Request(
        rule=_RULES[rule],
        grad_type=_TYPES[grad.dtype],
        moment_type=_TYPES[moments[0].values.dtype] if moments else 0,
        out_type=0 if out is None else _TYPES[out.dtype],
        numel=len(master),
        offset=offset,
        seed=seed,
        master=master.data_ptr(),
        grad=grad.data_ptr(),
        first=first[0],
        second=second[0],
        first_scale=first[1],
        second_scale=second[1],
        out=_address(out),
        stops=stops.data_ptr(),
        rows=rows.data_ptr(),
        num_spans=len(stops),
    )


def run(update: Request, *, num_threads: int | None = None, isa: str = "best") -> None:
    """Update the chunk of a request.

    Args:
        update: of `request`.
        num_threads: None: as many as torch uses.
        isa: a key of ISAS.

    Raises:
        ValueError: the kernel refused; nothing was written.
    """
    update.num_threads = num_threads or torch.get_num_threads()
    update.isa = ISAS[isa]
    _raise_fault("update_", _native.hfs_update(ctypes.byref(update)))


def span_norms(update: Request, *, num_threads: int | None = None, isa: str = "best") -> Tensor:
    """(num_spans, 2) float64 of a request of Adam's; see `hf_speed.ops.update.span_norms`."""
    sums = torch.zeros(update.num_spans, 2, dtype=torch.float64)
    update.num_threads = num_threads or torch.get_num_threads()
    update.isa = ISAS[isa]
    fault = _native.hfs_update_norms(ctypes.byref(update), sums.data_ptr())
    _raise_fault("span_norms", fault)
    return sums


def square_sum(values: Tensor, *, num_threads: int | None = None, isa: str = "best") -> Tensor:
    """The sum of squares of (n,) values as a float64 scalar, in the order of the reference."""
    total = torch.zeros((), dtype=torch.float64)
    fault = _native.hfs_square_sum(
        values.data_ptr(),
        _TYPES[values.dtype],
        values.numel(),
        num_threads or torch.get_num_threads(),
        ISAS[isa],
        total.data_ptr(),
    )
    _raise_fault("square_sum", fault)
    return total


def _address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


def _raise_fault(name: str, fault: int) -> None:
    if fault:
        raise ValueError(f"{name} was given {_FAULTS[fault]}; nothing was written.")
