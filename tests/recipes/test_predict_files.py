"""Which images predict reads, how it names its pictures, and that it replaces only its own pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("torchvision", reason="torchvision is not installed")

from xformer import __main__ as command
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.pictures import find_images, is_picture, picture_paths, write_picture
from xformer.recipes.weights import build_model, save_weights


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


def test_folders(here):
    """Folders give their images, also in subfolders, sorted, by the extensions of training, without hidden files."""
    put("p/b.JPG", "p/a.png", "p/in/deep/c.avif", "p/in/d.tiff", "p/z.jfif")
    put("p/notes.txt", "p/none", "p/.hidden.png", "p/.git/e.png", "p/__MACOSX/f.png", "p/@eaDir/g.png", "q/h.webp")
    Path("p/in/up").symlink_to(here / "p")
    Path("p/beside").symlink_to(here / "q")
    Path("link").symlink_to(here / "p")
    expected = ["p/a.png", "p/b.JPG", "p/beside/h.webp", "p/in/d.tiff", "p/in/deep/c.avif", "p/z.jfif"]
    assert sorted(find_images(["p"])) == expected
    assert find_images(["p/"]) == find_images(["p"]) == find_images(["p", "p/a.png", "link", "p/in", "./p/../p"])
    assert find_images([str(here / "p")]) == [str(here / path) for path in find_images(["p"])]
    assert find_images(["link/in"]) == ["link/in/d.tiff", "link/in/deep/c.avif", *find_images(["link/in"])[2:]]
    os.chdir("p/in")
    for folder in (".", ".."):
        assert {os.path.realpath(path) for path in find_images([folder])} >= {str(here / "p/in/d.tiff")}
    assert find_images(["deep", "../b.JPG", "../a.png"]) == ["deep/c.avif", "../b.JPG", "../a.png"]


def test_patterns(here):
    put("p/b.jpg", "p/a.png", "p/c.txt", "p/day1/d.gif", "p/day2/e.bmp", "p/f.jp2", "p/.g.jpg", "p/@eaDir/b.jpg")
    put("p/day3/none.txt", "odd[1].jpg", "odd1.jpg")
    assert find_images(["p/*.jpg"]) == ["p/b.jpg"]
    assert find_images(["p/?.*"]) == ["p/a.png", "p/b.jpg"]
    assert find_images(["p/*.jp2"]) == ["p/f.jp2"]
    assert find_images(["p/day*"]) == find_images(["p/*/?.???"]) == ["p/day1/d.gif", "p/day2/e.bmp"]
    assert find_images(["p/**/*.jpg"]) == ["p/b.jpg"]
    assert find_images(["p/**"]) == ["p/a.png", "p/b.jpg", "p/day1/d.gif", "p/day2/e.bmp"]
    assert find_images(["p/b.jpg", "p/*"]) == ["p/b.jpg", "p/a.png", "p/day1/d.gif", "p/day2/e.bmp"]
    assert find_images(["odd[1].jpg"]) == ["odd[1].jpg"]
    assert find_images(["od[d]1.jpg"]) == ["odd1.jpg"]


def test_files(here):
    """Named files are used once, with any extension. Missing files are kept, and reported later one by one."""
    put("a.jpg", "b.data")
    Path("a2.jpg").symlink_to("a.jpg")
    assert find_images(["a.jpg", "gone.jpg", "b.data", "./a.jpg", str(here / "a.jpg"), "a2.jpg", "gone.jpg"]) == [
        "a.jpg", "gone.jpg", "b.data", "a2.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("empty", "images: there are no images in the folder empty, nor in folders within"),
        ("texts", "images: there are no images in the folder texts, nor in folders within"),
        ("*.jpg", "images: the pattern *.jpg matches no images"),
        ("texts/*", "images: the pattern texts/* matches no images"),
        ("em*", "images: the pattern em* matches no images"),
        ("", "images must be files, folders or patterns such as 'photos/*.jpg', got ''"),
    ],
)
def test_nothing_there(here, argument, said, capsys):
    put("texts/a.txt", "texts/.b.png", "a.png")
    Path("empty").mkdir()
    with pytest.raises(UsageError) as error:
        find_images(["a.png", argument])
    assert str(error.value) == said
    assert command.main(["predict", argument, "--weights", "gone"]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_own_pictures_are_no_images_of_folders(here):
    """Folders skip pictures that predict wrote, also with a colour profile, which PNG stores before its texts."""
    image = Image.new("RGB", (4, 3))
    for profile in (None, b"profile"):
        image.info["icc_profile"] = profile
        write_picture(here / "a.png", image)
        assert is_picture("a.png")
        write_picture(here / "a.png", image)
    image.save("b.png")
    assert not is_picture("b.png") and not is_picture("gone") and not is_picture(here)
    assert find_images(["."]) == ["./b.png"] and find_images(["*.png"]) == ["b.png"]
    assert find_images(["a.png"]) == ["a.png"]
    for content in (b"", b"\x89PNG\r\n\x1a\n", (here / "a.png").read_bytes()[:60], b"\x89PNG\r\n\x1a\n" + b"\xff" * 99):
        (here / "cut.png").write_bytes(content)
        assert not is_picture("cut.png")
    with pytest.raises(UsageError, match=r"out: .*b\.png is there and was not written by predict"):
        write_picture(here / "b.png", image)


@pytest.mark.parametrize(
    ("images", "pictures"),
    [
        ([], []),
        (["x/y/a.jpg"], ["a.png"]),
        (["x/a.jpg", "x/b.tar.png"], ["a.png", "b.tar.png"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a.png", "y/a.png"]),
        (["x/a.jpg", "x/y/a.jpg", "x/y/b.jpg"], ["a.png", "y/a.png", "y/b.png"]),
        (["a.jpg", "a.png", "b.png"], ["a.jpg.png", "a.png.png", "b.png"]),
        (["a.jpg", "a.png", "a.jpg.gif"], ["a.jpg.png", "a.png.png", "a.jpg.gif.png"]),
        (["a.jpg", "a", "a."], ["a.jpg.png", "a.png", "a..png"]),
        (["a.jpg", "a.png/b.jpg"], ["a.jpg.png", "a.png/b.png"]),
        (["../a.jpg", "./b.jpg"], ["a.png", "here/b.png"]),
    ],
    ids=str,
)
def test_names_of_pictures(images, pictures, here):
    Path("here").mkdir()
    os.chdir("here")
    found = [str(path.relative_to("out")) for path in picture_paths("out", images)]
    if images == ["a.jpg", "a", "a."]:  # one has no extension: only check that the names differ
        assert len(set(found)) == 3
    else:
        assert found == pictures


PARTS = st.sampled_from(["a", "b", "a.jpg", "a.png", "a.jpg.png", "b.png", ".png", "a.png.png"])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), unique=True, max_size=8))
def test_no_two_pictures_have_one_name(images):
    pictures = picture_paths("out", images)
    assert len(set(pictures)) == len(images)
    assert all(path.parts[0] == "out" and path.suffix == ".png" for path in pictures)


@pytest.fixture
def predicted(here, capsys):
    """Runs the command with a segmenter: exit code, stderr and results."""
    card = Card("xformer_xxs", 2, "segment", {"width": 32}, image_size=32, classes=["sky", "sea"])
    torch.manual_seed(0)
    save_weights(here / "w.safetensors", build_model(card).state_dict(), card)

    def run(*arguments):
        code = command.main(["predict", *arguments, "--weights", "w.safetensors", "--json", "j.json"])
        return code, capsys.readouterr().err, json.loads(Path("j.json").read_text()) if code < 2 else []

    return run


def test_images_of_one_name_are_all_drawn(predicted):
    images = ["p/x/a.jpg", "p/y/a.jpg", "p/y/a.png", "p/b.png"]
    for number, image in enumerate(images):
        Path(image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 10)).save(image)
    before = {image: Path(image).read_bytes() for image in images}
    expected = {"p/b.png": "b.png", "p/x/a.jpg": "x/a.png", "p/y/a.jpg": "y/a.jpg.png", "p/y/a.png": "y/a.png.png"}
    for arguments in (("p",), ("p/**",), images, ("p/x", "p/y/*", "p/b.png", "p/b.png")):
        code, err, results = predicted(*arguments)
        assert (code, err) == (0, "")
        assert {r["image"]: r["picture"] for r in results} == {a: f"predictions/{b}" for a, b in expected.items()}
        for result in results:
            assert is_picture(result["picture"])
            with Image.open(result["picture"]) as drawn:
                assert drawn.width >= result["width"] == 20 + images.index(result["image"])
    assert {image: Path(image).read_bytes() for image in images} == before


def test_pictures_beside_the_images(predicted):
    """Pictures written beside the images are replaced by the next run, and not used as images. Other files stay."""
    Path("p/in").mkdir(parents=True)
    for image in ("p/a.jpg", "p/in/b.jpg"):
        Image.new("RGB", (20, 10)).save(image)
    for _ in range(2):
        code, err, results = predicted("p", "--out", "p")
        assert (code, err) == (0, "")
        assert [r["picture"] for r in results] == ["p/a.png", "p/in/b.png"]
    code, err, _ = predicted("p/a.png", "--out", "p")
    assert (code, err) == (2, "error: out: the picture of p/a.png would replace p/a.png: name another folder\n")
    Image.new("RGB", (9, 9)).save("p/in/b.png")
    mine = Path("p/in/b.png").read_bytes()
    code, err, _ = predicted("p/in/b.jpg", "--out", "p/in")
    assert code == 2 and err.startswith("error: out: p/in/b.png is there and was not written by predict: remove it")
    assert Path("p/in/b.png").read_bytes() == mine
    ask = ["predict", "p/a.jpg", "--weights", "w.safetensors", "--out", "p"]
    for number, read in enumerate(("p/a.jpg", "w.safetensors", "names.txt")):
        Path("names.txt").write_text("sky\nsea\n")
        before = Path(read).read_bytes()
        assert command.main([*ask, "--labels", "names.txt", "--json", read]) == 2, number
        assert Path(read).read_bytes() == before
    Path("names.txt").rename("p/a.png")
    assert command.main([*ask, "--labels", "p/a.png"]) == 2
    assert Path("p/a.png").read_text() == "sky\nsea\n"
