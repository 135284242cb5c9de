"""What autograd saves for the backward: weights stay where they live, activations may move.

A gathered weight is kept as its place in the model, to be looked up in what is gathered for the
backward. An activation goes to its tier while the forward goes on, and comes back ahead of use.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from hf_speed.offload.activations import ActivationOffload
from hf_speed.offload.saved import Handle
from hf_speed.zero.gather import Gatherer, SavedView, Unit


class Saver:
    """The two saved-tensor hooks of a pass.

    Args:
        units: of the model.
        gatherer: knows which tensors look into gathered buffers.
        activations: where other tensors go; None leaves them.
    """

    def __init__(
        self, units: Sequence[Unit], gatherer: Gatherer, activations: ActivationOffload | None
    ) -> None:
        self._gatherer = gatherer
        self._activations = activations
        self._has_sharded = any(unit.sharded for unit in units)
        # What the model keeps in memory anyway would only be copied.
        self._resident = {
            group.full.untyped_storage().data_ptr()
            for unit in units
            for group in unit.groups
            if group.full is not None
        }
        self._resident |= {
            buffer.untyped_storage().data_ptr()
            for unit in units
            for buffer in unit.module.buffers()
        }

    @property
    def is_needed(self) -> bool:
        """Whether anything is to be done about what autograd saves."""
        return self._has_sharded or self._activations is not None

    def pack(self, saved: Tensor) -> Tensor | SavedView | Handle:
        """Autograd saves a tensor."""
        packed = self._gatherer.pack(saved) if self._has_sharded else saved
        if self._activations is None or packed is not saved or self._is_kept(saved):
            return packed
        return self._activations.pack(saved)

    def unpack(self, packed: Tensor | SavedView | Handle) -> Tensor:
        """Autograd needs it again."""
        if isinstance(packed, (Tensor, SavedView)):
            return self._gatherer.unpack(packed)
        if self._activations is None:
            raise TypeError(f"An activation without a tier: {type(packed).__name__}.")
        return self._activations.unpack(packed)

    def _is_kept(self, saved: Tensor) -> bool:
        is_parameter = isinstance(saved, nn.Parameter)
        return is_parameter or saved.untyped_storage().data_ptr() in self._resident
