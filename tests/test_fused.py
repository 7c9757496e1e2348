"""Fused modules: what they keep of parameters is never out of date, and what kernels cannot do is computed plainly."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random

import pytest
import torch
from model_cases import all_called, as_trained, kernels_called
from torch import nn

import xformer
from xformer import fuse_for_inference
from xformer.attention import XFAHalf
from xformer.fused import swap
from xformer.fused.layers import Fused
from xformer.layers import ConvNorm, MBConv, Mlp, Pointwise, XFBlock
from xformer_kernels import XFABlock, dispatch, inference
from xformer_kernels.backends.program import Recorder
from xformer_kernels.layer import calibration, timing


def images(*size):
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


LAYERS = {
    "Linear": (lambda: nn.Linear(16, 20), lambda: torch.randn(3, 16)),
    "Pointwise": (lambda: Pointwise(16, 20), lambda: images(2, 16, 7, 9)),
    "1x1": (lambda: ConvNorm(16, 20), lambda: images(2, 16, 7, 9)),
    "depthwise": (lambda: ConvNorm(16, 16, 5, 2, groups=16), lambda: images(2, 16, 7, 9)),
    "dense": (lambda: ConvNorm(3, 16, 3, 2), lambda: images(2, 3, 16, 9)),
    "MBConv": (lambda: MBConv(16, 16, 3), lambda: images(2, 16, 7, 9)),
    "MBConv with se": (lambda: MBConv(16, 24, 3, 5, 2, se=True), lambda: images(2, 16, 7, 9)),
    "Mlp": (lambda: Mlp(24), lambda: torch.randn(2, 9, 24)),
    "XFABlock": (lambda: XFABlock(64, 2, qkv_bias=True), lambda: torch.randn(2, 40, 64)),
    "XFAHalf": (lambda: XFAHalf(64, 2, activation="identity"), lambda: torch.randn(2, 40, 64)),
    "XFBlock": (lambda: XFBlock(16, 64, lambda dim, p: XFAHalf(dim, 2, drop_path=p)), lambda: images(2, 16, 7, 9)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A folded layer, the fused one with the same numbers, and an input."""
    torch.manual_seed(0)
    make, inputs = LAYERS[request.param]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    plain = fuse_for_inference(layer, kernels=False)
    return plain, fuse_for_inference(layer), inputs()


def check(fused, plain, x):
    with torch.no_grad():
        y, expected = fused(x), plain(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_one_module_takes_the_place_of_a_layer(case, need_backend, monkeypatch):
    need_backend("cpp")
    plain, fused, x = case
    assert isinstance(fused, Fused) and isinstance(fused, type(plain)) and type(plain) in swap.FUSED
    assert list(fused.state_dict()) == list(plain.state_dict())
    check(fused, plain, x)
    if inference.KERNELS is not None and fused.kernels:
        assert (called := kernels_called(monkeypatch, fused, x))
        # a weight is packed again when it has changed, alone
        assert all_called(monkeypatch, fused, x) == called
        with torch.no_grad():
            next(t for name, t in fused.named_parameters() if name.endswith("weight") and t.dim() > 1).mul_(2)
        assert all_called(monkeypatch, fused, x).count("pack_linear") == ("depthwise" not in called[:1])
    assert type(fuse_for_inference(fused, kernels=False)) is type(plain)


def test_weights_that_are_changed_in_place(case):
    plain, fused, x = case
    for _ in range(2):
        check(fused, plain, x)
        with torch.no_grad():
            for own, others in zip(fused.parameters(), plain.parameters(), strict=True):
                own.mul_(1.1)
                others.copy_(own)


def test_weights_that_are_loaded(case):
    plain, fused, x = case
    for assign in (False, True, True):
        check(fused, plain, x)
        state = {name: t + 0.1 * torch.randn_like(t) for name, t in plain.state_dict().items()}
        plain.load_state_dict(state)
        fused.load_state_dict(state, assign=assign)
    check(fused, plain, x)


def test_weights_of_other_dtypes(case):
    plain, fused, x = case
    check(fused, plain, x)
    check(fused.double(), plain.double(), x.double())
    # rounded to bfloat16, in what may be the memory of the weights before
    for _ in range(3):
        check(fused.bfloat16().float(), plain.bfloat16().float(), x)
        with torch.no_grad():
            for own, others in zip(fused.parameters(), plain.parameters(), strict=True):
                others.copy_(own.mul_(1.01))
        check(fused, plain, x)
    fused.bfloat16()
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError)):
        fused(x)


def test_plain_results_in_bfloat16_and_with_gradients(case):
    plain, fused, x = case
    torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    fused(x).square().sum().backward()
    plain(x).square().sum().backward()
    for own, others in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, others.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    fused, plain, x = fused.bfloat16(), plain.bfloat16(), x.bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)


def test_copies_and_files(case):
    plain, fused, x = case
    check(fused, plain, x)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    check(fused, plain, x)
    check(other, copy.deepcopy(plain).apply(lambda m: [p.data.zero_() for p in m.parameters(recurse=False)]), x)
    check(pickle.loads(pickle.dumps(fused)), plain, x)
    file = io.BytesIO()
    torch.save(fused, file)
    assert len(file.getvalue()) < sum(t.nbytes for t in fused.state_dict().values()) + 40_000
    file.seek(0)
    check(torch.load(file, weights_only=False), plain, x)


