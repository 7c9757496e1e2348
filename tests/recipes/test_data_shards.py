"""Tar shards: samples are evaluated once, all processes get the same number of batches, errors are one sentence."""

from __future__ import annotations

import io
import logging
import tarfile
from collections import Counter

import pytest
import torch
from data_cases import (
    CLASSES,
    broken_images,
    evaluated,
    image_bytes,
    make_shards,
    numbers_of,
    opened,
    sample_files,
    write_info,
    write_tar,
)

from xformer.errors import UsageError
from xformer.recipes.data.shards import number_of_lanes

pytest.importorskip("timm")
pytest.importorskip("webdataset")


def refused(data, *words, **settings):
    with pytest.raises(UsageError) as caught:
        opened(data, **settings)
    told(caught, *words)


def told(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and ". " not in message
    for word in words:
        assert str(word) in message, message


def trained(data, epoch=0):
    return [number for images, _ in data.train(epoch) for number in numbers_of(images, data)]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5])
def test_two_processes_with_two_workers_each(tmp_path, shards):
    make_shards(tmp_path, shards)
    ranks = [opened(tmp_path, rank, 2, workers=2) for rank in range(2)]
    assert sorted(number for rank in ranks for number in evaluated(rank)) == list(range(500, 513))
    for epoch in (0, 1):
        seen = [trained(rank, epoch) for rank in ranks]
        assert [len(numbers) for numbers in seen] == [12, 12] == [rank.batches_per_epoch * 4 for rank in ranks]
        assert len({*seen[0], *seen[1]}) == 24


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("val_shards", [1, 3])
def test_evaluation_sees_each_sample_once(tmp_path, world, val_shards):
    make_shards(tmp_path, val_shards=val_shards)
    seen = [number for rank in range(world) for number in evaluated(opened(tmp_path, rank, world))]
    assert sorted(seen) == list(range(500, 513))


def test_labels_and_numbers(tmp_path):
    data = opened(make_shards(tmp_path))
    assert (data.train_images, data.eval_images, data.classes) == (30, 13, ["0", "1", "2"])
    for images, labels in data.train(0):
        assert [number % 3 for number in numbers_of(images, data)] == labels.tolist()


def test_many_shards_make_lanes(tmp_path):
    make_shards(tmp_path, shards=40, train=160)
    alone = opened(tmp_path, batch_size=8)
    assert number_of_lanes(8, 40) == 4
    seen = trained(alone)
    assert sorted(seen) == list(range(160))
    ranks = [opened(tmp_path, rank, 2) for rank in range(2)]
    for pair, (images, labels) in zip(
        zip(*(rank.train(1) for rank in ranks), strict=True), alone.train(1), strict=True
    ):
        assert torch.equal(torch.cat([part[0] for part in pair]), images)
        assert torch.equal(torch.cat([part[1] for part in pair]), labels)


def test_lanes_that_end_early_start_again(tmp_path):
    make_shards(tmp_path, shards=16, train=150)
    seen = trained(opened(tmp_path, batch_size=10))
    counts = Counter(seen)
    assert number_of_lanes(10, 16) == 2 and len(seen) == 150
    assert max(counts.values()) == 2 and len(counts) > 140


@pytest.mark.parametrize("together, shards, lanes", [(1024, 1024, 64), (4096, 12, 1), (96, 300, 32), (7, 1000, 7)])
def test_number_of_lanes(together, shards, lanes):
    assert number_of_lanes(together, shards) == lanes


def test_sizes_that_are_said_are_not_counted(tmp_path, monkeypatch):
    make_shards(tmp_path, 2)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    monkeypatch.setattr("xformer.recipes.data.tars.count_samples", None)
    names = str(tmp_path / "names.txt")
    data = opened(tmp_path, classes=names, train_samples=20, eval_samples=9)
    assert (data.train_images, data.eval_images, data.classes) == (20, 9, list(CLASSES))
    lengths = {f"small-{part}-{n:04d}.tar": size for part, size in (("train", 15), ("val", 6)) for n in range(2)}
    write_info(tmp_path, lengths)
    data = opened(tmp_path, classes=names)
    assert (data.train_images, data.eval_images) == (30, 12)
    (tmp_path / "_info.json").write_text('{"splits": 3}')
    refused(tmp_path, "_info.json", classes=names)


