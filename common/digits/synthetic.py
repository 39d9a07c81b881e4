"""Synthetic digits: the data set of last resort, for machines without MNIST and without a network.

Every digit consists of a few pen strokes through control points in the unit square (x to the right, y down).
Each image jitters the points, connects them by a spline, slants, rotates and scales the result, and draws it
with a pen of random width. As in MNIST, the digit fills a box of about 20x20 pixels, and its center of mass
is near the center of 28x28 pixels.
"""

from typing import TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Stroke: TypeAlias = list[list[float]]  # points (x, y) in the unit square

# The ways of writing each digit: lines of "digit stroke / stroke". A point is x,y in percent.
STROKES = """
0 50,0 12,22 8,68 45,100 85,75 90,28 50,0
0 65,5 30,5 2,50 25,98 70,90 98,45 75,5 50,10
1 50,0 50,50 50,100
1 50,0 49,50 50,100
1 30,20 45,10 52,0 / 52,0 50,50 50,100
1 30,20 52,0 / 52,0 50,50 50,100 / 25,100 50,100 75,100
2 10,25 40,0 80,15 75,45 40,75 5,100 / 5,100 50,97 95,97
2 10,20 45,0 80,20 70,50 35,85 10,95 15,72 45,85 95,95
2 5,15 50,0 75,25 55,60 15,97 0,80 30,72 60,95 100,85
3 12,12 50,0 80,20 65,42 35,48 / 35,48 75,55 88,78 55,100 8,88
3 10,5 45,2 80,5 / 80,5 60,25 40,42 / 40,42 80,55 80,85 45,100 5,88
3 20,10 60,0 85,20 50,45 40,48 70,55 75,85 35,100 5,92
4 20,0 12,30 10,55 / 10,55 50,55 95,50 / 75,2 72,50 68,100
4 65,0 30,35 2,65 / 2,65 50,65 100,62 / 65,0 66,50 66,100
4 15,5 10,40 40,50 80,38 / 85,0 80,40 70,100
5 85,2 50,2 20,3 / 20,3 17,22 14,42 / 14,42 50,36 85,60 65,95 5,95
5 100,0 65,3 40,5 / 40,5 30,22 25,42 / 25,42 55,45 70,70 50,95 2,95
5 20,10 12,40 50,42 80,65 60,95 10,97 / 20,8 50,8 90,2
6 60,0 25,30 10,65 30,97 70,92 75,65 45,52 15,70
6 85,5 45,15 12,50 15,90 55,100 85,78 60,55 20,72
6 30,0 12,40 15,85 50,100 80,82 60,62 25,72
7 5,5 50,3 92,2 / 92,2 65,45 45,100
7 5,20 8,6 50,5 85,5 / 85,5 70,40 60,100
7 5,5 50,5 95,2 / 95,2 60,50 40,100 / 30,50 55,48 85,47
7 10,12 35,0 60,10 90,5 75,35 50,100
8 70,10 40,0 18,20 50,45 80,75 50,100 20,80 45,50 80,25 70,10
8 50,0 20,20 50,45 80,22 50,0 / 50,45 12,75 50,100 88,75 50,45
8 90,10 50,2 25,22 55,50 60,85 30,100 10,80 45,50 85,20 80,2
9 80,20 50,2 18,22 35,48 70,40 82,12 / 82,12 78,50 65,100
9 75,15 40,2 12,30 45,45 75,15 75,55 60,90 20,98
9 85,10 50,0 10,25 30,50 70,35 80,15 70,55 50,100
"""
SEGMENTS = 5  # straight segments between two neighboring control points


