"""Digits drawn by the program: the data set of last resort, for machines without MNIST and without a network.

Every digit is a few pen strokes through control points in the unit square (x to the right, y down). A drawing
jitters the points, bends them through a spline, slants, turns and scales the result, and inks it with a pen of
random width. Like MNIST, the digit then fills a 20x20 box and its centre of mass is the centre of 28x28 pixels.
"""

import torch

# One entry a way of writing the digit; one list of points a stroke.
STROKES = {
    0: [
        [[(0.5, 0), (0.12, 0.22), (0.08, 0.68), (0.45, 1), (0.85, 0.75), (0.9, 0.28), (0.5, 0)]],
        [[(0.65, 0.05), (0.3, 0.05), (0.02, 0.5), (0.25, 0.98), (0.7, 0.9), (0.98, 0.45), (0.75, 0.05), (0.5, 0.1)]],
    ],
    1: [
        [[(0.5, 0), (0.5, 0.5), (0.5, 1)]],
        [[(0.5, 0), (0.49, 0.5), (0.5, 1)]],
        [[(0.3, 0.2), (0.45, 0.1), (0.52, 0)], [(0.52, 0), (0.5, 0.5), (0.5, 1)]],
        [[(0.3, 0.2), (0.52, 0)], [(0.52, 0), (0.5, 0.5), (0.5, 1)], [(0.25, 1), (0.5, 1), (0.75, 1)]],
    ],
    2: [
        [[(0.1, 0.25), (0.4, 0), (0.8, 0.15), (0.75, 0.45), (0.4, 0.75), (0.05, 1)], [(0.05, 1), (0.5, 0.97), (0.95, 0.97)]],
        [[(0.1, 0.2), (0.45, 0), (0.8, 0.2), (0.7, 0.5), (0.35, 0.85), (0.1, 0.95), (0.15, 0.72), (0.45, 0.85), (0.95, 0.95)]],
        [[(0.05, 0.15), (0.5, 0), (0.75, 0.25), (0.55, 0.6), (0.15, 0.97), (0.0, 0.8), (0.3, 0.72), (0.6, 0.95), (1.0, 0.85)]],
    ],
    3: [
        [[(0.12, 0.12), (0.5, 0), (0.8, 0.2), (0.65, 0.42), (0.35, 0.48)], [(0.35, 0.48), (0.75, 0.55), (0.88, 0.78), (0.55, 1), (0.08, 0.88)]],
        [[(0.1, 0.05), (0.45, 0.02), (0.8, 0.05)], [(0.8, 0.05), (0.6, 0.25), (0.4, 0.42)], [(0.4, 0.42), (0.8, 0.55), (0.8, 0.85), (0.45, 1), (0.05, 0.88)]],
        [[(0.2, 0.1), (0.6, 0), (0.85, 0.2), (0.5, 0.45), (0.4, 0.48), (0.7, 0.55), (0.75, 0.85), (0.35, 1), (0.05, 0.92)]],
    ],
    4: [
        [[(0.2, 0), (0.12, 0.3), (0.1, 0.55)], [(0.1, 0.55), (0.5, 0.55), (0.95, 0.5)], [(0.75, 0.02), (0.72, 0.5), (0.68, 1)]],
        [[(0.65, 0), (0.3, 0.35), (0.02, 0.65)], [(0.02, 0.65), (0.5, 0.65), (1, 0.62)], [(0.65, 0), (0.66, 0.5), (0.66, 1)]],
        [[(0.15, 0.05), (0.1, 0.4), (0.4, 0.5), (0.8, 0.38)], [(0.85, 0), (0.8, 0.4), (0.7, 1)]],
    ],
    5: [
        [[(0.85, 0.02), (0.5, 0.02), (0.2, 0.03)], [(0.2, 0.03), (0.17, 0.22), (0.14, 0.42)], [(0.14, 0.42), (0.5, 0.36), (0.85, 0.6), (0.65, 0.95), (0.05, 0.95)]],
        [[(1, 0), (0.65, 0.03), (0.4, 0.05)], [(0.4, 0.05), (0.3, 0.22), (0.25, 0.42)], [(0.25, 0.42), (0.55, 0.45), (0.7, 0.7), (0.5, 0.95), (0.02, 0.95)]],
        [[(0.2, 0.1), (0.12, 0.4), (0.5, 0.42), (0.8, 0.65), (0.6, 0.95), (0.1, 0.97)], [(0.2, 0.08), (0.5, 0.08), (0.9, 0.02)]],
    ],
    6: [
        [[(0.6, 0), (0.25, 0.3), (0.1, 0.65), (0.3, 0.97), (0.7, 0.92), (0.75, 0.65), (0.45, 0.52), (0.15, 0.7)]],
        [[(0.85, 0.05), (0.45, 0.15), (0.12, 0.5), (0.15, 0.9), (0.55, 1), (0.85, 0.78), (0.6, 0.55), (0.2, 0.72)]],
        [[(0.3, 0), (0.12, 0.4), (0.15, 0.85), (0.5, 1), (0.8, 0.82), (0.6, 0.62), (0.25, 0.72)]],
    ],
    7: [
        [[(0.05, 0.05), (0.5, 0.03), (0.92, 0.02)], [(0.92, 0.02), (0.65, 0.45), (0.45, 1)]],
        [[(0.05, 0.2), (0.08, 0.06), (0.5, 0.05), (0.85, 0.05)], [(0.85, 0.05), (0.7, 0.4), (0.6, 1)]],
        [[(0.05, 0.05), (0.5, 0.05), (0.95, 0.02)], [(0.95, 0.02), (0.6, 0.5), (0.4, 1)], [(0.3, 0.5), (0.55, 0.48), (0.85, 0.47)]],
        [[(0.1, 0.12), (0.35, 0.0), (0.6, 0.1), (0.9, 0.05), (0.75, 0.35), (0.5, 1)]],
    ],
    8: [
        [[(0.7, 0.1), (0.4, 0), (0.18, 0.2), (0.5, 0.45), (0.8, 0.75), (0.5, 1), (0.2, 0.8), (0.45, 0.5), (0.8, 0.25), (0.7, 0.1)]],
        [[(0.5, 0), (0.2, 0.2), (0.5, 0.45), (0.8, 0.22), (0.5, 0)], [(0.5, 0.45), (0.12, 0.75), (0.5, 1), (0.88, 0.75), (0.5, 0.45)]],
        [[(0.9, 0.1), (0.5, 0.02), (0.25, 0.22), (0.55, 0.5), (0.6, 0.85), (0.3, 1), (0.1, 0.8), (0.45, 0.5), (0.85, 0.2), (0.8, 0.02)]],
    ],
    9: [
        [[(0.8, 0.2), (0.5, 0.02), (0.18, 0.22), (0.35, 0.48), (0.7, 0.4), (0.82, 0.12)], [(0.82, 0.12), (0.78, 0.5), (0.65, 1)]],
        [[(0.75, 0.15), (0.4, 0.02), (0.12, 0.3), (0.45, 0.45), (0.75, 0.15), (0.75, 0.55), (0.6, 0.9), (0.2, 0.98)]],
        [[(0.85, 0.1), (0.5, 0.0), (0.1, 0.25), (0.3, 0.5), (0.7, 0.35), (0.8, 0.15), (0.7, 0.55), (0.5, 1)]],
    ],
}
SEGMENTS = 10  # a stroke between two control points becomes so many straight pieces, 40 a digit at most


