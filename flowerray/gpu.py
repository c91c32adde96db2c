"""What a GPU asks for besides a CPU: copies that nobody waits for, and faults as sentences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowerray.errors import UserError

USE_THE_CPU = "put `CUDA_VISIBLE_DEVICES= ` in front of the command to use the CPU"


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Numbers of the host, where they should be; neither the host nor a GPU waits for them."""
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: Any) -> Any:
    """Plain containers with copies of their tensors in the host's memory; those of a GPU are whole
    once it has done what was asked of it so far, for which this does not wait.
    """
    if isinstance(values, Tensor):
        values = values.detach()
        return (
            values.clone() if values.device.type == "cpu" else values.to("cpu", non_blocking=True)
        )
    if isinstance(values, dict):
        return {key: to_host(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(map(to_host, values))
    return values


def snapshot(values: Any, device: torch.device) -> Callable[[], Any]:
    """`to_host` of the values as a training on this device has left them; a call, of any thread,
    waits until the copies are whole and gives them.
    """
    copies, copied = to_host(values), None
    if device.type == "cuda":
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(device))

    def get() -> Any:
        if copied is not None:
            copied.synchronize()
        return copies

    return get


def check(device: torch.device) -> None:
    """Raises UserError where this torch cannot run a kernel on the device."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        said = fault(error) or f"{device} cannot be used ({first_line(error)}): {USE_THE_CPU}."
        raise UserError(said) from error


def why_none() -> str:
    """Why torch can use no GPU here."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error).rstrip(".")
    return "no GPU is visible"


def fault(error: BaseException, advice: str = "") -> str | None:
    """What a GPU's error means to a user; None where it is none of these.

    Args:
        advice: what to do about memory that is too small.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        advice = advice or "lower the batch size or the image size, or end what else uses the GPU"
        return f"the GPU is out of memory ({first_line(error, 2)}): {advice}."
    if "no kernel image is available" in text or "cudaErrorNoKernelImageForDevice" in text:
        built = " ".join(torch.cuda.get_arch_list()) or "no GPU"
        return (
            f"torch {torch.__version__} has no kernels for this GPU, it was built for {built}: "
            f"install a torch that was built for it, or {USE_THE_CPU}."
        )
    return None


def first_line(error: BaseException, sentences: int = 1) -> str:
    """The first sentences of an error's first line."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return ". ".join(line.split(". ")[:sentences]).rstrip(".")
