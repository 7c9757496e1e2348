"""Fused versions of single layers, MBConv, MLP, and sequences of these."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from xformer.fused import onednn
from xformer.fused.kernels import DepthwiseKernel, LinearKernel, is_depthwise, tensor
from xformer.layers import ConvNorm, DropPath, HardSwish, MBConv, Mlp, Pointwise, SqueezeExcite
from xformer_kernels import dispatch, inference, ops
from xformer_kernels.modules import dropout_p, runs_forward_of

SHAPES = 16
"""Maximum number of input shapes for which a module keeps programs."""


class Fused(nn.Module):
    """Base class of fused modules, which also inherit from the class of the layer they replace."""

    kernels: tuple[Any, ...] = ()
    all_kernels: tuple[Any, ...] = ()
    """``kernels`` and those of the fused modules that :meth:`run` calls."""
    programs: dict[Any, tuple[int, Any]]
    """By input shape: the sum of :attr:`Kernel.changes` at recording, and the program; None if not recordable."""
    inside: ClassVar[tuple[str, ...] | None] = ()
    """Names of the children that are swapped on their own first; None means all."""

    @classmethod
    def of(cls, plain: Any) -> Fused | None:
        """Return a fused module that shares the state of `plain`; None if parts of it were replaced or have hooks."""
        kernels = cls.kernels_of(plain)
        if kernels is None or None in kernels:
            return None
        fused = cls.__new__(cls)
        inner = (kernel for child in cls.runs(plain) for kernel in child.all_kernels)
        fused.__dict__.update(plain.__dict__, kernels=kernels, all_kernels=(*kernels, *inner), programs={})
        return fused

    @staticmethod
    def kernels_of(plain: Any) -> tuple[Any, ...] | None:
        """The kernels that compute the layer, starting with the one that reads x.

        None, or a tuple that contains None, if the layer is not supported.
        """
        raise NotImplementedError

    @staticmethod
    def runs(plain: Any) -> list[Any]:
        """Fused modules whose :meth:`run` is called by this module's :meth:`run`, without further checks."""
        return []

    def run(self, x: Any) -> Any:
        """Compute the forward with kernels, for a contiguous x with features last.

        Requires :meth:`serves` and :meth:`ready`.
        """
        raise NotImplementedError

    def serves(self, x: Tensor) -> bool:
        """Whether kernels may be used: eval mode, float32 on the CPU, no autograd, transforms or dispatch modes."""
        return bool(self.all_kernels) and not self.training and inference.asked(x, x) and ops.plain(x)

    def takes(self, x: Tensor) -> bool:
        """Whether :meth:`run` supports the shape and strides of x, and the current parameters."""
        features: int = self.all_kernels[0].features
        return x.shape[-1] == features and x.is_contiguous() and x.numel() > 0 and self.ready()

    def compute(self, x: Tensor) -> Tensor:
        """Return the result of :meth:`run`, with a single call of a recorded program if it only calls kernels."""
        if len(self.all_kernels) == 1:
            return self.run(x)
        changes = sum([kernel.changes for kernel in self.all_kernels])
        found = self.programs.get(x.shape)
        if found is None or found[0] != changes:
            if len(self.programs) == SHAPES:
                self.programs.clear()
            found = self.programs[x.shape] = changes, inference.KERNELS.record(x.shape, self.run)
        program = found[1]
        if program is None:
            return self.run(x)
        for _ in range(program.names.count("xfa")):
            dispatch.note("cpp", "xfa_forward")
        y: Tensor = inference.KERNELS.run(program, x)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "programs": {}}

    def ready(self) -> bool:
        """Whether all kernels support their current parameters. Packs parameters that have changed."""
        return all([kernel.ready() for kernel in self.all_kernels])


