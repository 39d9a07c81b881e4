"""--crop-to-box: photos cropped to bounding boxes as in Stanford Dogs, and all kinds of wrong annotations."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common.cli import run_command
from common.training.run_dir import saved_config
from lesson_06_miniglide import train
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.image_data.captioned_images import load_images
from lesson_06_miniglide.image_data.decoding import (
    BROKEN_BOX,
    NO_BOX,
    SEVERAL_BOXES,
    Box,
    parse_box,
    square_crop,
)

BREED = "n02085620-Chihuahua"
BOMB = '<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "1"><!ENTITY b "&a;&a;">]>'


def annotation(*boxes, size=(100, 60)):
    """Return Pascal VOC's XML, as Stanford Dogs has it, with boxes (xmin, ymin, xmax, ymax)."""
    objects = "".join(
        f"<object><name>Chihuahua</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    width, height = size
    return (
        f"<annotation><folder>02085620</folder><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{objects}</annotation>"
    )


def with_a_white_square(square=(40, 20, 60, 40), size=(100, 60)):
    image = Image.new("RGB", size, "black")
    image.paste("white", square)
    return image


def write(folder, name, image, xml=None, **settings):
    """Write an image of Stanford Dogs' layout and, if there is one, its annotation."""
    path = folder / "Images" / BREED / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)
    if xml is not None:
        boxes = folder / "Annotation" / BREED
        boxes.mkdir(parents=True, exist_ok=True)
        (boxes / path.stem).write_text(xml)


def manifest(folder):
    return json.loads(next((folder / ".cache").glob("*_box/manifest.json")).read_text())


def names(*numbers):
    return [f"Images/{BREED}/{number}" for number in numbers]


@pytest.mark.parametrize(
    "box, width, height, expected",
    [
        ((0.4, 0.25, 0.6, 0.75), 100, 60, (35, 15, 65, 45)),  # wider around the centre
        ((0.0, 0.25, 0.2, 0.75), 100, 60, (0, 15, 30, 45)),  # shifted from the left edge
        ((0.8, 0.25, 1.0, 0.75), 100, 60, (70, 15, 100, 45)),  # and from the right one
        ((0.1, 0.5, 0.5, 0.6), 100, 60, (10, 13, 50, 53)),  # higher around the centre
        ((0.1, 0.9, 0.5, 1.0), 100, 60, (10, 20, 50, 60)),  # shifted up
        ((0.1, 0.0, 0.9, 0.5), 100, 60, (10, 0, 90, 60)),  # no higher than the image
        ((0.5, 0.5, 0.501, 0.501), 100, 60, (50, 30, 51, 31)),  # at least a pixel
    ],
)
def test_a_crop_is_a_square_around_the_box_inside_the_image(box, width, height, expected):
    left, top, right, bottom = square_crop(Box(*box), width, height)
    assert (left, top, right, bottom) == pytest.approx(expected, abs=1)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if expected[2] - expected[0] == expected[3] - expected[1]:
        assert right - left == bottom - top


def test_pixels_are_those_of_the_box(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 100, 3), np.uint8))
    write(tmp_path, "a.png", image, annotation((30, 10, 70, 50)))
    images, captions = load_cache(tmp_path, crop_to_box=True)
    assert captions == ["Chihuahua"]
    expected = image.crop((30, 10, 70, 50)).resize((64, 64), Image.Resampling.BICUBIC)
    assert (images[0] == np.asarray(expected)).all()
    whole, _ = load_cache(tmp_path)
    assert (whole[0] == np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))).all()
    assert len(list((tmp_path / ".cache").iterdir())) == 2  # each has its own cache


def test_a_changed_box_is_another_cache(tmp_path):
    write(tmp_path, "a.png", with_a_white_square(), annotation((40, 20, 60, 40)))
    assert load_cache(tmp_path, crop_to_box=True)[0].min() == 255
    write(tmp_path, "a.png", with_a_white_square(), annotation((0, 0, 20, 20)))
    assert load_cache(tmp_path, crop_to_box=True)[0].max() == 0


@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize("annotated", [(100, 60), (200, 120), (0, 0)])
def test_boxes_are_those_of_the_annotated_size(scale, annotated, tmp_path):
    """Stored images may be smaller than what was annotated; a large JPEG is decoded at a part of its size."""
    square, size = np.array([40, 20, 60, 40]), np.array([100, 60])
    image = with_a_white_square(tuple(scale * square), tuple(scale * size))
    unit = annotated[0] / 100 or scale  # without a size, pixels are those of the image
    write(tmp_path, "a.jpg", image, annotation(unit * square, size=annotated), quality=95)
    images, _ = load_cache(tmp_path, crop_to_box=True)
    assert images.shape[0] == 1 and images[0, 4:-4, 4:-4].min() > 240


def test_a_box_is_that_of_the_stored_pixels_and_the_crop_is_then_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed after a quarter turn to the right
    image = with_a_white_square((40, 20, 50, 40))  # white in the left half of the box
    write(tmp_path, "a.jpg", image, annotation((40, 20, 60, 40)), exif=exif, quality=95)
    rows = load_cache(tmp_path, crop_to_box=True)[0][0].mean((1, 2))  # on top after the turn
    assert rows[:24].min() > 200 and rows[40:].max() < 60
    assert manifest(tmp_path)["converted"] == {"rotated by its EXIF": names("a.jpg")}


