"""Figures of a run, read from the process and the device."""

import os
import resource

import torch

KIB = 1024


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Highest use so far of each memory tier of this process: "host", on CUDA also "device"."""
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def device_memory_bytes(device: torch.device) -> int:
    """Memory of the device in bytes; a CPU's is shared by the processes on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