def test_inputs_that_kernels_cannot_read(case):
    plain, fused, x = case
    strided = torch.randn(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    check(fused, plain, strided.copy_(x))
    check(fused, plain, x[:0])
    if x.dim() == 4:
        check(fused, plain, x.contiguous())
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        fused(torch.randn(2, 5, 5, 5) if x.dim() == 4 else torch.randn(2, 9, 5))


def test_a_stage_is_one_call(need_backend, monkeypatch):
    need_backend("cpp")
    if inference.KERNELS is None:
        pytest.skip(f"the kernels serve at the instruction levels {inference.LEVELS}")
    model = fuse_for_inference(xformer.xformer_xxs())
    calls, run = [], inference.KERNELS.run
    monkeypatch.setattr(inference.KERNELS, "run", lambda program, x: (calls.append(program), run(program, x))[1])
    with torch.no_grad(), dispatch.record() as ran:
        for size, programs in ((64, 4), (96, 8), (64, 8)):
            model(torch.randn(2, 3, size, size))
            assert len({id(program) for program in calls}) == programs
    assert len(calls) == 3 * len(model.stages) and ran == [("cpp", "xfa_forward")] * 3 * 7
    # of a large image the workspace is large, and the kernels are called one by one
    calls.clear()
    with torch.no_grad():
        model.stages[0](images(8, 16, 256, 256))
    assert calls == []


def test_buffers_of_a_program_lie_beside_each_other_while_they_are_needed():
    numbers = random.Random(0)
    for _ in range(50):
        recorder = Recorder()
        values = [recorder.new((numbers.randint(1, 100),)) for _ in range(4)]
        for _ in range(20):
            values.append(recorder.new((numbers.randint(1, 100),)))
            recorder.step("step", *numbers.sample(values[-6:-1], 2), values[-1])
        placed = (values[0].buffer, values[-1].buffer)
        offsets, size = recorder.offsets(placed)
        assert set(offsets) == set(recorder.first) - set(placed)
        ends = {b: offsets[b] + recorder.sizes[b] for b in offsets}
        assert size == max(ends.values()) and size < sum(recorder.sizes)
        for a, b in itertools.combinations(offsets, 2):
            together = recorder.first[a] <= recorder.last[b] and recorder.first[b] <= recorder.last[a]
            assert not together or ends[a] <= offsets[b] or ends[b] <= offsets[a]


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_close_choice_of_form_is_timed(form, mode, tmp_path, need_backend, monkeypatch):
    need_backend("cpp")
    if inference.KERNELS is None:
        pytest.skip(f"the kernels serve at the instruction levels {inference.LEVELS}")
    timed = {}

    def faster(seconds, _):
        timed.update((each, seconds(each)) for each in timing.FORMS)
        return form

    monkeypatch.setenv(calibration.ENVIRONMENT, str(tmp_path / "figures.json"))
    monkeypatch.setattr(timing, "measure", lambda _: None)
    monkeypatch.setattr(timing, "faster", faster)
    calibration.forget()
    plain = XFABlock(192, 6, qkv_bias=True).eval()
    fused, x = fuse_for_inference(plain), torch.randn(1, 3000, 192)
    with mode(), dispatch.record() as ran:
        y = fused(x)
    calibration.forget()
    assert min(timed.values()) > 0 and {"gram": "layer_forward", "direct": "xfa_forward"}[form] == ran[-1][1]
    with torch.no_grad():
        torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)


def test_other_defaults_of_dtype_and_device(tmp_path, need_backend, monkeypatch):
    """Neither moves what is timed."""
    need_backend("cpp")
    monkeypatch.setenv(calibration.ENVIRONMENT, str(tmp_path / "figures.json"))
    monkeypatch.setattr(timing, "measure", lambda _: None)
    monkeypatch.setattr(timing, "faster", lambda seconds, _: min(timing.FORMS, key=seconds))
    calibration.forget()
    plain = XFABlock(192, 6).eval()
    fused, x = fuse_for_inference(plain), torch.randn(1, 3000, 192)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"):
            y = fused(x)
    finally:
        torch.set_default_dtype(torch.float32)
        calibration.forget()
    check(lambda _: y, plain, x)


def test_in_inference_mode():
    """Of a model that is made there, too, whose parameters have no version counters."""
    with torch.inference_mode():
        model = xformer.xformer_xxs(num_classes=10, zero_init_last=False).eval()
        x = torch.randn(1, 3, 64, 64)
        fused = fuse_for_inference(model)
        for _ in range(2):
            check(fused, model, x)
            for each in (model, fused):
                each.head_conv.conv.weight.mul_(2)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_traced(grad):
    """With the check of torch.jit.trace, which runs the model without gradients."""
    model = as_trained(xformer.xformer_xxs(num_classes=10, zero_init_last=False)).eval()
    fused, x = fuse_for_inference(model), torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        y = torch.jit.trace(fused, x)(x)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_compiled():
    model = as_trained(xformer.xformer_xxs(num_classes=10, zero_init_last=False)).eval()
    fused, x = fuse_for_inference(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = torch.compile(fused, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
