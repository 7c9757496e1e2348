"""Exported files compute the same as the model, and do not need this package where the documentation says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import xformer
from xformer import __main__ as command
from xformer.backbone import VARIANTS, Stage, Variant
from xformer.errors import UsageError
from xformer.recipes import export as exporting
from xformer.recipes.card import Card
from xformer.recipes.export import Differs, export, random_model
from xformer.recipes.preprocessing import Preprocessed
from xformer.recipes.weights import build_model, save_weights

CARD = Card("xformer_xxs", 5, image_size=32, classes=["ant", "bee", "cat", "døg", 'e"l'], mean=(0.4, 0.5, 0.6))
TINY = Variant((Stage(8, (2,), 3), Stage(8, (2,), 3, 32, 1, 1)), 16)
FOREIGN = """
import json, sys
import torch
sys.modules["xformer"] = sys.modules["xformer_kernels"] = None  # importing them fails
if sys.argv[1] == "pt2":
    run = torch.export.load(sys.argv[2]).module()
else:
    run = torch._inductor.aoti_load_package(sys.argv[2])
images, expected = torch.load(sys.argv[3])
with torch.no_grad():
    print(json.dumps([(run(x) - y).abs().max().item() / y.abs().max().item() for x, y in zip(images, expected)]))
"""


def trained(attention="xfa", variant=TINY, **options):
    """A model whose running statistics and affine parameters differ from their initial values."""
    torch.manual_seed(0)
    options = {"stage_strides": (2,) * len(variant.stages), "zero_init_last": False, **options}
    model = xformer.XFormer(variant, 5, attention=attention, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for _ in range(3):
            model(2 * torch.randn(8, 3, 32, 32) + 1)
    return model.eval()


def ops_of(program):
    return {
        str(node.target)
        for part in program.graph_module.modules()
        for node in part.graph.nodes
        if node.op == "call_function"
    }


def foreign(format, path, model, images, tmp_path):
    """Relative differences in a process that cannot import this package."""
    with torch.no_grad():
        torch.save((images, [model(x) for x in images]), tmp_path / "data.pt")
    call = [sys.executable, "-c", FOREIGN, format, str(path), str(tmp_path / "data.pt")]
    ran = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "attention",
    [
        name if name in ("xfa", "softmax") else pytest.param(name, marks=pytest.mark.nightly)
        for name in xformer.ATTENTION
    ],
)
def test_every_attention_as_pt2(attention, tmp_path):
    model = trained(attention, se=attention == "xfa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = export(model, CARD, tmp_path / "m.pt2")
    assert result.shape == ("batch", 3, 32, 32) and result.difference < 1e-5 * result.largest
    ops = ops_of(torch.export.load(result.path))
    assert not [op for op in ops if "xformer" in op or "mkldnn" in op or "batch_norm" in op]
    assert "aten.linear.default" in ops
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_pt2_without_this_package(tmp_path):
    model = trained()
    export(model, CARD, tmp_path / "m.pt2", size="dynamic")
    images = [torch.randn(shape) for shape in ((1, 3, 32, 32), (7, 3, 32, 40), (2, 3, 33, 71))]
    assert max(foreign("pt2", tmp_path / "m.pt2", model, images, tmp_path)) < 1e-5


def test_pt2_with_fused_attention(tmp_path):
    model = trained()
    result = export(model, CARD, tmp_path / "m.pt2", ops="fused", fuse=False)
    assert result.difference < 1e-5 * result.largest
    ops = ops_of(torch.export.load(result.path))
    assert [op for op in ops if "xformer_kernels" in op] and [op for op in ops if "batch_norm" in op]
    with pytest.raises(UsageError, match="ops must be standard, or fused for pt2, got fused for onnx"):
        export(model, CARD, tmp_path / "m.onnx", ops="fused")


def test_fixed_batch_and_sides(tmp_path):
    result = export(trained(), CARD, tmp_path / "m.pt2", size=(24, 40), batch=1)
    assert result.shape == (1, 3, 24, 40)
    with pytest.raises(AssertionError, match="Guard failed"):
        torch.export.load(result.path).module()(torch.zeros(2, 3, 24, 40))


def test_feature_maps(tmp_path):
    torch.manual_seed(0)
    model = xformer.XFormerFeatures(TINY, stage_strides=(2, 2), zero_init_last=False).eval()
    result = export(model, CARD, tmp_path / "m.pt2")
    assert result.difference < 1e-5 * result.largest
    assert [y.shape for y in torch.export.load(result.path).module()(torch.zeros(4, 3, 32, 32))] == [
        (4, 8, 8, 8),
        (4, 8, 4, 4),
    ]


@pytest.mark.parametrize("attention", ["xfa", "xfa_key_value", "softmax"])
def test_onnx(attention, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(attention)
    name = "m.ONNX" if attention == "softmax" else "m.onnx"
    result = export(model, CARD, tmp_path / name, size="dynamic" if attention == "xfa" else 0)
    assert result.difference < 1e-5 * result.largest and result.format == "onnx"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    graph = onnx.load(result.path)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", exporting.OPSET)]
    assert not graph.functions and {node.domain for node in graph.graph.node} == {""}
    assert str(exporting.__file__) not in result.path.read_bytes().decode("latin1")
    session = runtime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == list(result.shape) and session.get_outputs()[0].name == "logits"
    card = json.loads(session.get_modelmeta().custom_metadata_map["xformer"])
    assert card["classes"] == CARD.classes and card["mean"] == [0.4, 0.5, 0.6]
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    (got,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["segment", "detect"])
def of_task(request, monkeypatch):
    """A small model of the task, which maps images to output maps, with its card."""
    stages = tuple(Stage(8, (2,), 3, *((32, 1, 1) if i == 3 else ())) for i in range(4))
    monkeypatch.setitem(VARIANTS, "xformer_xxs", Variant(stages, 16))
    options = {"segment": {"width": 16}, "detect": {"widths": [8, 16, 16]}}[request.param]
    card = replace(CARD, task=request.param, image_size=64, options=options)
    torch.manual_seed(0)
    model = build_model(card)
    with torch.no_grad():
        for _ in range(3):
            model(2 * torch.randn(4, 3, 64, 64) + 1)
    return model.eval(), card


NAMES = {"segment": ["logits"], "detect": ["map_stride_8", "map_stride_16", "map_stride_32"]}


def check_maps(got, model, x):
    with torch.no_grad():
        expected = tree_leaves(model(x))
    for y, wanted in zip(got, expected, strict=True):
        assert y.shape == wanted.shape
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.nightly
def test_maps_as_pt2(of_task, tmp_path, capsys):
    """Files exported by the command accept any size and use no ops of this package. Only terminals show progress."""
    model, card = of_task
    weights, to = tmp_path / "w.safetensors", tmp_path / "m.pt2"
    save_weights(weights, model.state_dict(), card)
    assert command.main(["export", "--weights", str(weights), "--to", str(to), "--size", "dynamic"]) == 0
    printed = capsys.readouterr()
    assert "images batch x 3 x height x width" in printed.out
    assert not [step for step in ("traced", "written", "compared") if f"{step} in " in printed.err]
    extra = {"xformer": ""}
    program = torch.export.load(to, extra_files=extra)
    assert not [op for op in ops_of(program) if "xformer" in op]
    run = program.module()
    said = json.loads(extra["xformer"])
    assert (said["task"], said["outputs"], said["options"]) == (card.task, NAMES[card.task], card.options)
    for shape in ((1, 3, 70, 33), (2, 3, 64, 64), (3, 3, 95, 161)):
        x = torch.randn(shape)
        check_maps(tree_leaves(run(x)), model, x)


def test_maps_as_onnx(of_task, tmp_path):
    """Files of a fixed batch and odd size give the maps of the model, also after decoding."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, card = of_task
    result = export(model, card, tmp_path / "m.onnx", size=(70, 33), batch=3)
    assert result.shape == (3, 3, 70, 33)
    session = runtime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == NAMES[card.task]
    x = torch.randn(3, 3, 70, 33)
    maps = [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]
    check_maps(maps, model, x)
    if card.task == "segment":
        from xformer.segmentation import upsample

        got, wanted = upsample(maps[0], 4, (70, 33)), model.whole_image(x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    else:
        from xformer.detection import detect

        found, expected = (detect(y, score=0.0, limit=20) for y in (maps, model(x)))
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got["scores"], wanted["scores"], rtol=1e-4, atol=1e-6)


