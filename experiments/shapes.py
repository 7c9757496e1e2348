"""Generate scenes of textured shapes in COCO's and Cityscapes' file layouts: ``python -m xformer make-shapes FOLDER``.

For data loaders, training and evaluation without downloads: hundreds of small images with exact labels. A class is
defined by outline, pattern and, as for objects in photographs, to some degree by colour; size, rotation, light and
brightness are independent of the class. Scenes have a sky, a road, buildings, noise and blur. The same seed gives the
same files.

    FOLDER/coco/annotations/instances_{train,val}2017.json   polygons; crowds as run lengths; images without objects
    FOLDER/coco/{train,val}2017/000000000001.jpg
    FOLDER/cityscapes/leftImg8bit/{train,val}/shapes/shapes_000001_000019_leftImg8bit.png
    FOLDER/cityscapes/gtFine/{train,val}/shapes/shapes_000001_000019_gtFine_labelIds.png
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from xformer.errors import UsageError

SPLITS = ("train", "val")


class Kind(NamedTuple):
    """A class of shapes: name, COCO category id (with gaps, as in COCO), Cityscapes label id, pattern, and mean hue in
    degrees."""

    name: str
    category: int
    label: int
    pattern: str
    hue: int


KINDS = (
    Kind("disc", 1, 26, "dots", 0),
    Kind("square", 3, 27, "checks", 60),
    Kind("triangle", 8, 24, "stripes", 120),
    Kind("star", 17, 20, "grain", 180),
    Kind("cross", 44, 19, "grid", 240),
    Kind("arrow", 90, 33, "waves", 300),
)
HUES = 20.0
"""Standard deviation of the hues of a kind, in degrees: hues of neighbouring kinds overlap."""
SKY, BUILDING, ROAD, EGO = 23, 11, 7, 1
"""Cityscapes' label ids of the background; EGO is ignored in evaluation."""


@dataclass
class Thing:
    """A shape, or a crowd of one kind: outline (n, 2) in pixels (None for a crowd), and mask of visible pixels."""

    kind: Kind
    outline: np.ndarray | None
    mask: np.ndarray


@dataclass
class Scene:
    """image: (H, W, 3) uint8. labels: (H, W) uint8, Cityscapes' ids. things: nearest last; they do not overlap."""

    image: np.ndarray
    labels: np.ndarray
    things: list[Thing] = field(default_factory=list)


def outline(kind: str) -> np.ndarray:
    """Corners (n, 2) of a shape within the unit circle."""

    def turn(count: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
        angles = 2 * np.pi * np.arange(count) / count
        r = np.resize(radii, count)
        return np.stack([r * np.sin(angles), -r * np.cos(angles)], -1)

    if kind == "cross":
        a = 0.33
        quarter = np.array([[a, -1.0], [a, -a], [1.0, -a]])
        turned = [quarter @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate(turned)
    if kind == "arrow":
        return np.array([[0, -1], [0.8, -0.1], [0.3, -0.1], [0.3, 0.9], [-0.3, 0.9], [-0.3, -0.1], [-0.8, -0.1]])
    corners = {"disc": (36, (1.0,)), "square": (4, (1.0,)), "triangle": (3, (1.0,)), "star": (10, (1.0, 0.42))}
    return turn(*corners[kind])


def noise(rng: np.random.Generator, height: int, width: int, octaves: tuple[int, ...] = (4, 9, 24, 60)) -> np.ndarray:
    """Smooth multi-scale noise, (H, W) with mean 0."""
    total = np.zeros((height, width), np.float32)
    for i, cells in enumerate(octaves):
        grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / (1.6**i)
    return total / 2


def texture(rng: np.random.Generator, height: int, width: int, kind: Kind) -> np.ndarray:
    """Pattern of a kind with random rotation and scale, in its colour and a greyer one: (H, W, 3) from 0 to 255."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 18)
    u = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period
    v = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period
    patterns = {
        "stripes": np.sin(u),
        "checks": np.sin(u) * np.sin(v),
        "dots": np.cos(u) + np.cos(v) - 1,
        "grid": np.maximum(np.sin(u), np.sin(v)) - 0.5,
        "waves": np.sin(u + 2 * np.sin(v)),
        "grain": noise(rng, height, width, (24, 60)),
    }
    share = 1 / (1 + np.exp(-4 * patterns[kind.pattern]))[..., None]
    hue = (kind.hue + rng.normal(0, HUES)) / 360 % 1
    first = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.95)))
    grey = rng.uniform(20, 235)
    return first * share + (0.6 * grey + 0.4 * first) * (1 - share)


def inside(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask (H, W) bool of a polygon."""
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in corners], fill=1)
    return np.asarray(canvas)


