"""What the machine can do: how fast its matrix products are, and in which number format."""

from __future__ import annotations

import time
from typing import get_args

import torch

from embedistill.choices import Dtype
from embedistill.errors import UsageError

_FORMATS = (torch.float32, torch.bfloat16)
_WORTHWHILE = 1.25


def choose_dtype(wanted: Dtype, device: str | None = None) -> torch.dtype:
    """Return the number format for matrix products: with auto, bfloat16 where it is measured faster by a quarter.

    Raises:
        UsageError: It is none of these.
    """
    if wanted not in get_args(Dtype):
        raise UsageError("dtype", str(wanted), "auto, float32 or bfloat16")
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    rates = measure_products(device=device)
    return torch.bfloat16 if rates[torch.bfloat16] > _WORTHWHILE * rates[torch.float32] else torch.float32


def measure_products(seconds: float = 2.0, size: int = 2048, device: str | None = None) -> dict[torch.dtype, float]:
    """Return the flop/s of square matrix products by number format; default: on the device that models are loaded to.

    The formats take turns, so that a busy machine slows both alike. It holds for the moment: measure beside what is
    compared with it.
    """
    device = device or find_device()
    if device == "cpu":
        quick = _time_products(0.0, 256, device)
        if quick[torch.bfloat16] < quick[torch.float32] / 2:  # a processor without: a large product would take a minute
            return quick
    return _time_products(seconds, size, device)


def _time_products(seconds: float, size: int, device: str) -> dict[torch.dtype, float]:
    factors = {dtype: torch.ones(size, size, dtype=dtype, device=device) for dtype in _FORMATS}
    spent, done = dict.fromkeys(_FORMATS, 0.0), dict.fromkeys(_FORMATS, 0)
    for matrix in factors.values():
        matrix @ matrix
    while not all(done.values()) or sum(spent.values()) < seconds:
        for dtype, matrix in factors.items():
            start = time.perf_counter()
            matrix @ matrix
            if device != "cpu":
                torch.accelerator.synchronize()
            spent[dtype] += time.perf_counter() - start
            done[dtype] += 1
    return {dtype: 2.0 * size**3 * done[dtype] / spent[dtype] for dtype in _FORMATS}


def find_training_device() -> str:
    """Return the device that students are trained on: CUDA, or the CPU, which is what the Trainer is told."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device() -> str:
    """Return the device that models are loaded to: an accelerator where torch finds one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"