@pytest.mark.nightly  # each file has to be compiled by the C++ compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("preprocessing", [True, False])
def test_aoti(preprocessing, tmp_path):
    model = trained(variant=Variant((Stage(8, (2,), 3, 32, 1, 1),), 16))
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        result = export(model, CARD, tmp_path / "m.pt2", "aoti", preprocessing=preprocessing)
    assert result.difference < 1e-5 * result.largest
    loaded = torch._inductor.aoti_load_package(str(result.path))
    assert json.loads(loaded.get_metadata()["xformer"])["classes"] == CARD.classes
    images = [torch.randn(1, 3, 32, 32), torch.randn(5, 3, 32, 32)]
    if preprocessing:
        model = Preprocessed(model, CARD)
        # resized along width first, along height first, and not resized
        sides = ((1, 45, 70), (2, 90, 31), (5, 32, 32))
        images = [torch.randint(0, 256, (*side, 3), dtype=torch.uint8) for side in sides]
    for x in images:
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert max(foreign("aoti", result.path, model, images, tmp_path)) < 1e-5


def test_aoti_without_a_compiler(tmp_path):
    without = torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",))
    with without, pytest.raises(UsageError, match=r"aoti needs a C\+\+ compiler"):
        export(trained(), CARD, tmp_path / "m.pt2", "aoti")
    assert not list(tmp_path.iterdir())


