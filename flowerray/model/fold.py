"""Convolutions computed otherwise, to the same result: with the frozen BatchNorm behind them, one
pass less; and pixels skipped before a convolution instead of in it.

Letters: C channels, H W pixels.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, pad_same
from torch import Tensor, nn


class FoldedConv2d(nn.Conv2d):
    """A convolution and the frozen BatchNorm that reads it, as one convolution.

    With fixed statistics m, v the pair computes (w*x + c - m) s + b with s = g / sqrt(v + eps): a
    convolution with weight w s and bias (c - m) s + b. It is composed anew in each call, so that
    w, c, g and b get their gradients and a loaded state takes effect.
    """

    norm: nn.BatchNorm2d

    def _composed(self) -> tuple[Tensor, Tensor]:
        norm = self.norm
        assert norm.running_var is not None and norm.running_mean is not None
        scale_C = norm.weight * (norm.running_var + norm.eps).rsqrt()
        offset_C = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        return self.weight * scale_C.view(-1, 1, 1, 1), offset_C * scale_C + norm.bias

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self._composed())


class FoldedConv2dSame(FoldedConv2d, Conv2dSame):
    """The same with TensorFlow's padding, which depends on the input's size."""

    def forward(self, input: Tensor) -> Tensor:
        size, stride, dilation = list(self.kernel_size), list(self.stride), list(self.dilation)
        return self._conv_forward(pad_same(input, size, stride, dilation), *self._composed())


class FoldedNorm2d(nn.BatchNorm2d):
    """Keeps the parameters and statistics; its convolution does the work."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class FoldedNormAct2d(BatchNormAct2d):
    """The same with timm's activation behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        if type(self.act) is nn.ReLU6 and self.act.inplace and type(self.drop) is nn.Identity:
            return _ReLU6.apply(x)
        return self.act(self.drop(x))


class _ReLU6(torch.autograd.Function):
    """ReLU6 in place that keeps its output for backward, from which the gradient follows as well.

    torch's own in-place form keeps a copy of its input: 7 % of a training step of lite0 (CPU).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_(0, 6)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.hardtanh_backward(grad, ctx.saved_tensors[0], 0.0, 6.0)


# Exact types only: a subclass may compute something else.
_CONV: dict[type, type] = {nn.Conv2d: FoldedConv2d, Conv2dSame: FoldedConv2dSame}
_NORM: dict[type, type] = {nn.BatchNorm2d: FoldedNorm2d, BatchNormAct2d: FoldedNormAct2d}


def skip_pixels_first(network: nn.Module) -> None:
    """Lets 1 x 1 convolutions with a stride and few input channels skip the pixels beforehand.

    In channels_last memory their backward pass on the CPU writes beyond its memory (oneDNN 3.13 in
    torch 2.15, fewer than 16 channels: the stems of FastViT, MobileOne, RepVGG), which ends the
    process, or worse.
    """
    for module in network.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.padding in ((0, 0), "valid")
            and module.in_channels < 16
        ):
            module.register_forward_pre_hook(partial(_every, module.stride))
            module.stride = (1, 1)


def _every(stride: tuple[int, ...], _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0][..., :: stride[0], :: stride[1]]


class PairFinder:
    """Watches one forward pass of a network and finds the (convolution, BatchNorm) pairs to fold.

    A pair qualifies if each half runs once and the autograd graph shows the norm as the only reader
    of the convolution's output.
    """

    def __init__(self, network: nn.Module) -> None:
        self._made: dict[Any, nn.Module] = {}
        self._read: list[tuple[Any, nn.Module]] = []
        self._calls: dict[nn.Module, int] = {}
        self._hooks = []
        for module in network.modules():
            if type(module) in _CONV:
                self._hooks.append(module.register_forward_hook(self._after_conv))
            elif type(module) in _NORM and module.affine and module.track_running_stats:
                self._hooks.append(module.register_forward_pre_hook(self._before_norm))

    def _after_conv(self, module: nn.Module, _: Any, output: Tensor) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1
        self._made[output.grad_fn] = module

    def _before_norm(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1
        self._read.append((inputs[0].grad_fn, module))

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def pairs(self, output: Tensor) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs, given the pass's output, which must carry its graph."""
        readers = _count_readers(output.grad_fn)
        return [
            (self._made[node], norm)
            for node, norm in self._read
            if node in self._made
            and readers.get(node) == 1
            and self._calls[self._made[node]] == self._calls[norm] == 1
        ]


def fold(conv: nn.Module, norm: nn.Module) -> None:
    """Lets `conv` compute the pair; parameters, buffers and state_dict names stay as they are."""
    conv.__class__ = _CONV[type(conv)]
    norm.__class__ = _NORM[type(norm)]
    # Past nn.Module's registry: a second name for the norm would show in the state_dict.
    # deepcopy and pickle still follow it, and copies hold their own norm.
    conv.__dict__["norm"] = norm


def _count_readers(root: Any) -> dict[Any, int]:
    """How many inputs of the autograd graph under `root` take each node's output."""
    readers: dict[Any, int] = {}
    stack = [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            readers[node] = readers.get(node, 0) + 1
            if readers[node] == 1:
                stack.append(node)
    return readers
