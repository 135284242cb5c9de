"""A parameter that is not here: released between the moments at which its unit computes.

The user's `nn.Parameter` object stays the same object for ever. While it is released its class is
a ShardedParameter: shape, dtype, device, requires_grad and grad answer as always, anything that
would read or write values raises ShardedParameterError. No hidden collective, which one rank alone
could enter, and no freed storage behind a live tensor, which a stray read would fault on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_speed.errors import ShardedParameterError

_PROPERTIES = [
    "shape",
    "dtype",
    "device",
    "requires_grad",
    "grad",
    "is_leaf",
    "layout",
    "ndim",
    "grad_fn",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_quantized",
    "is_nested",
    "names",
    "itemsize",
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "output_nr",
    "retains_grad",
    "is_mkldnn",
    "is_xpu",
    "is_mps",
    "is_sparse_csr",
    "is_vulkan",
    "is_ipu",
    "is_xla",
    "is_mtia",
]
_METHODS = [
    "size",
    "numel",
    "dim",
    "nelement",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "element_size",
    "__hash__",
    "__len__",
    "requires_grad_",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "is_contiguous",
    "is_inference",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "get_device",
    "is_conj",
    "is_neg",
]


_NEW_TENSORS = ("empty_like", "zeros_like", "ones_like", "full_like")
"""What optimizers (Adagrad) make their state with before they are bound: only the shape counts."""


MOVES = frozenset(
    getattr(Tensor, name) for name in ("to", "cpu", "cuda", "float", "double", "half", "bfloat16")
)
"""What `model.to()` and its kin call; allowed where they move nothing."""
_SAME_TWICE = frozenset(
    (Tensor.data.__set__, torch._has_compatible_shallow_copy_type)  # type: ignore[attr-defined]
)
"""What they do next, with what came of it: nothing, where that is the parameter itself."""


def _metadata_functions() -> frozenset[Any]:
    allowed: set[Any] = {torch.is_floating_point, torch.is_complex, torch.numel}
    allowed.update(getattr(torch, name) for name in _NEW_TENSORS)
    for name in _PROPERTIES:
        attribute = getattr(Tensor, name, None)
        if attribute is not None:
            allowed.add(attribute.__get__)
    for name in ("requires_grad", "grad"):
        allowed.update((getattr(Tensor, name).__set__, getattr(Tensor, name).__delete__))
    for name in _METHODS:
        attribute = getattr(Tensor, name, None)
        if attribute is not None:
            allowed.add(attribute)
    return frozenset(allowed)


class ShardedParameter(nn.Parameter):
    """What a parameter is while its values are on other ranks, or on another memory tier."""

    _metadata = _metadata_functions()

    @classmethod
    def name_of(cls, parameter: Tensor) -> str:
        """The parameter's name in its model, for messages."""
        return f"parameter at {id(parameter):#x}"

    def __repr__(self) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"ShardedParameter({self.name_of(self)}, {shape=}, {dtype=}, {device=})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        raise _read_error(self, "copy.deepcopy")

    def __reduce_ex__(self, proto: int) -> Any:  # type: ignore[override]
        raise _read_error(self, "pickle")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let metadata through, refuse everything else."""
        if func in cls._metadata:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in MOVES and moves_nothing(func, args, kwargs or {}):
            return args[0]
        if func in _SAME_TWICE and args[0] is args[1]:
            return True
        # Not `or`: the truth of a parameter is one of the reads that end here.
        released = next(_released([*args, *(kwargs or {}).values()]), None)
        raise _read_error(released, getattr(func, "__name__", str(func)))


def moves_nothing(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether `tensor.to(...)` and its kin would leave a tensor where and what it is."""
    with torch._C.DisableTorchFunctionSubclass():
        mine = args[0]
        # Tried on a tensor without elements: a placeholder that moved would be as large as it says.
        probe = torch.empty((0,) * mine.dim(), dtype=mine.dtype, device=mine.device)
        moved = func(probe, *args[1:], **kwargs)
        return moved.device == probe.device and moved.dtype == probe.dtype


def _released(values: Any) -> Any:
    for value in values:
        if isinstance(value, ShardedParameter):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _released(value)


def _read_error(parameter: ShardedParameter | None, operation: str) -> ShardedParameterError:
    if parameter is None:
        name, shape = "a parameter", ""
    else:
        name = type(parameter).name_of(parameter)
        with torch._C.DisableTorchFunctionSubclass():
            shape = f" of shape {tuple(parameter.shape)}"
    return ShardedParameterError(
        f"{operation} needs the values of {name}{shape}, which are elsewhere outside of "
        f"its module's forward and backward: on other ranks (zero.stage=3) or on another memory "
        f"tier (offload.parameters, hf_speed.offload_states). Read or change them inside "
        f"`with hf_speed.gathered(model, [{name!r}]):` (modify=True to keep changes), entered by "
        f"every rank."
    )


def released_class(names: Mapping[int, str]) -> type[ShardedParameter]:
    """The class that the released parameters of one engine take.

    Args:
        names: id of a parameter -> its name in the model; read when an error is raised.
    """

    class Released(ShardedParameter):
        @classmethod
        def name_of(cls, parameter: Tensor) -> str:
            return names.get(id(parameter), super().name_of(parameter))

    Released.__name__ = Released.__qualname__ = "ShardedParameter"
    return Released


def publish(parameter: nn.Parameter, values: Tensor) -> None:
    """Make `parameter` an ordinary one again, with `values` (same shape and dtype) as its data."""
    parameter.__class__ = nn.Parameter
    parameter.data = values


def hide(parameter: nn.Parameter, placeholder: Tensor, released: type[ShardedParameter]) -> None:
    """Let go of the values: `placeholder` has the true shape and no memory behind it."""
    parameter.data = placeholder
    parameter.__class__ = released


def placeholder_of(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the given shape over a single NaN: one element of memory, and loud if read."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))