def test_wrong_annotations_are_listed_and_their_images_used_whole(tmp_path):
    white = with_a_white_square()
    good = (40, 20, 60, 40)
    wrong = {
        "b_missing": None,
        "c_cut": annotation(good)[:-30],
        "d_empty": "",
        "e_no_box": annotation(),
        "f_words": annotation(("left", 20, 60, 40)),
        "g_inverted": annotation((60, 20, 40, 40)),
        "h_outside": annotation((140, 20, 160, 40)),
        "i_nan": annotation(("nan", 20, 60, 40)),
        "j_entities": BOMB + annotation(good).replace(">40<", ">&b;<"),
        "k_encoding": '<?xml version="1.0" encoding="no-such"?>' + annotation(good),
        "l_half": annotation(good).replace("<xmax>60</xmax>", ""),
    }
    write(tmp_path, "a_good.png", white, annotation(good))
    for name, xml in wrong.items():
        write(tmp_path, f"{name}.png", white, xml)
    write(tmp_path, "m_two.png", white, annotation(good, (0, 0, 20, 20)))
    write(tmp_path, "n_beyond.png", white, annotation((-40, 20, 60, 40)))
    (tmp_path / "Annotation" / BREED / "o_folder").mkdir()
    write(tmp_path, "o_folder.png", white)
    (tmp_path / "Images" / BREED / "p_broken.png").write_bytes(b"no image")
    images, captions = load_cache(tmp_path, crop_to_box=True, allow_broken=True)
    assert manifest(tmp_path)["converted"] == {
        NO_BOX: names("b_missing.png", "o_folder.png"),
        BROKEN_BOX: names(*(f"{name}.png" for name in list(wrong)[1:])),
        SEVERAL_BOXES: names("m_two.png"),
    }
    assert manifest(tmp_path)["skipped"] == {"broken, or no image": names("p_broken.png")}
    assert len(images) == len(captions) == 15
    brightness = images.mean((1, 2, 3))
    assert brightness[0] == brightness[12] == 255  # a_good, and the first box of m_two
    assert brightness[13] == pytest.approx(255 * 400 / 3600, abs=3)  # n_beyond, cut to 60 x 60 pixels
    assert (abs(brightness[[*range(1, 12), 14]] - 255 * 400 / 6000) < 3).all()  # whole


def test_a_document_type_is_refused_in_every_encoding():
    """Entities can grow to gigabytes; a search for the word in the bytes would not find it in UTF-16."""
    xml = BOMB + annotation((40, 20, 60, 40))
    for encoding in ("utf-8", "utf-16"):
        with pytest.raises(ValueError, match="no document type"):
            parse_box(xml.encode(encoding), (100, 60))
    assert parse_box(annotation((40, 20, 60, 40)).encode("utf-16"), (1, 1))[1] == 1


# -- wrong flags ---------------------------------------------------------------------------------------------


def refused(capsys, *flags):
    with pytest.raises(SystemExit, match="2"):
        run_command(train.main, train.Config, saved_config, argv=[*flags, "--crop-to-box", "--device", "cpu"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    return error


def test_without_annotations_one_line_says_so(place, capsys):
    write(place / "dogs", "a.png", with_a_white_square())
    before = sorted(place.rglob("*"))
    missing = "has no Annotation/<class>/<image> of bounding boxes next to Images/"
    assert missing in refused(capsys, "--data-dir", "dogs")
    (place / "dogs" / "Annotation" / BREED).mkdir(parents=True)
    assert missing in refused(capsys, "--data-dir", "dogs")  # an empty folder, too
    for flags in ([], ["--dataset-name", "someone/dogs"]):
        assert "--crop-to-box needs --data-dir" in refused(capsys, *flags)
    (place / "dogs" / "Annotation" / BREED).rmdir()
    (place / "dogs" / "Annotation").rmdir()
    assert sorted(place.rglob("*")) == before


def test_a_run_trains_on_the_crops_and_cannot_be_resumed_without(place, capsys):
    for i in range(4):
        write(place / "dogs", f"{i}.png", with_a_white_square(), annotation((40, 20, 60, 40)))
    few = ["--num-channels", "24", "--num-head-channels", "8", "--xf-layers", "1", "--batch-size", "2"]
    few += ["--data-dir", "dogs", "--preview-prompt", "a", "--out", "run", "--device", "cpu", "--dry-run"]
    run_command(train.main, train.Config, saved_config, argv=[*few, "--crop-to-box"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_command(train.main, train.Config, saved_config, argv=["--resume", "run", "--no-crop-to-box"])
    assert "--crop-to-box was True and cannot change" in capsys.readouterr().err


def test_other_commands_read_data_without_the_flag(tmp_path):
    """Configurations without crop_to_box get whole images."""
    write(tmp_path, "a.png", with_a_white_square(), annotation((40, 20, 60, 40)))
    flags = {"data_dir": str(tmp_path), "resize": "squish", "cache_dir": None, "allow_broken": False}
    images = load_images(SimpleNamespace(dogs=True, image_limit=None, flip=False, **flags)).images
    assert images.min() == 0 and not list((tmp_path / ".cache").glob("*_box"))


def test_the_photos_of_dogs_need_their_annotations(real_data, capsys):
    assert "has no Annotation" in refused(capsys, "--data-dir", str(real_data / "stanford_dogs_mini"))
