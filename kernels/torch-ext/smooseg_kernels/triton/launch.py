"""Shared by all launches: operators for a GPU or the interpreter, configurations from data files, block sizes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ..operators import add_op_namespace_prefix
from .labels import invert

INTERPRETED = not isinstance(invert, triton.JITFunction)
CONFIGS = Path(__file__).parent / "configs"
# set by a tuner or a test, these go before the data files: {kernel: {setting: value}}
OVERRIDES: dict[str, dict[str, int]] = {}
OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# elements of one matrix of unit prototypes, of which two or four stay in shared memory
LARGEST_PROTOTYPES = 8192
LARGEST_CODES = 256  # channels; beyond them rows spill everywhere, and sm_86 has not the shared memory


def operator(name: str) -> Callable:
    """Registers a launcher as a custom operator on CUDA and ROCm devices, and on the CPU for the interpreter."""

    def register(launcher: Callable):
        def on_cpu(*args):
            require_interpreter()
            return launcher(*args)

        op = custom_op(add_op_namespace_prefix(name), mutates_args=(), device_types="cuda")(launcher)
        op.register_kernel("cpu")(on_cpu)
        op.launcher = launcher  # type: ignore[attr-defined]
        return op

    return register


def require_interpreter() -> None:
    if not INTERPRETED:
        raise RuntimeError(
            'impl="triton" needs tensors on a GPU; on CPU tensors it runs only in the interpreter, with '
            'TRITON_INTERPRET=1 set before smooseg_kernels is imported. Use impl="torch" (or "auto") on a CPU'
        )


def fits(K: int, Z: int) -> bool:
    return block_k(K) * block_z(Z) <= LARGEST_PROTOTYPES and block_z(Z) <= LARGEST_CODES


def block_k(K: int) -> int:
    """Returns the columns of probs: K groups and one that is 1 everywhere, rounded up to a size of the matrix unit."""
    return max(16, triton.next_power_of_2(K + 1))


def block_z(Z: int) -> int:
    return max(16, triton.next_power_of_2(Z))


@functools.cache
def family(device: torch.device) -> str:
    """Names the data file that serves a device: one for each generation of matrix units."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    if not torch.cuda.is_available():  # a fake tensor on a machine without the card
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return f"sm_{major}0"
    # 8.6, 8.9, 12.0 have the instructions of 8.0 and less shared memory
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


@functools.cache
def load_configs(name: str) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def config(kernel: str, like: Tensor, heads: int = 1, size: str = "") -> dict[str, int]:
    """Copies a kernel's settings for the dtype of `like`.

    Their names in the data files are "full" (fp32), "half" (16 bits), and with several heads "half_heads" or
    "fp16_heads"; a `size` goes before them ("wide_half"). A kernel without one of these names has no settings.
    """
    variants = load_configs(family(like.device))[kernel]
    names = ["full"] if like.dtype == torch.float32 else ["half"]
    if heads > 1 and names == ["half"]:
        names = ["fp16_heads", "half_heads", "half"] if like.dtype == torch.float16 else ["half_heads", "half"]
    names.append("any")
    if size:
        names = [f"{size}_{name}" for name in names] + names
    name = next((name for name in names if name in variants), "")
    return {**variants.get(name, {}), **OVERRIDES.get(kernel, {})}


def size_of(columns: int, code_columns: int) -> str:
    """Names the settings for prototypes [columns,code_columns] beyond those that most settings were picked for."""
    if columns * code_columns <= 2048:
        return ""
    if code_columns > 128:
        return "long"
    return "wide" if columns <= 64 else "wider" if columns == 128 else "widest"


def narrow(settings: dict[str, int], heads: int, columns: int) -> dict[str, int]:
    """Shrinks blocks for more than the 32 columns that settings were picked for, and fits HEADS to the heads."""
    settings = dict(settings)
    if columns > 32 or heads % settings.get("HEADS", 1):
        settings["HEADS"] = 1
    settings["BLOCK_P"] = max(16, min(settings["BLOCK_P"], 4096 // columns))
    if columns > 32:
        if "TILES" in settings:
            settings["TILES"] = 1
        settings["BLOCK_D"] = max(16, min(settings["BLOCK_D"], 8192 // columns))
    return settings


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which the matrix unit reads a tensor. The interpreter gets bf16 wrong and reads fp32."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def operand(dtype: torch.dtype):
    """Returns Triton's name of `operand_dtype`."""
    return OPERANDS[operand_dtype(dtype)]


def precision(device: torch.device) -> str:
    """Returns the precision of fp32 dots: three tf32 products without an exact unit, or one where PyTorch uses one."""
    if family(device) in ("interpreter", "gfx942"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def softmax_arguments(temperature: float | Tensor, K: int) -> dict[str, float | bool | Tensor]:
    """Returns the arguments of `soft_labels`.

    Below 0.05 the square of e could leave fp32's range without a maximum, which also makes the only e of K = 1 exact.
    A tensor's value is unknown here; the kernel reads it.
    """
    if isinstance(temperature, Tensor):
        return {"sharpness": temperature, "BOUNDED": False, "BY_POINTER": True}
    bounded = temperature >= 0.05 and K > 1
    return {"sharpness": math.log2(math.e) / temperature, "BOUNDED": bounded, "BY_POINTER": False}


def with_rows_together(tensor: Tensor) -> Tensor:
    """Copies a tensor unless the elements of its rows are adjacent. Kernels take any strides of the other axes."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def or_nothing(tensor: Tensor | None, nothing: Tensor) -> Tensor:
    """Fills the place of a missing tensor with one that the kernel does not touch."""
    return nothing if tensor is None else tensor


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def strides(tensor: Tensor, *names: str) -> dict[str, int]:
    """Names the strides of the leading axes as the kernels' parameters."""
    return {f"stride_{name}": stride for name, stride in zip(names, tensor.stride())}


def first_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def launch(kernel, grid: tuple[int, ...], *, settings: dict[str, int], **arguments) -> None:
    """Starts a kernel, with its parameters by name."""
    options = {name: value for name, value in settings.items() if name != "PROGRAMS"}
    kernel[grid](**arguments, **options, enable_fp_fusion=True)