def test_shards_by_pattern(tmp_path):
    make_shards(tmp_path, 3)
    pattern = {"train_shards": "small-train-{0000..0001}.tar", "eval_shards": str(tmp_path / "*val-*[02].tar")}
    data = opened(tmp_path, **pattern)
    assert (data.train_images, data.eval_images) == (20, 9)
    path = str(tmp_path / "small-train-{0000..0002}.tar")
    assert opened(path, eval_shards=str(tmp_path / "small-val-0000.tar")).train_images == 30
    data = opened("pipe:cat " + path, eval_shards=f"pipe:cat {tmp_path}/small-val-0000.tar", train_samples=30,
                  eval_samples=5, classes=str(_names(tmp_path)))  # fmt: skip
    assert len(trained(data)) == 28 and len(evaluated(data)) == 5


def _names(root):
    (root / "names.txt").write_text("\n".join(CLASSES))
    return root / "names.txt"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_unreadable_images_are_replaced_named_and_counted(tmp_path, workers, batch_size, caplog):
    make_shards(tmp_path, 2)
    broken = list(broken_images().values())
    write_tar(tmp_path / "b-train.tar", {f"bad{n}": sample_files(0, 0, content) for n, content in enumerate(broken)})
    write_tar(tmp_path / "b-val.tar", {"bad": sample_files(0, 0, b""), "good": sample_files(700, 1)})
    data, again = opened(tmp_path, workers=workers, batch_size=batch_size), opened(tmp_path, batch_size=batch_size)
    with caplog.at_level(logging.WARNING, "xformer.recipes.data"):
        for epoch in range(2):
            for (images, _), (others, _) in zip(data.train(epoch), again.train(epoch), strict=True):
                assert len(images) == batch_size
                assert torch.equal(images, others)
                assert set(numbers_of(images, data)) <= set(range(30))
    assert data.skipped.names and all("b-train.tar/bad" in name for name in data.skipped.names)
    assert sorted(evaluated(data)) == [*range(500, 513), 700]
    assert data.eval_images == 15 and f"{tmp_path}/b-val.tar/bad" in data.skipped.names
    assert len([r for r in caplog.records if "bad1" in r.getMessage()]) <= 2


