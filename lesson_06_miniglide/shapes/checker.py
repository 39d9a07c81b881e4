"""An exact checker: does an image show what its caption says, all of it and nothing else?

It needs no trained classifier. Every connected component of a palette colour must match a rendered shape.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8

from lesson_06_miniglide.shapes.render import BACKGROUND, ShapeInstance, relation_holds, signed_distance
from lesson_06_miniglide.shapes.scenes import KINDS, PALETTE, RADII, SHAPES, Palette, Scene, ShapeSpec, parse

# Tolerances: a radius, in pixels; a colour, of 255; the area of specks that are ignored, in pixels; and the
# intersection over union with the best matching shape.
RADIUS_TOL, COLOUR_TOL, MIN_AREA, MIN_IOU = 0.7, 50, 12, 0.85
Image = UInt8[np.ndarray, "size size 3"]
Mask = Bool[np.ndarray, "size size"]


def matches_caption(image: Image, caption: str, palette: Palette = PALETTE) -> bool:
    """Return whether the image shows everything that the caption says, and nothing else.

    palette: the names of colours and their values of 0 to 255; other colours match nothing.
    """
    scene, instances = parse(caption, palette), detect_shapes(image, palette)
    if instances is None or not shows_specs(instances, scene):
        return False
    return scene.relation is None or shows_relation(instances, scene)


def caption_accuracy(
    images: UInt8[np.ndarray, "n size size 3"], captions: Sequence[str], palette: Palette = PALETTE
) -> float:
    """Return the fraction of images that match their captions."""
    return sum(matches_caption(*pair, palette) for pair in zip(images, captions)) / len(captions)


def accuracy_by_kind(
    images: UInt8[np.ndarray, "n size size 3"], captions: Sequence[str]
) -> dict[str, float | None]:
    """Return the accuracy of single shapes, counts and pairs, and of relations among the correct pairs.

    single_accuracy, count_accuracy: the fraction of images that match. pair_accuracy: both shapes are there,
    wherever they stand. relation_accuracy: of these, the fraction that stand as the caption says; at random
    positions it is 25 %. None where there is no such caption.
    """
    results: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, "relation")}
    for image, caption in zip(images, captions):
        scene, instances = parse(caption), detect_shapes(image)
        shown = instances is not None and shows_specs(instances, scene)
        results[scene.kind].append(shown)
        if scene.relation and shown and instances is not None:
            results["relation"].append(shows_relation(instances, scene))
    return {f"{name}_accuracy": sum(r) / len(r) if r else None for name, r in results.items()}


def shows_specs(instances: Sequence[ShapeInstance], scene: Scene) -> bool:
    """Return whether these are exactly the shapes of the scene, wherever they stand."""
    if len(instances) != sum(spec.number for spec in scene.specs):
        return False
    if scene.relation is None:
        return all(matches_spec(instance, scene.specs[0]) for instance in instances)
    return bool(assignments(instances, scene))


def shows_relation(instances: Sequence[ShapeInstance], scene: Scene) -> bool:
    """Return whether the two shapes of a scene stand in its relation."""
    assert scene.relation
    return any(relation_holds(a, b, scene.relation) for a, b in assignments(instances, scene))


def assignments(
    instances: Sequence[ShapeInstance], scene: Scene
) -> list[tuple[ShapeInstance, ShapeInstance]]:
    """Return the ways in which two shapes can be the first and the second of the caption."""
    a, b = instances
    first, second = scene.specs
    return [(x, y) for x, y in ((a, b), (b, a)) if matches_spec(x, first) and matches_spec(y, second)]


def matches_spec(instance: ShapeInstance, spec: ShapeSpec) -> bool:
    """Return whether a shape has the colour, the shape and the size (if it says one) of a caption's part."""
    sizes = (spec.size,) if spec.size else tuple(RADII)
    return (instance.colour, instance.shape) == (spec.colour, spec.shape) and size_of(instance) in sizes


def size_of(instance: ShapeInstance) -> str | None:
    """Return "small" or "large", or None if the shape is neither."""
    for size, (low, high) in RADII.items():
        if low - RADIUS_TOL <= instance.radius <= high + RADIUS_TOL:
            return size
    return None


def detect_shapes(image: Image, palette: Palette = PALETTE) -> list[ShapeInstance] | None:
    """Return the shapes in an image; None if a part of it is neither background nor such a shape."""
    size, pixels = len(image), image.astype(np.float32)
    bright = pixels.max(-1)
    rgb = np.asarray(list(palette.values()), np.float32)
    hues = pixels / bright.clip(1)[..., None], rgb / rgb.max(-1, keepdims=True)
    colours = np.square(hues[0][:, :, None] - hues[1]).sum(-1).argmin(-1)
    colours[bright < (BACKGROUND + 220) / 2] = -1
    instances, unexplained = [], abs(pixels - BACKGROUND).max(-1) > COLOUR_TOL
    for index, colour in enumerate(palette):
        for part in connected_components(colours == index):
            if part.sum() >= MIN_AREA:
                instance = classify_component(part, colour)
                distance = signed_distance(instance, size)
                inside = distance < -1
                if iou(instance, part) < MIN_IOU:
                    return None
                if abs(pixels[inside].mean(0) - rgb[index]).max() > COLOUR_TOL:
                    return None
                unexplained &= distance > 2
                instances.append(instance)
    return instances if unexplained.sum() < MIN_AREA else None


def connected_components(mask: Mask) -> list[Mask]:
    """Return the connected parts of a mask: the largest label spreads until nothing changes."""
    labels = torch.arange(1.0, mask.size + 1).view(1, *mask.shape) * torch.from_numpy(mask)
    while not torch.equal(spread := F.max_pool2d(labels, 3, 1, 1) * (labels > 0), labels):
        labels = spread
    return [(labels[0] == label).numpy() for label in labels.unique() if label > 0]


def classify_component(part: Mask, colour: str) -> ShapeInstance:
    """Return the shape with the position and area of a connected part that overlaps it best."""
    y, x = (float(axis.mean()) for axis in part.nonzero())
    radius = (part.sum() / np.pi) ** 0.5
    candidates = [ShapeInstance(x, y, radius, colour, shape) for shape in SHAPES]
    return max(candidates, key=lambda instance: iou(instance, part))


def iou(instance: ShapeInstance, part: Mask) -> float:
    """Return intersection over union of a shape and a mask."""
    rendered = signed_distance(instance, len(part)) < 0
    return (rendered & part).sum() / (rendered | part).sum()