def test_card_of_pt2(tmp_path):
    export(trained(), CARD, tmp_path / "m.pt2", size=40)
    extra = {"xformer": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    said = json.loads(extra["xformer"])
    assert said["input"] == ["batch", 3, 40, 40] and said["image_size"] == 40 and said["classes"] == CARD.classes


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    (tmp_path / "m.pt2").write_text("the former one")
    monkeypatch.setitem(exporting.LOADERS, "pt2", lambda path: lambda images: [torch.full((len(images), 5), 9.0)])
    with pytest.raises(Differs, match="is not written"):
        export(trained(), CARD, tmp_path / "m.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "the former one"


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("m.onnx", {"format": "pt2"}, r"to must end with .pt2 for pt2, .*got .*m.onnx for pt2"),
        ("m.pth", {}, "to must end with .pt2 for pt2"),
        ("m.pt2", {"batch": 0}, "batch must be dynamic or 1 or more, got 0"),
        ("m.pt2", {"batch": "many"}, "batch must be dynamic or 1 or more, got many"),
        ("m.pt2", {"size": (1, 2, 3)}, "size must be dynamic, or one or two numbers"),
        ("m.pt2", {"size": "large"}, "size must be dynamic, or one or two numbers"),
        ("file/m.pt2", {}, "to must be a file in a folder"),
    ],
)
def test_mistakes(to, options, said, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=said) as error:
        export(trained("none"), CARD, tmp_path / to, **options)
    assert "\n" not in str(error.value)


def test_models_of_timm(tmp_path, capsys):
    pytest.importorskip("timm")
    to = str(tmp_path / "m.pt2")
    assert command.main(["export", "--model", "test_vit", "--num-classes", "7", "--to", to]) == 0
    printed = capsys.readouterr().out
    assert "test_vit with random weights" in printed and "batch x 3 x 160 x 160" in printed
    assert command.main(["export", "--model", "test_vit", "--size", "dynamic", "--to", to]) == 2
    assert "cannot be traced with batch and size dynamic: fix one of them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["xformer_xxs", "resnet18"])
def test_outputs_of_random_weights_depend_on_every_branch(name):
    """Otherwise the comparison of outputs would not see an error in one."""
    model, _ = random_model(Card(name, 5))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = model(x)
        for branch in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            weight = branch.weight.clone()
            branch.weight.mul_(2)
            assert not torch.equal(model(x), y)
            branch.weight.copy_(weight)


def test_command(tmp_path):
    model = xformer.xformer_xxs(num_classes=5, attention="none")
    weights, to = tmp_path / "w.safetensors", tmp_path / "new" / "m.pt2"
    save_weights(weights, model.state_dict(), replace(CARD, image_size=64, options={"attention": "none"}))
    call = [sys.executable, "-m", "xformer", "export", "--weights", str(weights), "--to", str(to)]
    ran = subprocess.run(call, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "m.pt2: pt2, images batch x 3 x 64 x 64" in ran.stdout and "largest difference to eager" in ran.stdout
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(to).module()(images), model.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_command_in_the_home_folder(tmp_path, monkeypatch, capsys):
    """Paths may start with ~ and have upper-case extensions. A terminal shows the steps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = xformer.xformer_xxs(num_classes=5, attention="none")
    save_weights(tmp_path / "w.safetensors", model.state_dict(), replace(CARD, options={"attention": "none"}))
    assert command.main(["export", "--weights", "~/w.safetensors", "--to", "~/new/m.PT2"]) == 0
    printed = capsys.readouterr()
    assert f"{tmp_path / 'new' / 'm.PT2'}: pt2" in printed.out
    said = [line.partition(" in ")[0] for line in printed.err.splitlines() if " in " in line and line.endswith(" s")]
    assert said == ["traced", "written", "compared"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.PT2"]
    assert torch.export.load(tmp_path / "new" / "m.PT2").module()(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_command_says_what_is_wrong(tmp_path, capsys):
    def said(*arguments):
        assert command.main(["export", "--to", str(tmp_path / "m.pt2"), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert said() == "error: weights: give a safetensors file, or --model for a model with random weights"
    assert said("--weights", "none.safetensors") == "error: weights: there is no file none.safetensors"
    assert "got 'no_such_model'" in said("--model", "no_such_model")
    assert "does not take these options" in said("--model", "xformer_xxs", "--model-options", "colour=red")
    weights = tmp_path / "w.safetensors"
    save_weights(weights, xformer.xformer_xs(num_classes=5).state_dict(), CARD)
    assert "is not of this model" in said("--weights", str(weights))
    assert "it is of xformer_xxs, and the model is xformer_s" in said("--weights", str(weights), "--model", "xformer_s")
    assert not (tmp_path / "m.pt2").exists()
