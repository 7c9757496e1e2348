"""The non-tensor arguments of a layer call: checks, what the ranks compare, and the choice of the form."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xformer_kernels import dispatch, functional, ops, parallel, repeated, validate
from xformer_kernels import torch_internals as internals
from xformer_kernels.layer import calibration, cost, timing
from xformer_kernels.layer.ops import Operands
from xformer_kernels.spec import Spec

FORMS = ("auto", "gram", "direct")


class Call(NamedTuple):
    """The non-tensor arguments of a call."""

    spec: Spec
    token_mask: Tensor | None
    dropout_p: float
    form: str
    group: Any
    backend: str
    kernels: bool = False  # whether kernels with packed weights project in the direct form

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of :func:`xfa_layer` and :func:`xfa_block`."""
        others = {name: value for name, value in self._asdict().items() if name not in ("spec", "kernels")}
        return {**self.spec.of_xfa(), **others}

    def signature(self, o: Operands, *block: Any) -> repeated.Signature | None:
        """The signature of a call without masks, dropout and group; None for others. `block`: as for :meth:`check`."""
        if self.token_mask is not None or self.group is not None or type(self.dropout_p) is not float or self.dropout_p:
            return None
        return repeated.signature(o, "layer", self.spec, self.spec.eps, self.dropout_p, self.form, self.backend, *block)

    def check(self, o: Operands, *block: Any) -> None:
        """Checks all arguments. `block`: ln_eps and residual of a half block."""
        validate.layer(*o)
        self.spec.check()
        validate.probability("dropout_p", self.dropout_p)
        validate.choice("form", self.form, FORMS)
        dispatch.check_name(self.backend)
        if self.token_mask is not None:
            validate.token_mask(self.token_mask, o.x, "x")
        if self.form == "gram" and self.no_gram_form():
            raise ValueError(f"form='gram' is not possible: {self.no_gram_form()}; take 'auto' or 'direct'")

        if block:
            self._check_block(o, *block)

    def _check_block(self, o: Operands, ln_eps: Any, residual: Any) -> None:
        validate.not_negative("ln_eps", ln_eps)
        validate.boolean("residual", residual)
        if residual and o.proj_weight.shape[0] != o.x.shape[-1]:
            raise ValueError(
                f"proj_weight must have shape (C, I) with C = {o.x.shape[-1]} where x is added, "
                f"got {tuple(o.proj_weight.shape)}"
            )

    def tell(self, ranks: parallel.Exchange, o: Operands, *block: Any) -> None:
        """Fills in what must be equal on all ranks of a group, so that all exchange the same sums in the same order."""
        if self.group is None:
            return
        absent = [t is None for t in o]
        choices = (self.spec.text(), float(self.dropout_p), self.form)
        # gradients of any operand, which make the Gram form's backward communicate; of q and k, for the direct form's
        of_qk = (o.x, o.qkv_weight, o.qkv_bias, o.ln_weight, o.ln_bias)
        wanted = [ops.wants_grad(*o), ops.wants_grad(*of_qk)]
        O, I = o.proj_weight.shape  # noqa: E741
        H = o.temperature.numel()
        served: Any = self.narrow(o)
        if dispatch.asked(self.backend) != "auto":
            served = [self._served(o, o.x.shape[-1], None), self._served(o, I // H, self.fused_norm())]
        ranks.alike = parallel.describe(o.x, H, I, O, (*choices, *absent, *map(float, block)), wanted, served)
        ranks.tokens = o.x.shape[1]

    def agreed(self, ranks: parallel.Exchange, o: Operands) -> Call:
        """The call with the form for all ranks of its group, chosen for the largest number of tokens of any rank."""
        if self.group is None:
            return self
        return self._replace(form=self.choose(o, tokens=ranks.most_tokens))

    def no_gram_form(self) -> str:
        """Why there is no Gram form; empty if there is one."""
        if self.spec.norm == "feature":
            return "norm='feature' divides each token of q and k by a norm of its own, so no sum over x knows them"
        return ""

    def always_direct(self, o: Operands) -> str:
        """Why the form is direct even if another is requested; empty if it is not."""
        if ops.torch_only(*o):
            return functional.TORCH_ONLY
        if o.temperature.dtype is torch.float64 and o.x.dtype is not torch.float64:
            return f"a float64 temperature promotes tokens of {o.x.dtype}"
        return ""

    def against_gram(self, o: Operands) -> str:
        """Why auto takes the direct form regardless of the costs; empty if it does not."""
        reason = self.always_direct(o) or self.no_gram_form()
        if not reason and torch.compiler.is_exporting():
            return "an exported program has the direct form"
        if not reason and self.narrow(o):
            return f"no kernel computes it for the {o.x.shape[-1]} features of x"
        return reason

    def narrow(self, o: Operands) -> bool:
        """Whether kernels support the direct form (a head's features at a time), but not the Gram form (all of x's).

        If no kernel supports either, both are made of torch's matrix products, and the costs decide.
        """
        C, inner = functional.head_dims(o.x, o.proj_weight)
        return not self._served(o, C, None) and (
            dispatch.asked(self.backend) != "auto" or self._served(o, inner // o.temperature.numel(), self.fused_norm())
        )

    def fused_norm(self) -> str | None:
        """The norm of the direct form's xfa; None if that is composed of gram and channel_mix."""
        return self.spec.norm if self.group is None and self.dropout_p == 0 else None

    def _served(self, o: Operands, features: int, norm: str | None) -> bool:
        return dispatch.may_serve(self.backend, o.x.device.type, (o.x.dtype,), (features,), norm)

    def costs(self, o: Operands) -> tuple[cost.Cost, cost.Cost, str]:
        """The costs of the Gram form and the direct form, and the source of the figures."""
        shape, (machine, source) = self._shape(o), self._machine(o)
        if self._timed_at(o) and (faster := calibration.answer(shape, o.x.dtype)):
            source += f"; both forms were timed for this shape, and {faster} was faster"
        return cost.gram(shape, machine), cost.direct(shape, machine), source

    def _machine(self, o: Operands) -> tuple[cost.Machine, str]:
        if self._timed_at(o):
            return calibration.machine(o.x.device.type, o.x.dtype)
        return cost.built_in(o.x.device.type), "built-in"

    def _timed_at(self, o: Operands) -> bool:
        """Whether measured figures apply to the call. They do not with a group, whose ranks must all choose alike."""
        return o.x.is_cpu and self.group is None and self.backend in ("auto", "cpp")

    def _may_time(self, o: Operands) -> bool:
        """Whether nothing (a mode, transform or profiler) observes the call, so that extra computation is safe."""
        return ops.plain(*o) and not internals.profiler_is_on() and dispatch.asked(self.backend) in ("auto", "cpp")

    def _shape(self, o: Operands, tokens: int | None = None) -> cost.Shape:
        """The shape for the cost model; `tokens` overrides the number of tokens."""
        O, I = o.proj_weight.shape  # noqa: E741
        B, N, C = o.x.shape
        N = N if tokens is None else tokens
        training = ops.wants_grad(*o)
        layer_norm = o.ln_weight is not None
        return cost.Shape(B, N, C, o.temperature.numel(), I, O, o.x.element_size(), training, layer_norm, self.kernels)

    def choose(self, o: Operands, tokens: int | None = None, run: tuple[Any, ...] | None = None) -> str:
        """The form. `tokens` overrides the number of tokens. `run`: a function as :func:`checked` and its block
        arguments, with which both forms may be timed; None: nothing is timed."""
        form = self.fixed_form(o)
        return self.cheaper_form(o, tokens, run) if form == "auto" else form

    def fixed_form(self, o: Operands) -> str:
        """The form, if it does not depend on the costs; otherwise "auto"."""
        if self.form != "auto":
            return "direct" if self.always_direct(o) else self.form
        return "direct" if self.against_gram(o) else "auto"

    def cheaper_form(self, o: Operands, tokens: int | None = None, run: tuple[Any, ...] | None = None) -> str:
        """The form with the lower cost; the arguments of :meth:`choose`."""
        shape = self._shape(o, tokens)
        if not self._timed_at(o):
            machine = cost.built_in(o.x.device.type)
            return cost.cheaper(shape, machine) if torch.compiler.is_compiling() else cost.cached(shape, machine)
        if torch.compiler.is_compiling():
            return cost.cheaper(shape, cost.Machine(*calibration.constant(o.x.device.type, o.x.dtype)))
        found = calibration.decided(shape, o.x.dtype)
        if found is None:
            seconds = None
            if run is not None and self._may_time(o):
                compute, *block = run
                seconds = partial(timing.seconds, compute, self, o, tuple(block))
            found = calibration.decide(shape, o.x.dtype, seconds)
        return found
