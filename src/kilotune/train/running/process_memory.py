"""What this process has of memory now, and the most it had since :func:`forget_peak`. Bytes; 0 where nobody tells."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["forget_peak", "peak_bytes", "process_bytes"]

OF_THE_PEAK = "5"  # what Linux is told so that the peak of a process begins anew; see proc(5), clear_refs


def process_bytes() -> int:
    """What this process has now."""
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew: of tensors on CUDA, elsewhere of the process, on Linux alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(OF_THE_PEAK, encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """The most at a time: of tensors on CUDA, elsewhere of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        words = next((line.split() for line in lines if line.startswith("VmHWM:")), [])
        return int(words[1]) * 1024 if len(words) > 1 else _ever()
    return _ever()


def _ever() -> int:
    """Since the process began."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
