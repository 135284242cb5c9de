"""The device tier: memory of where the model computes."""

import torch
from torch import Tensor

from hf_speed.errors import OffloadError
from hf_speed.offload.memory import MemoryStore
from hf_speed.offload.store import in_words


class DeviceStore(MemoryStore):
    """Rows in the memory of `device`.

    Copies within a GPU are ordered by its current stream: their tickets are done at once.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__("device", device)

    def _make(self, key: str, numel: int, dtype: torch.dtype, *, zeros: bool) -> Tensor:
        make = torch.zeros if zeros else torch.empty
        try:
            return make(numel, dtype=dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a bare one on the CPU
            raise OffloadError(
                f"the device tier is full: {key!r} needs {in_words(numel * dtype.itemsize)} on "
                f"{self.device}, beside {in_words(self.num_bytes)} of other rows ({error}). Move "
                f"a kind of state to another tier, as in offload.optimizer='host'."
            ) from error