def render_digits(labels: Int[Tensor, "n"], generator: torch.Generator) -> UInt8[Tensor, "n 28 28"]:
    """Draw one digit per label, 0 to 9: 255 where there is ink, on black.

    Equal labels and an equally seeded generator give equal images.
    """
    images = torch.zeros(len(labels), 28, 28, dtype=torch.uint8)
    for digit in range(10):
        variants = [parse_strokes(line[2:]) for line in STROKES.splitlines() if line.startswith(str(digit))]
        of_digit = (labels == digit).nonzero()[:, 0]
        choice = torch.randint(len(variants), (len(of_digit),), generator=generator)
        for i, strokes in enumerate(variants):
            for chunk in of_digit[choice == i].split(256):
                images[chunk] = rasterize(*pen_strokes(strokes, len(chunk), generator), generator)
    return images


def parse_strokes(text: str) -> list[Stroke]:
    """Return the strokes of one line of STROKES, without its digit."""
    return [
        [[int(n) / 100 for n in point.split(",")] for point in stroke.split()] for stroke in text.split("/")
    ]


def pen_strokes(
    strokes: list[Stroke], n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "{n} segments 2"], Float[Tensor, "{n} segments 2"]]:
    """Return the segments of n handwritten versions of a digit: start and end points (x, y), in pixels."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    starts, ends = [], []
    for stroke in strokes:
        points = torch.tensor(stroke) + 0.045 * torch.randn(n, len(stroke), 2, generator=generator)
        line = catmull_rom(points)
        starts.append(line[:, :-1])
        ends.append(line[:, 1:])
    segments = torch.stack([torch.cat(starts, 1), torch.cat(ends, 1)], 1) - 0.5  # [n, 2, segments, 2]

    aspect, slant, angle = uniform(0.45, 0.95), uniform(-0.15, 0.5), uniform(-0.15, 0.15)
    x, y = segments.unbind(-1)
    x = x * aspect[:, None, None] - slant[:, None, None] * y
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    segments = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)

    low, high = segments.amin((1, 2)), segments.amax((1, 2))
    size = (high - low).amax(-1).clamp(min=0.3)
    segments = segments * (uniform(16.5, 19) / size)[:, None, None, None]
    length = (segments[:, 1] - segments[:, 0]).norm(dim=-1, keepdim=True)
    center_of_mass = (segments.mean(1) * length).sum(1) / length.sum(1)
    segments = segments - center_of_mass[:, None, None] + 13.5 + uniform(-0.7, 0.7, 1, 1, 2)
    return segments[:, 0], segments[:, 1]


def catmull_rom(points: Float[Tensor, "n points 2"]) -> Float[Tensor, "n line_points 2"]:
    """Return a Catmull-Rom spline, a smooth line through the points with SEGMENTS segments between two."""
    padded = torch.cat([points[:, :1], points, points[:, -1:]], 1)
    p0, p1, p2, p3 = (padded[:, i : i + points.shape[1] - 1, None] for i in range(4))
    u = (torch.arange(SEGMENTS) / SEGMENTS)[:, None]
    line = 0.5 * (
        2 * p1 + (p2 - p0) * u + (2 * p0 - 5 * p1 + 4 * p2 - p3) * u**2 + (3 * p1 - p0 - 3 * p2 + p3) * u**3
    )
    return torch.cat([line.flatten(1, 2), points[:, -1:]], 1)


def rasterize(
    start: Float[Tensor, "n segments 2"], end: Float[Tensor, "n segments 2"], generator: torch.Generator
) -> UInt8[Tensor, "n 28 28"]:
    """Draw the segments with a round pen of random width and soft edge."""
    n, a, b = len(start), start[:, None], end[:, None]  # [n, 1, segments, 2]
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    pixel = torch.stack([column, row], -1).view(1, 784, 1, 2)
    along = ((pixel - a) * (b - a)).sum(-1) / ((b - a) ** 2).sum(-1).clamp(min=1e-8)
    distance = (pixel - a - along.clamp(0, 1)[..., None] * (b - a)).norm(dim=-1).amin(-1)  # [n, 784]
    half_width = 0.6 + 1.3 * torch.rand(n, 1, generator=generator)
    softness = 0.8 + 0.9 * torch.rand(n, 1, generator=generator)
    return (255 * (0.5 + (half_width - distance) / softness).clamp(0, 1)).round().byte().view(n, 28, 28)
