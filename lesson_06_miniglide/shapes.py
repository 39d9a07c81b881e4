"""Drawn shapes with compositional captions: the data set that is always there, and a checker that reads it.

    a small red circle left of a blue square      three green triangles      a large purple square

Four pairs of colour and shape are held out of training. `check` tells whether a picture shows what its
caption says, all of it and nothing else, so a model's samples can be scored without any trained judge.
"""

import math
import re
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

PALETTE = {
    "red": (230, 50, 50),
    "green": (60, 200, 80),
    "blue": (70, 110, 250),
    "yellow": (240, 220, 60),
    "purple": (180, 80, 230),
    "white": (245, 245, 245),
}
SHAPES, COUNTS = ["circle", "square", "triangle"], ["a", "two", "three"]
HELD_OUT = [("red", "triangle"), ("green", "square"), ("blue", "circle"), ("yellow", "triangle")]
RADII = {"small": (4.5, 6.0), "large": (8.0, 9.5)}  # pixels of a circle of the same area
SIZES = [None, *RADII]
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Were "left of" no more frequent than "right of", then what is named first would on the average stand nowhere
# in particular, and nothing would reward a network for beginning to heed the order of words.
HOW_OFTEN = {"left of": 3, "right of": 1, "above": 3, "below": 1}
BACKGROUND = 25
GAP = 3  # pixels between two shapes, at least
# What the checker forgives: a radius, in pixels; a colour, of 255; specks of so many pixels in all; and the
# share of pixels that a shape must have in common with a true drawing of it.
SLACK, NEAR, SPECK, ALIKE = 0.7, 50, 12, 0.85
# Shapes as the half-planes (a, b, c) with a x + b y <= c; all have the area of the unit circle.
SIDE, EDGE = np.pi**0.5 / 2, (np.pi / 27**0.5) ** 0.5
HALF_PLANES = {
    "square": [(1, 0, SIDE), (-1, 0, SIDE), (0, 1, SIDE), (0, -1, SIDE)],
    "triangle": [(0, 1, EDGE), (0.75**0.5, -0.5, EDGE), (-(0.75**0.5), -0.5, EDGE)],
}
INSIDE = EDGE  # of every shape, the circle of this radius around its centre
REACH = {"circle": 1, "square": SIDE * 2**0.5, "triangle": 2 * EDGE}  # from the centre to the furthest point


class Group(NamedTuple):
    """What a part of a caption asks for: so many shapes of a kind."""

    count: int
    size: str | None  # None: either
    colour: str
    shape: str

    def __str__(self):
        words = [COUNTS[self.count - 1], self.size, self.colour, self.shape + "s" * (self.count > 1)]
        return " ".join(filter(None, words))


class Scene(NamedTuple):
    groups: tuple[Group, ...]  # one, or two single shapes
    relation: str | None = None  # of the first group to the second

    def __str__(self):
        return f" {self.relation} ".join(map(str, self.groups))


class Thing(NamedTuple):
    """A shape in a picture."""

    x: float  # of the centre of mass, pixels
    y: float
    radius: float  # of a circle of the same area
    colour: str
    shape: str

    @property
    def size(self):
        """None, if it is of neither size."""
        near = ((size, low - SLACK, high + SLACK) for size, (low, high) in RADII.items())
        return next((size for size, low, high in near if low <= self.radius <= high), None)


def parse(caption):
    """The Scene that a caption of this data set describes. Raises ValueError for any other text."""
    relation = next((r for r in RELATIONS if f" {r} " in caption), None)
    kind = rf"({'|'.join(COUNTS)}) (?:({'|'.join(RADII)}) )?({'|'.join(PALETTE)}) ({'|'.join(SHAPES)})(s?)"
    groups = []
    for part in caption.split(f" {relation} ") if relation else [caption]:
        found = re.fullmatch(kind, part)
        count = COUNTS.index(found[1]) + 1 if found else 0
        if not found or bool(found[5]) != (count > 1):
            raise ValueError(f"{part!r} names no shapes of this data set")
        groups.append(Group(count, *found.groups()[1:4]))
    if relation and [group.count for group in groups] != [1, 1]:
        raise ValueError(f"{caption!r}: only single shapes stand to each other here")
    return Scene(tuple(groups), relation)


# -- drawing -------------------------------------------------------------------------------------------------


def random_scene(rng, held_out=False):
    """A scene as training has it, or one with a pair of colour and shape that training never has."""
    kinds = [(colour, shape) for colour in PALETTE for shape in SHAPES]
    seen = [kind for kind in kinds if kind not in HELD_OUT]
    first = rng.choice(HELD_OUT if held_out else seen)
    if rng.random() < 0.5:
        return Scene((Group(rng.randint(1, 3), rng.choice(SIZES), *first),))
    pair = [first, rng.choice([kind for kind in seen if kind != first])]
    rng.shuffle(pair)
    groups = tuple(Group(1, rng.choice(SIZES), *kind) for kind in pair)
    return Scene(groups, *rng.choices(list(HOW_OFTEN), HOW_OFTEN.values()))