def make_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A scene of up to eleven shapes, sometimes none, sometimes with a crowd."""
    horizon = int(height * rng.uniform(0.3, 0.5))
    labels = np.full((height, width), ROAD, np.uint8)
    labels[:horizon] = SKY
    for _ in range(rng.integers(0, 4)):
        left, top = rng.integers(0, width), rng.integers(0, horizon)
        labels[top:horizon, left : left + rng.integers(width // 8, width // 3)] = BUILDING
    image = np.zeros((height, width, 3))
    base = {SKY: (130, 170, 215), ROAD: (95, 92, 96), BUILDING: (130, 105, 85)}
    for label, colour in base.items():
        where = labels == label
        grain = noise(rng, height, width)[..., None] * (10 if label == SKY else 24)
        image[where] = (np.array(colour) + rng.normal(0, 14, 3) + grain)[where]
    scene = Scene(image, labels)
    if rng.random() > 0.06:
        for _ in range(rng.integers(3, 12)):
            place(rng, scene)
        if rng.random() < 0.1:
            place_crowd(rng, scene)
    labels[height - height // 24 :] = EGO
    light = 1 + 0.12 * noise(rng, height, width, (2, 3))[..., None]
    finished = np.clip(scene.image * light + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    picture = Image.fromarray(finished).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.9))))
    scene.image = np.asarray(picture)
    return scene


def place(rng: np.random.Generator, scene: Scene, kind: Kind | None = None) -> bool:
    """Add a shape at a free position; returns whether one was found."""
    height, width = scene.labels.shape
    kind = kind or KINDS[rng.integers(len(KINDS))]
    taken = np.any([thing.mask for thing in scene.things], axis=0) if scene.things else np.zeros((height, width), bool)
    floor = height - height // 24
    for _ in range(12):
        radius = min(height, width) * np.exp(rng.uniform(np.log(0.06), np.log(0.2)))
        centre = rng.uniform(radius, [width - radius, floor - radius])
        angle, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0)
        turned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        corners = (outline(kind.name) * [squeeze, 1.0]) @ turned * radius + centre
        mask = inside(corners, height, width)
        if not (mask & taken).any() and mask.any():
            scene.things.append(Thing(kind, corners, mask))
            draw(rng, scene, mask, kind)
            return True
    return False


def place_crowd(rng: np.random.Generator, scene: Scene) -> None:
    """Add overlapping small shapes of one kind, annotated as a single crowd."""
    height, width = scene.labels.shape
    kind = KINDS[rng.integers(len(KINDS))]
    taken = np.any([thing.mask for thing in scene.things], axis=0) if scene.things else np.zeros((height, width), bool)
    radius = min(height, width) * 0.05
    middle = rng.uniform(3 * radius, [width - 3 * radius, height - 4 * radius])
    whole = np.zeros((height, width), bool)
    for _ in range(8):
        corners = outline(kind.name) * radius + middle + rng.uniform(-1.5 * radius, 1.5 * radius, 2)
        mask = inside(corners, height, width) & ~taken
        draw(rng, scene, mask, kind)
        whole |= mask
    if whole.any():
        scene.things.append(Thing(kind, None, whole))


def draw(rng: np.random.Generator, scene: Scene, mask: np.ndarray, kind: Kind) -> None:
    """Draw a mask with texture, light from above and a darker rim."""
    height, width = mask.shape
    within = np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(3)))
    shade = np.linspace(1.15, 0.8, height)[:, None, None] * np.where(within, 1.0, 0.6)[..., None]
    scene.image[mask] = (texture(rng, height, width, kind) * shade)[mask]
    scene.labels[mask] = kind.label


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths of a mask, in column-major order, starting with a run of zeros."""
    flat = mask.flatten(order="F").astype(np.int8)
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(flat, prepend=0)), [flat.size]])
    return {"size": list(mask.shape), "counts": [int(n) for n in np.diff(bounds)]}