def test_shards_that_are_cut_off_or_none(tmp_path):
    make_shards(tmp_path, 3)
    whole = (tmp_path / "small-train-0001.tar").read_bytes()
    (tmp_path / "small-train-0001.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (tmp_path / "small-train-0002.tar").write_bytes(b"this is no tar")
    data = opened(tmp_path, train_samples=30, classes=str(_names(tmp_path)))
    batches = list(data.train(0))
    assert len(batches) == 7 and all(len(images) == 4 for images, _ in batches)
    assert data.skipped.count == 0 and data.skipped.said() == ", 2 shards damaged"
    cut, none = (data.skipped.damaged[f"{tmp_path}/small-train-000{n}.tar"] for n in (1, 2))
    assert "after 7 samples: it is cut off" in cut and "after 0 samples, and what comes behind is lost" in none
    (tmp_path / "small-train-0001.tar").write_bytes(whole[: len(whole) // 2 - 600])  # cut within the content of a file
    data = opened(tmp_path, train_samples=30, classes=str(_names(tmp_path)))
    assert len(list(data.train(0))) == 7 and data.skipped.said() == ", 2 shards damaged"


def test_samples_that_lack_a_file(tmp_path):
    make_shards(tmp_path, 1)
    write_tar(
        tmp_path / "x-val.tar",
        {"a": {"png": image_bytes(1)}, "b": {"cls": b"1"}, "c": {**sample_files(700, 0), "json": b"{}"}},
    )
    data = opened(tmp_path)
    assert data.eval_images == 14 and 700 in evaluated(data)
    assert data.skipped.reasons == {
        f"{tmp_path}/x-val.tar/a": "has no label (.cls): it has png",
        f"{tmp_path}/x-val.tar/b": "has no image: it has cls",
    }


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def shards_of(root, members):
    """Writes the same members for training and evaluation."""
    for part in ("train", "val"):
        write_members(root / f"x-{part}.tar", members)
    return root


@pytest.mark.parametrize("image, label", [
    ("{}.PNG", "{}.CLS"), ("{}.input.png", "{}.cls"), ("deep/{}.png", "deep/{}.cls"), ("a.{}.png", "a.{}.cls"),
    ("n1.{}.Image.Png", "n1.{}.Image.Cls"), ("{}.png", "{}.target.cls"),
])  # fmt: skip
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_names_of_members_in_other_styles(tmp_path, image, label, bom):
    members = []
    for number in range(8):
        members += [(image.format(number), image_bytes(number)), (label.format(number), bom + f"{number % 2}".encode())]
    data = opened(shards_of(tmp_path, members))
    assert (data.train_images, data.eval_images, data.classes) == (8, 8, ["0", "1"])
    assert sorted(evaluated(data)) == list(range(8)) and not data.skipped.count
    for images, labels in data.train(0):
        assert [number % 2 for number in numbers_of(images, data)] == labels.tolist()


@pytest.mark.parametrize("members, words", [
    ([(f"{n}.png", image_bytes(n)) for n in range(4)] + [(f"{n}.cls", b"1") for n in range(4)],
     ["must follow each other", "x-train.tar/0 are apart"]),
    ([(f"{n}.{e}", c) for n in range(4) for e, c in (("png", image_bytes(n)), ("json", b'{"label": 1}'))],
     ["none of 1 shards has images with labels", "x-train.tar/0 has no label (.cls)", "it has json, png"]),
    ([(f"{n}.{e}", b"1") for n in range(4) for e in ("heic", "cls")], ["has no image", "it has cls, heic"]),
], ids=["apart", "json", "no images"])  # fmt: skip
def test_what_is_no_sample_is_told(tmp_path, members, words):
    shards_of(tmp_path, members)
    refused(tmp_path, *words)
    data = opened(tmp_path, train_samples=4, eval_samples=4, classes=str(_names(tmp_path)), workers=1)
    with pytest.raises(UsageError) as caught:
        next(data.train(0))
    told(caught, *words)


@pytest.mark.parametrize("content", ['{"x-train.tar": "many"}', '{"x-train.tar": 1.5}', "[1]", "text", '"text"'])
def test_sizes_that_are_none_are_named(tmp_path, content):
    shards_of(tmp_path, [("a.png", image_bytes(1)), ("a.cls", b"0")])
    (tmp_path / "sizes.json").write_text(content)
    refused(tmp_path, "sizes.json", tmp_path)


def test_nothing_readable_ends_in_a_sentence(tmp_path):
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", {f"{n}": sample_files(n, n % 2, b"text") for n in range(40)})
    data = opened(tmp_path, workers=1)
    with pytest.raises(UsageError) as caught:
        next(data.train(0))
    told(caught, "can be read", "train.tar")
    with pytest.raises(UsageError) as caught:
        next(data.evaluate())
    told(caught, "none of the 40 images can be read")
    for part in ("train", "val"):
        (tmp_path / f"{part}.tar").write_bytes(b"none")
    data = opened(tmp_path, train_samples=9, eval_samples=9, classes=str(_names(tmp_path)))
    with pytest.raises(UsageError) as caught:
        next(data.train(0))
    told(caught, "images with labels", "train.tar")


def test_wrong_labels(tmp_path):
    make_shards(tmp_path, 1)
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    two = str(tmp_path / "two.txt")
    refused(tmp_path, "two.txt", "3 classes", "got 2", classes=two)
    data = opened(tmp_path, classes=two, train_samples=30, workers=1)
    with pytest.raises(UsageError) as caught:
        list(data.train(0))
    told(caught, "below 2", "got 2", "small-train-0000.tar/00")
    write_tar(tmp_path / "x-train.tar", {"odd": {"png": image_bytes(1), "cls": b"cat"}})
    refused(tmp_path, "'cat'", "x-train.tar/odd")


def test_mistakes(tmp_path):
    make_shards(tmp_path, 1)
    refused(tmp_path, "train_shards", "x-0.tar", train_shards="x-{0..1}.tar")
    refused(tmp_path, "eval_shards", "nothing.tar", eval_shards="nothing.tar")
    refused(tmp_path, "batch_size", "30 training images", batch_size=31)
    remote = "https://example.invalid/{}-{{0..3}}.tar"
    shards = {"train_shards": remote.format("train"), "eval_shards": remote.format("val")}
    refused("", "train_samples", "train-0.tar", **shards)
    refused("", "classes", "train-0.tar", **shards, train_samples=9, eval_samples=9)
    refused("", "eval_samples", "val-0.tar", **shards, train_samples=9, classes=str(_names(tmp_path)))
    (tmp_path / "small-val-0000.tar").unlink()
    refused(tmp_path, "eval_shards", "*val*.tar")