def draw(scene, rng, size=64):
    """A picture of a scene, places and exact sizes at random: uint8 [size, size, 3]."""
    kinds = [group for group in scene.groups for _ in range(group.count)]
    while True:
        things = [random_thing(rng, group, size) for group in kinds]
        if scene.relation and not stands(*things, scene.relation, margin=8):
            continue
        if all(math.dist(a[:2], b[:2]) > INSIDE * (a.radius + b.radius) for a, b in combinations(things, 2)):
            outside = [distance(thing, size) for thing in things]
            if all((a + b).min() >= GAP for a, b in combinations(outside, 2)):
                break
    image = np.full((size, size, 3), BACKGROUND, np.float32)
    for thing, d in zip(things, outside):
        cover = (0.5 - d).clip(0, 1)[..., None]  # anti-aliased
        image += cover * (np.float32(PALETTE[thing.colour]) - image)
    return image.round().astype(np.uint8)


def random_thing(rng, group, size):
    radius = rng.uniform(*RADII[group.size or rng.choice(list(RADII))])
    room = (REACH[group.shape] * radius + 1, size - REACH[group.shape] * radius - 2)
    return Thing(rng.uniform(*room), rng.uniform(*room), radius, group.colour, group.shape)


def distance(thing, size):
    """How far each pixel lies outside the shape, negative inside: [size, size]."""
    y, x = (axis.astype(np.float32) for axis in np.ogrid[:size, :size])
    x, y = x - thing.x, y - thing.y
    if thing.shape == "circle":
        return np.hypot(x, y) - thing.radius
    return np.max([a * x + b * y - c * thing.radius for a, b, c in HALF_PLANES[thing.shape]], 0)


def stands(a, b, relation, margin=0.0):
    """Whether a stands to b in this relation: more so than to the side, by `margin` pixels."""
    right, down = RELATIONS[relation]
    along = right * (a.x - b.x) + down * (a.y - b.y)
    across = abs(down * (a.x - b.x)) + abs(right * (a.y - b.y))
    return along > across + margin


# -- reading -------------------------------------------------------------------------------------------------


def check(image, caption):
    """Whether a picture, uint8 [size, size, 3], shows what the caption says: all of it and nothing else."""
    scene, things = parse(caption), read(image)
    if things is None or len(things) != sum(group.count for group in scene.groups):
        return False
    if scene.relation is None:
        return all(fits(thing, scene.groups[0]) for thing in things)
    return any(
        fits(a, scene.groups[0]) and fits(b, scene.groups[1]) and stands(a, b, scene.relation)
        for a, b in (things, things[::-1])
    )


def share_right(images, captions):
    """The share of pictures, uint8 [N, size, size, 3], that pass `check`."""
    return sum(check(image, caption) for image, caption in zip(images, captions)) / len(captions)


def fits(thing, group):
    sizes = (group.size,) if group.size else RADII
    return (thing.colour, thing.shape) == group[2:] and thing.size in sizes


def read(image):
    """The Things in a picture, uint8 [size, size, 3]; None if a part of it is nothing of this data set."""
    pixels = image.astype(np.float32)
    bright = pixels.max(-1)
    palette = np.float32(list(PALETTE.values()))
    hues = pixels / bright.clip(1)[..., None], palette / palette.max(-1, keepdims=True)
    colours = np.square(hues[0][:, :, None] - hues[1]).sum(-1).argmin(-1)
    colours[bright < (BACKGROUND + 220) / 2] = -1
    things, left = [], abs(pixels - BACKGROUND).max(-1) > NEAR  # what no thing accounts for
    for index, colour in enumerate(PALETTE):
        for part in components(colours == index):
            if part.sum() >= SPECK:
                thing = recognise(part, colour)
                inside = distance(thing, len(image)) < -1
                if likeness(thing, part) < ALIKE or abs(pixels[inside].mean(0) - palette[index]).max() > NEAR:
                    return None
                left &= distance(thing, len(image)) > 2
                things.append(thing)
    return things if left.sum() < SPECK else None


def components(mask):
    """The connected parts of a mask, each a mask: the largest label spreads until nothing changes."""
    labels = torch.arange(1.0, mask.size + 1).view(1, *mask.shape) * torch.from_numpy(mask)
    while not torch.equal(spread := F.max_pool2d(labels, 3, 1, 1) * (labels > 0), labels):
        labels = spread
    return [(labels[0] == label).numpy() for label in labels.unique() if label > 0]


def recognise(part, colour):
    """The Thing whose drawing is most like a connected part."""
    y, x = (axis.mean() for axis in part.nonzero())
    radius = (part.sum() / np.pi) ** 0.5
    candidates = [Thing(x, y, radius, colour, shape) for shape in SHAPES]
    return max(candidates, key=lambda thing: likeness(thing, part))


def likeness(thing, part):
    """The share of pixels that a drawing of the thing and a part of the picture have in common."""
    drawn = distance(thing, len(part)) < 0
    return (drawn & part).sum() / (drawn | part).sum()
