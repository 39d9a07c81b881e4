"""Rendering scenes: shapes at random positions, anti-aliased, without overlap."""

import math
import random
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from lesson_06_miniglide.shapes.scenes import PALETTE, RADII, RELATIONS, Scene, ShapeSpec, parse

BACKGROUND = 25  # gray level
GAP = 3  # pixels between two shapes, at least
RELATION_MARGIN = 8  # pixels by which a relation holds in rendered scenes
# Shapes as half-planes (a, b, c) with a x + b y <= c; all have the area of the unit circle.
SIDE, EDGE = math.pi**0.5 / 2, (math.pi / 27**0.5) ** 0.5
HALF_PLANES: dict[str, list[tuple[float, float, float]]] = {
    "square": [(1, 0, SIDE), (-1, 0, SIDE), (0, 1, SIDE), (0, -1, SIDE)],
    "triangle": [(0, 1, EDGE), (0.75**0.5, -0.5, EDGE), (-(0.75**0.5), -0.5, EDGE)],
}
INRADIUS = EDGE  # a circle of this radius around the centre lies inside every shape
CIRCUMRADIUS = {"circle": 1, "square": SIDE * 2**0.5, "triangle": 2 * EDGE}  # centre to the furthest point
Distances = Float[np.ndarray, "size size"]


class ShapeInstance(NamedTuple):
    """A shape in an image."""

    x: float  # centre of mass, in pixels
    y: float
    radius: float  # of a circle of the same area
    colour: str
    shape: str


def render(scene: Scene, rng: random.Random, size: int = 64) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Render a scene with random positions and sizes, such that no shapes overlap and the relation holds."""
    specs = [spec for spec in scene.specs for _ in range(spec.number)]
    while True:
        instances = [random_instance(rng, spec, size) for spec in specs]
        if scene.relation:
            first, second = instances
            if not relation_holds(first, second, scene.relation, margin=RELATION_MARGIN):
                continue
        if all(
            math.dist(a[:2], b[:2]) > INRADIUS * (a.radius + b.radius) for a, b in combinations(instances, 2)
        ):
            distances = [signed_distance(instance, size) for instance in instances]
            if all((a + b).min() >= GAP for a, b in combinations(distances, 2)):
                break
    image = np.full((size, size, 3), BACKGROUND, np.float32)
    for instance, distance in zip(instances, distances):
        coverage = (0.5 - distance).clip(0, 1)[..., None]  # anti-aliasing
        image += coverage * (np.asarray(PALETTE[instance.colour], np.float32) - image)
    return image.round().astype(np.uint8)


def render_captions(captions: Sequence[str], seed: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Render one image per caption."""
    rng = random.Random(seed)
    return np.stack([render(parse(caption), rng) for caption in captions])


def random_instance(rng: random.Random, spec: ShapeSpec, size: int) -> ShapeInstance:
    """Return a shape of this kind at a random position inside the image."""
    radius = rng.uniform(*RADII[spec.size or rng.choice(list(RADII))])
    reach = CIRCUMRADIUS[spec.shape] * radius
    room = (reach + 1, size - reach - 2)
    return ShapeInstance(rng.uniform(*room), rng.uniform(*room), radius, spec.colour, spec.shape)


def signed_distance(instance: ShapeInstance, size: int) -> Distances:
    """Return how far each pixel lies outside a shape, negative inside."""
    y, x = (axis.astype(np.float32) for axis in np.ogrid[:size, :size])
    x, y = x - np.float32(instance.x), y - np.float32(instance.y)
    if instance.shape == "circle":
        return np.hypot(x, y) - np.float32(instance.radius)
    x, y = np.broadcast_arrays(x, y)
    planes = [
        np.float32(a) * x + np.float32(b) * y - np.float32(c * instance.radius)
        for a, b, c in HALF_PLANES[instance.shape]
    ]
    return np.max(planes, 0)


def relation_holds(a: ShapeInstance, b: ShapeInstance, relation: str, margin: float = 0.0) -> bool:
    """Return whether a stands in this relation to b: by `margin` pixels further in it than sideways."""
    right, down = RELATIONS[relation]
    along = right * (a.x - b.x) + down * (a.y - b.y)
    across = abs(down * (a.x - b.x)) + abs(right * (a.y - b.y))
    return along > across + margin