def annotation(thing: Thing, number: int, image: int) -> dict[str, Any]:
    """A record of COCO's ``annotations``; the box is the bounding box of the mask."""
    rows, columns = np.flatnonzero(thing.mask.any(1)), np.flatnonzero(thing.mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    crowd = thing.outline is None
    segmentation: Any = run_lengths(thing.mask)
    if thing.outline is not None:
        segmentation = [[round(float(v), 2) for v in thing.outline.flatten()]]
    return {
        "id": number, "image_id": image, "category_id": thing.kind.category, "iscrowd": int(crowd),
        "bbox": [float(v) for v in box], "area": float(thing.mask.sum()), "segmentation": segmentation,
    }  # fmt: skip


def make_shapes(
    folder: str | Path,
    images: int = 900,
    held_out: int = 100,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write `images` training and `held_out` evaluation scenes of (height, width) `size`, in both layouts.

    `progress`: show a progress bar on a terminal; requires rich.

    Raises:
        UsageError: no images, sides below 64, a seed below 0, or a folder that already contains coco or cityscapes.
    """
    root = Path(os.path.expanduser(folder))
    if images < 1 or held_out < 1:
        raise UsageError(f"images and held-out must be 1 or more, got {images} and {held_out}")
    if min(size) < 64:
        raise UsageError(f"size must be 64 or more, got {size}")
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, got {seed}")
    if any((root / name).exists() for name in ("coco", "cityscapes")):
        raise UsageError(f"folder: {root} holds coco or cityscapes already: name another one")
    (root / "coco" / "annotations").mkdir(parents=True)
    for index, (split, count) in enumerate(zip(SPLITS, (images, held_out), strict=True)):
        write_split(root, split, count, size, np.random.SeedSequence((seed, index)), progress)


def shown(seeds: Sequence[np.random.SeedSequence], what: str) -> Iterator[np.random.SeedSequence]:
    """Iterate over `seeds` with a progress bar on stderr, if that is a terminal and rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return iter(seeds)
    console = Console(stderr=True)
    return iter(track(seeds, what, console=console, disable=not console.is_terminal))


def write_split(
    root: Path,
    split: str,
    count: int,
    size: tuple[int, int],
    seed: np.random.SeedSequence,
    progress: bool = False,
) -> None:
    pictures = root / "coco" / f"{split}2017"
    city = [root / "cityscapes" / kind / split / "shapes" for kind in ("leftImg8bit", "gtFine")]
    for path in (pictures, *city):
        path.mkdir(parents=True)
    said: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": kind.category, "name": kind.name, "supercategory": "shape"} for kind in KINDS],
    }
    seeds = seed.spawn(count)
    for number, child in enumerate(shown(seeds, split) if progress else seeds, 1):
        scene = make_scene(np.random.default_rng(child), *size)
        name = f"{number:012d}.jpg"
        Image.fromarray(scene.image).save(pictures / name, quality=92)
        said["images"].append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        for thing in scene.things:
            said["annotations"].append(annotation(thing, len(said["annotations"]) + 1, number))
        stem = f"shapes_{number:06d}_000019"
        Image.fromarray(scene.image).save(city[0] / f"{stem}_leftImg8bit.png")
        Image.fromarray(scene.labels).save(city[1] / f"{stem}_gtFine_labelIds.png")
    (root / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(said))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__.partition("\n\n")[0]
    parser.add_argument("folder", help="where to")
    parser.add_argument("--images", type=int, default=900, help="of training")
    parser.add_argument("--held-out", type=int, default=100, help="of evaluation")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    make_shapes(options.folder, options.images, options.held_out, tuple(options.size), options.seed, progress=True)
    print(f"{options.folder}: {options.images} scenes of training and {options.held_out} of evaluation")