def draw_digits(labels, generator):
    """Draw one digit a label.

    labels: [N] integers 0-9. Returns uint8 [N, 28, 28], ink 255 on black 0.
    """
    images = torch.zeros(len(labels), 28, 28, dtype=torch.uint8)
    for digit, variants in STROKES.items():
        where = (labels == digit).nonzero()[:, 0]
        choice = torch.randint(len(variants), (len(where),), generator=generator)
        for i, strokes in enumerate(variants):
            for chunk in where[choice == i].split(256):
                images[chunk] = ink(pen_path(strokes, len(chunk), generator), generator)
    return images


def pen_path(strokes, n, generator):
    """n hand-written versions of the strokes: straight pieces from a to b, each [n, S, 2], in pixels."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    starts, ends = [], []
    for stroke in strokes:
        points = torch.tensor(stroke) + 0.045 * torch.randn(n, len(stroke), 2, generator=generator)
        line = catmull_rom(points)
        starts, ends = [*starts, line[:, :-1]], [*ends, line[:, 1:]]
    pieces = torch.stack([torch.cat(starts, 1), torch.cat(ends, 1)], 1) - 0.5  # [n, 2, S, 2]

    aspect, slant, angle = uniform(0.45, 0.95), uniform(-0.15, 0.5), uniform(-0.15, 0.15)
    x, y = pieces.unbind(-1)
    x = x * aspect[:, None, None] - slant[:, None, None] * y
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    pieces = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)

    low, high = pieces.amin((1, 2)), pieces.amax((1, 2))
    size = (high - low).amax(-1).clamp(min=0.3)
    pieces = pieces * (uniform(16.5, 19) / size)[:, None, None, None]
    length = (pieces[:, 1] - pieces[:, 0]).norm(dim=-1, keepdim=True)
    centre = (pieces.mean(1) * length).sum(1) / length.sum(1)
    pieces = pieces - centre[:, None, None] + 13.5 + uniform(-0.7, 0.7, 1, 1, 2)
    return pieces[:, 0], pieces[:, 1]


def catmull_rom(points):
    """A smooth line through the points. points: [n, P, 2]; returns [n, (P - 1) * SEGMENTS + 1, 2]."""
    padded = torch.cat([points[:, :1], points, points[:, -1:]], 1)
    p0, p1, p2, p3 = (padded[:, i : i + points.shape[1] - 1, None] for i in range(4))
    u = (torch.arange(SEGMENTS) / SEGMENTS)[:, None]
    line = 0.5 * (2 * p1 + (p2 - p0) * u + (2 * p0 - 5 * p1 + 4 * p2 - p3) * u**2 + (3 * p1 - p0 - 3 * p2 + p3) * u**3)
    return torch.cat([line.flatten(1, 2), points[:, -1:]], 1)


def ink(path, generator):
    """Draw the pieces with a round pen of random width, soft at its edge. Returns uint8 [n, 28, 28]."""
    a, b = (p[:, None] for p in path)  # [n, 1, S, 2]
    n = len(a)
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    pixel = torch.stack([column, row], -1).view(1, 784, 1, 2)
    along = ((pixel - a) * (b - a)).sum(-1) / ((b - a) ** 2).sum(-1).clamp(min=1e-8)
    distance = (pixel - a - along.clamp(0, 1)[..., None] * (b - a)).norm(dim=-1).amin(-1)  # [n, 784]
    half_width = 0.6 + 1.3 * torch.rand(n, 1, generator=generator)
    softness = 0.8 + 0.9 * torch.rand(n, 1, generator=generator)
    return (255 * (0.5 + (half_width - distance) / softness).clamp(0, 1)).round().byte().view(n, 28, 28)
