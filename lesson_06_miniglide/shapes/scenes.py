"""Scenes of shapes and their captions: the data set that is always available.

    a small red circle left of a blue square      three green triangles      a large purple square

Four pairs of colour and shape are held out of training.
"""

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

Palette = Mapping[str, tuple[int, int, int]]
PALETTE: Palette = {
    "red": (230, 50, 50),
    "green": (60, 200, 80),
    "blue": (70, 110, 250),
    "yellow": (240, 220, 60),
    "purple": (180, 80, 230),
    "white": (245, 245, 245),
}
SHAPES, COUNTS = ["circle", "square", "triangle"], ["a", "two", "three"]
HELD_OUT = [("red", "triangle"), ("green", "square"), ("blue", "circle"), ("yellow", "triangle")]
RADII = {"small": (4.5, 6.0), "large": (8.0, 9.5)}  # pixels, of a circle of the same area
SIZES = [None, *RADII]
RELATIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}  # x to the right, y down
KINDS = ("single", "count", "pair")  # of scenes: one shape, several equal shapes, two shapes in a relation


class ShapeSpec(NamedTuple):
    """What one part of a caption asks for: a number of shapes of one kind."""

    number: int
    size: str | None  # None: small or large
    colour: str
    shape: str

    def __str__(self) -> str:
        words = [COUNTS[self.number - 1], self.size, self.colour, self.shape + "s" * (self.number > 1)]
        return " ".join(filter(None, words))


class Scene(NamedTuple):
    """What a caption describes; `str(scene)` is the caption."""

    specs: tuple[ShapeSpec, ...]  # one, or two single shapes
    relation: str | None = None  # of the first shape to the second

    def __str__(self) -> str:
        return f" {self.relation} ".join(map(str, self.specs))

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "pair" if self.relation else "count" if self.specs[0].number > 1 else "single"


def parse(caption: str, palette: Palette = PALETTE) -> Scene:
    """Return the scene that a caption describes, with the colours of a palette.

    Raises ValueError for captions of other data.
    """
    relation = next((r for r in RELATIONS if f" {r} " in caption), None)
    spec = rf"({'|'.join(COUNTS)}) (?:({'|'.join(RADII)}) )?({'|'.join(palette)}) ({'|'.join(SHAPES)})(s?)"
    specs = []
    for part in caption.split(f" {relation} ") if relation else [caption]:
        found = re.fullmatch(spec, part)
        count = COUNTS.index(found[1]) + 1 if found else 0
        if not found or bool(found[5]) != (count > 1):
            raise ValueError(f"{part!r} describes no shapes of this data set")
        specs.append(ShapeSpec(count, *found.groups()[1:4]))
    if relation and [spec.number for spec in specs] != [1, 1]:
        raise ValueError(f"{caption!r}: a relation is between two single shapes")
    return Scene(tuple(specs), relation)


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Return a scene as in training or, if `held_out`, with a pair of colour and shape that training lacks.

    Half of the scenes have one to three equal shapes, the other half two different ones in a relation. All
    four relations are equally frequent.
    """
    all_pairs = [(colour, shape) for colour in PALETTE for shape in SHAPES]
    seen = [pair for pair in all_pairs if pair not in HELD_OUT]
    first = rng.choice(HELD_OUT if held_out else seen)
    if rng.random() < 0.5:
        return Scene((ShapeSpec(rng.randint(1, 3), rng.choice(SIZES), *first),))
    both = [first, rng.choice([pair for pair in seen if pair != first])]
    rng.shuffle(both)
    specs = tuple(ShapeSpec(1, rng.choice(SIZES), *pair) for pair in both)
    return Scene(specs, rng.choice(list(RELATIONS)))
