"""Lesson 6's shapes: scenes and captions, rendering, and the checker that measures samples."""

import random
from collections import Counter

import numpy as np
import pytest

from lesson_06_miniglide.image_data.captioned_images import make_shapes
from lesson_06_miniglide.shapes.checker import (
    accuracy_by_kind,
    caption_accuracy,
    detect_shapes,
    matches_caption,
    matches_spec,
)
from lesson_06_miniglide.shapes.render import BACKGROUND, render, render_captions
from lesson_06_miniglide.shapes.scenes import HELD_OUT, PALETTE, RELATIONS, SHAPES, parse, random_scene


def rendered_scenes(n, seed=0):
    rng = random.Random(seed)
    for i in range(n):
        scene = random_scene(rng, held_out=i % 4 == 0)
        yield scene, render(scene, rng)


def with_one_change(scene, rng):
    """Return the same scene with one attribute or the relation changed."""
    i = rng.randrange(len(scene.specs))
    spec = scene.specs[i]
    changes = {
        "colour": rng.choice([c for c in PALETTE if c != spec.colour]),
        "shape": rng.choice([s for s in SHAPES if s != spec.shape]),
    }
    if spec.size:
        changes["size"] = "small" if spec.size == "large" else "large"
    if scene.relation is None:
        changes["number"] = rng.choice([n for n in (1, 2, 3) if n != spec.number])
    else:
        changes["relation"] = rng.choice([r for r in RELATIONS if r != scene.relation])
    attribute = rng.choice(list(changes))
    if attribute == "relation":
        return scene._replace(relation=changes[attribute])
    specs = list(scene.specs)
    specs[i] = spec._replace(**{attribute: changes[attribute]})
    return scene._replace(specs=tuple(specs))


# -- the checker ---------------------------------------------------------------------------------------------


def test_the_checker_accepts_every_rendered_scene_and_rejects_every_changed_caption():
    rng = random.Random(1)
    rendered = list(rendered_scenes(300))
    assert all(matches_caption(image, str(scene)) for scene, image in rendered)
    accepted = [matches_caption(image, str(with_one_change(scene, rng))) for scene, image in rendered]
    assert sum(accepted) <= 3  # of 300


def test_the_checker_rejects_every_changed_image():
    rng = random.Random(2)
    accepted = [
        matches_caption(render(with_one_change(scene, rng), rng), str(scene))
        for scene, _ in rendered_scenes(300, 3)
    ]
    assert sum(accepted) <= 3


def test_a_palette_adds_a_colour_only_where_it_is_given():
    rng = random.Random(3)
    white = render(parse("a large white square"), rng)
    pink = (25 + (white - 25.0) / 220 * (np.array([250, 130, 190]) - 25)).round().astype(np.uint8)
    palette = PALETTE | {"pink": (250, 130, 190)}
    assert matches_caption(pink, "a large pink square", palette)
    assert not matches_caption(white, "a large pink square", palette)
    assert detect_shapes(pink) is None
    with pytest.raises(ValueError, match="pink"):
        matches_caption(pink, "a large pink square")
    for scene, image in rendered_scenes(100):
        assert matches_caption(image, str(scene), palette)


def test_the_checker_rejects_images_with_other_things_than_shapes():
    rng = random.Random(0)
    scene = parse("a large red circle")
    image = render(scene, rng)
    assert matches_caption(image, str(scene))
    grain = np.random.RandomState(0).randn(*image.shape) * 8
    assert matches_caption((image + grain).clip(0, 255).astype(np.uint8), str(scene))  # a little is tolerated
    noisy = np.random.RandomState(0).randint(0, 256, image.shape, np.uint8)
    assert not matches_caption(noisy, str(scene))
    image[2:6, 2:12] = (60, 200, 80)  # a green bar next to it
    assert not matches_caption(image, str(scene))


