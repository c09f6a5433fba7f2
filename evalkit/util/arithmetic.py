"""Whether a CPU gives equal bits for equal numbers, and what it computes with.

1. Left to itself MKL, which multiplies for PyTorch on x86, takes another order of sums where numbers lie at other addresses. So
   a resumed training, whose tensors lie elsewhere, would differ in the last bits. ``evalkit/__init__.py`` sets MKL_CBWR in the
   environment, which MKL reads at its first product and child processes inherit. A value that is there already is kept.
2. ``mode`` asks MKL which mode it is in. Where it multiplied before evalkit was imported, the variable came too late.
3. ``placed_alike`` multiplies numbers at other addresses and compares the bits. It knows no makers and no libraries.
4. ``facts`` are those of a run; ``words`` stand in a checkpoint; ``doubts`` say where a resumed training may differ.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import sys
from pathlib import Path

import torch

from evalkit.util.matmul import CPU_INFO, pays, times

VARIABLE = "MKL_CBWR"
STRICT = 0x10000
"""In MKL's number of a mode: no matter where numbers lie."""

BRANCHES = {
    1: "off", 2: "AUTO", 3: "COMPATIBLE", 4: "SSE2", 6: "SSSE3", 7: "SSE4_1", 8: "SSE4_2", 9: "AVX", 10: "AVX2",
    11: "AVX512_MIC", 12: "AVX512", 13: "AVX512_MIC_E1", 14: "AVX512_E1",
}  # fmt: skip
"""The other part of that number, as MKL_CBWR spells it."""

GETTERS = ("MKL_CBWR_Get", "mkl_serv_cbwr_get")
"""What MKL calls its question for the mode; the second where it is linked into PyTorch."""

LINE = 64
"""Bytes of a cache line, to which PyTorch aligns what it allocates."""

SHAPES = ((256, 32, 64), (1, 32, 64), (3, 5, 7), (33, 257, 66), (64, 1000, 3))
"""B, D and F that are tried: a small batch, single rows, sizes that fill no vector, few columns."""


def library() -> str:
    """What multiplies float32 matrices for PyTorch here, as 'MKL 2024.2'; its name alone where the version is unknown."""
    config = torch.__config__.show()
    if torch.backends.mkl.is_available():
        found = re.search(r"Math Kernel Library Version (\S+?)-Product", config)
        return f"MKL {found[1]}" if found else "MKL"
    found = re.search(r"BLAS_INFO=(\w+)", config)
    return found[1] if found else "unknown"


def mode() -> str | None:
    """The mode MKL is in, as MKL_CBWR spells it, or 'off'; None where there is no MKL or it cannot be asked."""
    if not torch.backends.mkl.is_available():
        return None
    ending = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "torch_cpu.dll")
    try:
        loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / ending))
    except OSError:
        return None
    for name in GETTERS:
        if hasattr(loaded, name):
            number = getattr(loaded, name)(-1)  # -1: the branch and whether it is strict
            branch = BRANCHES.get(number & (STRICT - 1), str(number & (STRICT - 1)))
            return f"{branch},STRICT" if number & STRICT else branch
    return None


def placed(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A contiguous copy whose first byte lies ``offset`` bytes behind a multiple of ``LINE``.

    Args:
        tensor: any shape and type.
        offset: bytes, a multiple of the size of an element.
    """
    room = torch.empty(tensor.nbytes + 2 * LINE, dtype=torch.uint8)
    begin = -room.data_ptr() % LINE + offset
    copy = room[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@functools.cache
def placed_alike() -> bool:
    """Whether products of equal numbers had equal bits at all addresses that were tried; takes a few milliseconds, once."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for B, D, F in SHAPES:
            drawn = [torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in ((B, D), (F, D), (B, F))]
            expected = _products(*(placed(tensor, 0) for tensor in drawn))
            for offset in range(4, LINE, 4):
                moved = (placed(tensor, (step * offset) % LINE) for step, tensor in enumerate(drawn, start=1))
                if not all(torch.equal(one, two) for one, two in zip(expected, _products(*moved), strict=True)):
                    return False
    return True


def _products(x: torch.Tensor, W: torch.Tensor, d: torch.Tensor) -> list[torch.Tensor]:
    """Those of a layer x W^T, forward and backward, by either library, and a matrix by a vector."""
    return [x @ W.mT, d @ W, d.mT @ x, times(x, W.mT), times(d, W), torch.mv(W, x[0])]


def facts() -> dict[str, str]:
    """What a run's facts say of the arithmetic, by name."""
    found = mode()
    asked = os.environ.get(VARIABLE, "")
    late = f" (too late for {asked})" if asked.endswith("STRICT") and found == "off" else ""
    return {
        "arithmetic": library(),
        **({VARIABLE: found + late} if found else {}),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "equal bits": "wherever numbers lie" if placed_alike() else "only where numbers lie alike",
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def words() -> str:
    """All that the bits of a product depend on besides the numbers, on one line."""
    multiplies = f"{library()}{', oneDNN' if pays() else ''}"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{multiplies}, {mode() or 'no mode'}, {vectors}, {torch.get_num_threads()} threads on {processor()}"


def doubts(before: str | None) -> str:
    """Why a training that goes on may differ in the last bits from one in one go; '' where nothing is known against it.

    Args:
        before: ``words`` of the process that wrote the checkpoint; None where it did not say.
    """
    if before is not None and before != words():
        return f"it began with {before}, and this is {words()}: the last bits may differ from a run in one go"
    if placed_alike():
        return ""
    reason = "MKL multiplied before evalkit was imported" if mode() == "off" and os.environ.get(VARIABLE) else "as they are set"
    return f"products here depend on where numbers lie ({reason}): the last bits may differ from a run in one go"