class FusedTokens(Fused):
    """A module on tokens (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.serves(x) and x.dim() > 0 and self.takes(x):
            return self.compute(x)
        y: Tensor = super().forward(x)
        return y


class FusedImages(Fused):
    """A module on images (B, C, H, W); kernels are used if they are in channels_last memory format."""

    def forward(self, x: Tensor) -> Tensor:
        if self.serves(x) and x.dim() == 4 and self.takes(last := x.permute(0, 2, 3, 1)):
            return self.compute(last).permute(0, 3, 1, 2)
        y: Tensor = super().forward(x)
        return y


class OneKernel(Fused):
    """A module that consists of one kernel."""

    def run(self, x: Any) -> Any:
        return self.kernels[0](x)


class FusedLinear(OneKernel, FusedTokens, nn.Linear):
    @staticmethod
    def kernels_of(plain: nn.Linear) -> tuple[Any, ...]:
        return (LinearKernel(plain) if runs_forward_of(plain, nn.Linear) else None,)


class FusedPointwise(OneKernel, FusedImages, Pointwise):
    @staticmethod
    def kernels_of(plain: Pointwise) -> tuple[Any, ...]:
        return (LinearKernel(plain) if runs_forward_of(plain, Pointwise) else None,)


def of_conv_norm(layer: nn.Module, before: nn.Module | None = None) -> LinearKernel | DepthwiseKernel | None:
    """The kernel of a folded 1x1 or depthwise :class:`ConvNorm`; `before`: a layer norm over the input channels."""
    if not _is_folded(layer) or not (before is None or runs_forward_of(before, nn.LayerNorm)):
        return None
    conv: Any = layer.conv
    norm: Any = before
    hard_swish = isinstance(layer.act, HardSwish)
    if runs_forward_of(conv, Pointwise):
        return LinearKernel(conv, norm, hard_swish)
    return DepthwiseKernel(conv, hard_swish) if before is None and is_depthwise(conv) else None


def _is_folded(layer: Any) -> bool:
    """Whether `layer` is a :class:`ConvNorm` that runs a convolution and optionally hard-swish, and nothing else."""
    return (
        runs_forward_of(layer, ConvNorm)
        and (runs_forward_of(layer.conv, Pointwise) or _pads_with_zeros(layer.conv))
        and runs_forward_of(layer.bn, nn.Identity)
        and runs_forward_of(layer.act, HardSwish, nn.Identity)
    )


def _pads_with_zeros(conv: nn.Module) -> bool:
    if not isinstance(conv, nn.Conv2d) or not runs_forward_of(conv, nn.Conv2d):
        return False
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class FusedConvNorm(OneKernel, FusedImages, ConvNorm):
    """1x1 and depthwise convolutions."""

    @staticmethod
    def kernels_of(plain: ConvNorm) -> tuple[Any, ...]:
        return (of_conv_norm(plain),)


class FusedDenseConvNorm(Fused, ConvNorm):
    """All other convolutions, using oneDNN."""

    @staticmethod
    def kernels_of(plain: ConvNorm) -> tuple[Any, ...] | None:
        return () if onednn.IS_THERE and _is_folded(plain) and isinstance(plain.conv, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.conv
        if not self.training and onednn.serves(x, conv.weight):
            return onednn.conv2d(x, conv, isinstance(self.act, HardSwish))
        return super().forward(x)


class FusedMBConv(FusedImages, MBConv):
    inside = ("se",)

    @staticmethod
    def kernels_of(plain: MBConv) -> tuple[Any, ...] | None:
        if not (
            runs_forward_of(plain, MBConv)
            and runs_forward_of(plain.se, SqueezeExcite, nn.Identity)
            and runs_forward_of(plain.drop_path, DropPath)
        ):
            return None
        return of_conv_norm(plain.expand), of_conv_norm(plain.depthwise), of_conv_norm(plain.project)

    def run(self, x: Any) -> Any:
        expand, depthwise, project = self.kernels
        y = depthwise(expand(x))
        if isinstance(self.se, SqueezeExcite):
            y = self.se(tensor(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        return project(y, x if self.skip else None)


class FusedSequential(FusedImages, nn.Sequential):
    """A sequence of fused modules on images, such as a stage of the backbone."""

    inside = None

    @staticmethod
    def kernels_of(plain: nn.Sequential) -> tuple[Any, ...] | None:
        served = runs_forward_of(plain, nn.Sequential) and all(
            isinstance(m, FusedImages) and runs_forward_of(m, type(m)) for m in plain
        )
        return () if served and len(plain) else None

    @staticmethod
    def runs(plain: nn.Sequential) -> list[Any]:
        return list(plain)

    def run(self, x: Any) -> Any:
        layers: Any = self
        for layer in layers:
            x = layer.run(x)
        return x


class FusedMlp(FusedTokens, Mlp):
    @staticmethod
    def kernels_of(plain: Mlp) -> tuple[Any, ...] | None:
        if not (
            runs_forward_of(plain, Mlp)
            and runs_forward_of(plain.norm, nn.LayerNorm)
            and runs_forward_of(plain.fc1, nn.Linear)
            and runs_forward_of(plain.act, HardSwish)
            and runs_forward_of(plain.fc2, nn.Linear)
            and dropout_p(plain.drop) == 0
            and runs_forward_of(plain.drop_path, DropPath)
        ):
            return None
        return LinearKernel(plain.fc1, plain.norm, hard_swish=True), LinearKernel(plain.fc2)

    def run(self, x: Any) -> Any:
        fc1, fc2 = self.kernels
        return fc2(fc1(x), x)