def test_the_checker_rejects_images_that_are_nearly_right():
    y, x = np.mgrid[:64, :64] - 32

    def painted(mask, colour=(230, 50, 50)):
        image = np.full((64, 64, 3), BACKGROUND, np.uint8)
        image[mask] = colour
        return image

    right, caption = painted(np.hypot(x, y) < 9), "a large red circle"
    assert matches_caption(right, caption)
    second, specks = right.copy(), right.copy()
    second[np.hypot(x + 20, y) < 9] = (115, 20, 20)
    specks[2:60:10, 2:5] = (60, 200, 80)
    wrong = [second, specks, painted(abs(x) + abs(y) < 12), painted(np.hypot(x / 1.22, y * 1.22) < 9)]
    wrong += [painted(np.hypot(x + 30, y) < 9), painted(np.hypot(x, y) < 30)]
    wrong += [painted(np.hypot(x, y) < 9, (255, 130, 0)), painted(np.hypot(x, y) < 2)]
    assert not any(matches_caption(image, caption) for image in wrong)


def test_accuracies_by_kind_of_caption():
    shown_and_said = [
        ("a large red circle", "a large red circle"),
        ("a large red circle", "a small red circle"),
        ("three green triangles", "three green triangles"),
        ("two white squares", "two white squares"),
        ("a red circle left of a blue square", "a red circle left of a blue square"),
        ("a red circle above a blue square", "a blue square below a red circle"),
        (
            "a red circle above a blue square",
            "a red circle below a blue square",
        ),  # only the relation is wrong
        ("a red circle above a blue square", "a red circle above a white square"),
    ]
    shown, said = map(list, zip(*shown_and_said))
    images = render_captions(shown, 0)
    assert caption_accuracy(images, said) == 5 / 8
    assert accuracy_by_kind(images, said) == {
        "single_accuracy": 1 / 2,
        "count_accuracy": 1,
        "pair_accuracy": 3 / 4,
        "relation_accuracy": 2 / 3,  # of the three pairs whose shapes are right
    }
    assert accuracy_by_kind(images[1:2], said[1:2]) == {
        "single_accuracy": 0,
        "count_accuracy": None,
        "pair_accuracy": None,
        "relation_accuracy": None,
    }


# -- scenes and captions -------------------------------------------------------------------------------------


def test_captions_describe_the_scene_completely():
    for scene, _ in rendered_scenes(100):
        assert parse(str(scene)) == scene
    for nonsense in ("a dog", "two red circle", "a red circle beside a blue square", ""):
        with pytest.raises(ValueError, match="describes no shapes of this data set"):
            parse(nonsense)
    with pytest.raises(ValueError, match="a relation is between two single shapes"):
        parse("two red circles left of a blue square")


def test_half_of_the_scenes_are_pairs_and_all_relations_are_equally_frequent():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(4000)]
    relations = Counter(scene.relation for scene in scenes)
    assert set(relations) == {None, "left of", "right of", "above", "below"}
    assert 0.47 < relations.pop(None) / 4000 < 0.53  # a standard deviation is 0.008
    assert all(0.22 < count / relations.total() < 0.28 for count in relations.values())  # here it is 0.010


def test_shapes_are_where_the_relation_says():
    rng = random.Random(0)
    first = {"x": [], "y": []}
    for scene in (random_scene(rng) for _ in range(600)):
        if scene.relation:
            a, b = detect_shapes(render(scene, rng))
            if not matches_spec(a, scene.specs[0]):
                a, b = b, a
            axis = "x" if scene.relation in ("left of", "right of") else "y"
            before = getattr(a, axis) < getattr(b, axis)  # y points down
            assert before == (scene.relation in ("left of", "above"))
            first[axis].append(before)
    for before in first.values():  # the order in the caption does not say where; a standard deviation is 0.04
        assert 0.35 < np.mean(before) < 0.65


def test_held_out_pairs_never_come_up_in_training():
    def pairs(held_out):
        captions = make_shapes(300, held_out=held_out).captions
        return [{(s.colour, s.shape) for s in parse(c).specs} & set(HELD_OUT) for c in captions]

    assert not any(pairs(False)) and all(pairs(True))
