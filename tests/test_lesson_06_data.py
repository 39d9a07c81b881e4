"""Lesson 6's data: five layouts, all kinds of broken files, a cache that survives being killed, shapes."""

import json
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common.command import UserError
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_06_miniglide import cache, shapes
from lesson_06_miniglide.cache import load_cache
from lesson_06_miniglide.captioned_images import captioned_images, drawn_shapes, make_tokenizer
from lesson_06_miniglide.sources import list_files, read_records
from tests.conftest import ROOT


def picture(seed=0, size=(40, 30)):
    pixels = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def save(image, path, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)


def sidecar(folder, name, image, caption, **settings):
    save(image, folder / name, **settings)
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def img2dataset_row(folder, key, status="success", image=True, caption="a photo"):
    if image:
        save(picture(int(key)), folder / key[:5] / f"{key}.jpg")
    row = {"caption": caption, "key": key, "status": status, "url": None}
    (folder / key[:5]).mkdir(parents=True, exist_ok=True)
    (folder / key[:5] / f"{key}.json").write_text(json.dumps(row))


def coco(folder, there, listed, captions):
    """MS COCO's layout: numbers of the images there, of those in its list, and captions (number, text)."""
    for n in there:
        save(picture(n), folder / "val2017" / f"{n:012}.jpg")
    images = [{"id": n, "file_name": f"{n:012}.jpg"} for n in listed]
    annotations = [{"image_id": n, "caption": text} for n, text in captions]
    (folder / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "annotations" / "captions_val2017.json").write_text(content)


def manifest(cache_dir):
    return json.loads(next(cache_dir.glob("*/manifest.json")).read_text())


# -- layouts -------------------------------------------------------------------------------------------------


def test_img2dataset_skips_failed_rows_and_stats(tmp_path):
    for i in range(3):
        img2dataset_row(tmp_path, f"00000000{i}", caption=f"caption {i}")
    img2dataset_row(tmp_path, "000000003", status="failed_to_download", image=False)
    (tmp_path / "00000_stats.json").write_text('{"count": 4}')
    images, captions = load_cache(tmp_path)  # one of four, but a dead link is no damage
    assert images.shape == (3, 64, 64, 3) and captions == ["caption 0", "caption 1", "caption 2"]
    assert manifest(tmp_path / ".cache")["skipped"] == {"never downloaded": ["00000/000000003.json"]}


def test_the_caption_of_a_dog_is_the_whole_breed(tmp_path):
    for name in ("n02089078-black-and-tan_coonhound", "n02085620-Chihuahua"):
        save(picture(), tmp_path / "Images" / name / "x.jpg")
    for start in (tmp_path, tmp_path / "Images"):  # the folder above Images, or Images itself
        records = read_records(start, list_files(start), dogs=True)
        assert sorted(r.caption for r in records) == ["Chihuahua", "black-and-tan coonhound"]
        assert read_records(start, list_files(start)) == records  # seen without --dogs, too


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_imagefolder(tmp_path, ending):
    for split in ("train", "test"):
        save(picture(), tmp_path / split / "a.png")
    rows = [("a.png", 'a "red", small fox'), ("missing.png", "nothing")]
    if ending == "jsonl":
        text = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    else:
        text = 'file_name,text\na.png,"a ""red"", small fox"\nmissing.png,nothing\n'
    (tmp_path / "train" / f"metadata.{ending}").write_text(text)
    records = read_records(tmp_path, list_files(tmp_path))
    assert [tuple(r) for r in records] == [
        ("train/a.png", 'a "red", small fox', None),
        ("train/missing.png", "nothing", "its image is missing"),
        ("test/a.png", "", "no caption is for it"),
    ]
    assert len(load_cache(tmp_path, allow_broken=True)[0]) == 1
    (tmp_path / "train" / f"metadata.{ending}").write_text(text.replace("missing.png", "./a.png"))
    assert len(load_cache(tmp_path)[0]) == 2  # an image of another list is no damage


def test_coco(tmp_path):
    captions = [(n, f"{n} {which}") for which in ("first", "second") for n in (285, 139)]
    coco(tmp_path, (139, 285, 777), (139, 285, 632), captions)
    records = read_records(tmp_path, list_files(tmp_path))
    assert [(r.caption, r.problem) for r in records] == [
        ("139 first", None),
        ("285 first", None),
        ("", "its image is missing"),
        ("", "no caption is for it"),
    ]
    assert records[0].image == "val2017/000000000139.jpg"


def test_a_folder_without_captions_is_refused(tmp_path):
    save(picture(), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"no images with captions; looked for .*metadata\.jsonl"):
        load_cache(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        load_cache(tmp_path / "nowhere")


# -- what can be wrong with files ----------------------------------------------------------------------------


def test_every_kind_of_file_is_converted_or_skipped_and_listed(tmp_path):
    data, cache_dir = tmp_path / "data", tmp_path / "cache"
    rgb, palette = picture(), picture().quantize(16)
    sidecar(data, "00_plain.jpg", rgb, "plain")
    sidecar(data, "01_gray.png", rgb.convert("L"), "gray")
    transparent = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    sidecar(data, "02_rgba.png", transparent, "transparent")
    sidecar(data, "03_palette.png", palette, "palette")
    sidecar(data, "04_cmyk.jpg", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "cmyk")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    halves = Image.new("RGB", (40, 20), "black")
    halves.paste("white", (0, 0, 20, 20))
    sidecar(data, "05_rotated.jpg", halves, "rotated", exif=exif)
    sidecar(data, "06_truncated.jpg", picture(size=(200, 200)), "truncated")
    whole = (data / "06_truncated.jpg").read_bytes()
    (data / "06_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "07_noise.png").write_bytes(b"no image at all")
    (data / "07_noise.txt").write_text("noise")
    sidecar(data, "08_empty.png", rgb, "  \n")
    sidecar(data, "09_long.png", rgb, "word " * 2000)
    sidecar(data, "10_greek.png", rgb, "ένας σκύλος")
    save(rgb, data / "11_no_caption.png")
    sixteen = Image.fromarray(np.full((20, 20), 128 * 256, np.uint16))
    sidecar(data, "12_sixteen.png", sixteen, "16 bits")

    with pytest.raises(UserError, match=r"23\.1% of its records are broken .*06_truncated.*--allow-broken"):
        load_cache(data, cache_dir=cache_dir)
    images, captions = load_cache(data, cache_dir=cache_dir, allow_broken=True)
    expected = ["plain", "gray", "transparent", "palette", "cmyk", "rotated", "", "word " * 1999 + "word"]
    assert captions == [*expected, "ένας σκύλος", "16 bits"]
    assert manifest(cache_dir)["skipped"] == {
        "broken, or no image": ["06_truncated.jpg", "07_noise.png"],
        "its .txt is missing": ["11_no_caption.png"],
    }
    assert manifest(cache_dir)["converted"] == {
        "gray": ["01_gray.png"],
        "transparent": ["02_rgba.png"],
        "palette": ["03_palette.png"],
        "CMYK": ["04_cmyk.jpg"],
        "rotated by its EXIF": ["05_rotated.jpg"],
        "empty caption": ["08_empty.png"],
        "long caption": ["09_long.png"],
        "caption with other letters than ASCII": ["10_greek.png"],
        "16 bits": ["12_sixteen.png"],
    }
    by_name = dict(zip(captions, images))
    assert (by_name["transparent"] == 255).all()  # what is transparent is white
    assert abs(by_name["16 bits"].astype(int) - 128).max() <= 1
    assert by_name["cmyk"].mean((0, 1))[0] > 200 > 60 > by_name["cmyk"].mean((0, 1))[1]  # red
    upright = by_name["rotated"].mean((1, 2))  # the white half, which lay on the left, is on top
    assert upright[:28].min() > 200 and upright[36:].max() < 60


def test_metadata_as_spreadsheets_and_odd_captions_write_it(tmp_path):
    for folder in ("csv", "jsonl"):
        for name in ("a.png", "b.JPG"):
            save(picture(), tmp_path / folder / "sub" / name)
    text = '\ufefffile_name,text\nsub/a.png,"two\nlines"\n./sub/b.JPG,x\n'
    (tmp_path / "csv" / "metadata.csv").write_text(text, encoding="utf-8")
    rows = [
        {"file_name": "sub/a.png", "text": "one\u2028caption"},
        {"file_name": "sub/b.JPG", "text": "hi \ud83d"},
    ]
    text = "\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\n" + json.dumps(rows[1]) + "\n"
    (tmp_path / "jsonl" / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert load_cache(tmp_path / "csv")[1] == ["two lines", "x"]
    assert load_cache(tmp_path / "jsonl")[1] == ["one caption", "hi ?"]


def test_metadata_without_captions_is_refused(tmp_path):
    save(picture(), tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,x\n")
    with pytest.raises(UserError, match="no column `text`, only caption, file_name"):
        load_cache(tmp_path)


def test_odd_things_in_a_folder(tmp_path):
    sidecar(tmp_path, "a.png", picture(), "a")
    (tmp_path / "info.json").write_text("{}")  # not img2dataset's
    (tmp_path / "a.json").write_text('{"tags": ["x"]}')
    (tmp_path / "dead.png").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    save(picture(), tmp_path / "B.PNG")
    (tmp_path / "B.TXT").write_text("b")
    assert sorted(load_cache(tmp_path)[1]) == ["a", "b"]


def test_dead_links_do_not_hide_broken_images(tmp_path):
    for i in range(20):
        img2dataset_row(tmp_path, f"0000000{i:02}", "success" if i < 2 else "failed_to_download", image=i < 2)
    (tmp_path / "00000" / "000000001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"50\.0% of its records are broken"):
        load_cache(tmp_path)


def test_broken_json_and_missing_images(tmp_path):
    for i in range(50):
        img2dataset_row(tmp_path, f"0000000{i:02}")
    (tmp_path / "00000" / "000000007.json").write_text('{"caption": "a pho')
    (tmp_path / "00000" / "000000009.jpg").unlink()
    images, _ = load_cache(tmp_path)  # 4 %
    assert len(images) == 48
    with pytest.raises(UserError, match=r"8\.0% of its records are broken"):
        for name in ("000000020.json", "000000030.jpg"):
            (tmp_path / "00000" / name).unlink()
        (tmp_path / "00000" / "000000030.json").write_text("")
        load_cache(tmp_path)
    images, _ = load_cache(tmp_path, allow_broken=True)
    assert len(images) == 46
    skipped = {
        "its .json is broken": ["00000/000000007.jpg", "00000/000000030.json"],
        "its image is missing": ["00000/000000009.json"],
        "its .json is missing": ["00000/000000020.jpg"],
    }
    assert manifest(tmp_path / ".cache")["skipped"] == skipped


# -- the cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 4)
    for i in range(18):
        sidecar(tmp_path / "data", f"{i:02}.png", picture(i), f"number {i}")
    (tmp_path / "data" / "05.png").write_bytes(b"broken")
    return tmp_path / "data"


def test_pixels_are_those_of_pillow(many):
    images, captions = load_cache(many, allow_broken=True)
    assert captions[:6] == [f"number {i}" for i in (0, 1, 2, 3, 4, 6)]
    squished = picture(6).resize((64, 64), Image.Resampling.BICUBIC)
    assert (images[5] == np.asarray(squished)).all()
    cropped, _ = load_cache(many, resize="crop", allow_broken=True)
    middle = picture(6).crop((5, 0, 35, 30)).resize((64, 64), Image.Resampling.BICUBIC)
    assert abs(cropped[5].astype(int) - np.asarray(middle)).max() <= 8
    assert abs(cropped[5].astype(int) - np.asarray(squished)).max() > 50


def test_a_limit_takes_exactly_so_many_whole_images(many):
    images, captions = load_cache(many, limit=7, allow_broken=True)
    assert len(images) == 7 and captions[-1] == "number 7"
    said = manifest(many / ".cache")
    assert said["images"] == 7 and said["records"] == 8  # up to the seventh, one of them broken
    assert len(load_cache(many, limit=4)[0]) == 4  # none of the first four is


def test_a_large_jpeg_is_resized_as_well(tmp_path):
    sidecar(tmp_path, "large.jpg", picture(1, (700, 500)), "large", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        plain = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert abs(load_cache(tmp_path)[0][0] - plain).max() <= 6


def test_a_cache_may_lie_in_the_data_folder(many, capsys):
    for _ in range(2):
        assert len(load_cache(many, cache_dir=many / "cache", allow_broken=True)[0]) == 17
    assert capsys.readouterr().out.count("data: 17 images") == 1  # built once
    with pytest.raises(UserError, match="name another folder"):
        load_cache(many, cache_dir=many)


def test_data_sets_of_one_name_share_a_cache_folder(tmp_path):
    for i in (1, 2):
        sidecar(tmp_path / str(i) / "photos", "a.png", picture(), f"{i}")
    caches = {i: load_cache(tmp_path / str(i) / "photos", cache_dir=tmp_path / "c")[1] for i in (1, 2)}
    assert caches == {1: ["1"], 2: ["2"]} and len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_build_that_was_killed_goes_on(many, monkeypatch, after):
    whole, captions = load_cache(many, allow_broken=True)
    whole, calls = np.array(whole), []
    folder = next((many / ".cache").iterdir())
    lines = (folder / "chunks.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.json").unlink()
    (folder / "chunks.jsonl").write_text("".join(lines[:after]) + lines[after][:20])  # killed within a line
    decode = cache.decode
    monkeypatch.setattr(cache, "decode", lambda *args: calls.append(1) or decode(*args))
    again, captions_again = load_cache(many, allow_broken=True)
    assert (again == whole).all() and captions_again == captions
    assert len(calls) == 18 - 4 * after


def test_two_programs_at_once(many):
    code = "import sys; from lesson_06_miniglide import cache; cache.CHUNK = 2; "
    code += "print(len(cache.load_cache(sys.argv[1], allow_broken=True)[0]))"
    command = [sys.executable, "-c", code, str(many)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].split()[-1] for process in both] == ["17", "17"]
    folder = next((many / ".cache").iterdir())
    assert (folder / "images.uint8").stat().st_size == 17 * 3 * 64 * 64


def test_a_damaged_cache_is_built_again(many):
    whole = np.array(load_cache(many, allow_broken=True)[0])
    folder = next((many / ".cache").iterdir())
    for name in ("images.uint8", "settings.json"):
        (folder / name).write_bytes(b"")
        assert (load_cache(many, allow_broken=True)[0] == whole).all()


def test_odd_files_leave_no_warnings_switched_off(many):
    before = list(warnings.filters)
    load_cache(many, allow_broken=True)
    assert warnings.filters == before


def test_the_cache_is_used_and_follows_its_source(many, monkeypatch):
    load_cache(many, allow_broken=True)
    calls, decode = [], cache.decode
    monkeypatch.setattr(cache, "decode", lambda *args: calls.append(1) or decode(*args))
    load_cache(many, allow_broken=True)
    assert not calls
    (many / "03.txt").write_text("another caption")
    assert load_cache(many, allow_broken=True)[1][3] == "another caption" and len(calls) == 18


def test_a_cache_that_cannot_be_written(many):
    (many.parent / "file").write_text("")
    with pytest.raises(UserError, match="--cache-dir"):
        load_cache(many, cache_dir=many.parent / "file", allow_broken=True)


# -- batches -------------------------------------------------------------------------------------------------


def test_batches_hold_images_with_their_captions():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3) * 50
    data = captioned_images("x", images, ["zero", "odd", "two", "odd", "four"])
    tokenizer = make_tokenizer(data.captions, TextConfig(300, context=4))
    x_0, tokens, _ = data.tokenized(tokenizer).batch(torch.tensor([3, 0]))
    assert torch.allclose(x_0[:, 0, 0, 0], torch.tensor([150, 0]) / 127.5 - 1)
    assert torch.equal(tokens, tokenizer.encode(["odd", "zero"])[0].int())
    train, held_back = data.split(0.4)
    assert sorted([*train.rows.tolist(), *held_back.rows.tolist()]) == [0, 1, 2, 3, 4] and len(held_back) == 2
    assert train.captions_of(torch.arange(3)) == [
        ["zero", "odd", "two", "odd", "four"][i] for i in train.rows
    ]


def test_captions_that_are_cut_are_counted(capsys):
    captions = ["short", "long " * 99, "long " * 99]
    data = captioned_images("x", np.zeros((3, 64, 64, 3), np.uint8), captions)
    assert data.tokenized(make_tokenizer(captions, TextConfig(300, context=8))).cut == 2
    assert "2 of 3 are cut after 8 tokens" in capsys.readouterr().out


# -- shapes --------------------------------------------------------------------------------------------------


def scenes(n, seed=0):
    rng = random.Random(seed)
    for i in range(n):
        scene = shapes.random_scene(rng, held_out=i % 4 == 0)
        yield scene, shapes.draw(scene, rng)


def changed(scene, rng):
    """The same scene with one attribute or the relation changed."""
    i = rng.randrange(len(scene.groups))
    group = scene.groups[i]
    other = {
        "colour": rng.choice([c for c in shapes.PALETTE if c != group.colour]),
        "shape": rng.choice([s for s in shapes.SHAPES if s != group.shape]),
    }
    if group.size:
        other["size"] = "small" if group.size == "large" else "large"
    if scene.relation is None:
        other["count"] = rng.choice([n for n in (1, 2, 3) if n != group.count])
    else:
        other["relation"] = rng.choice([r for r in shapes.RELATIONS if r != scene.relation])
    what = rng.choice(list(other))
    if what == "relation":
        return scene._replace(relation=other[what])
    groups = list(scene.groups)
    groups[i] = group._replace(**{what: other[what]})
    return scene._replace(groups=tuple(groups))


def test_the_checker_accepts_every_drawing_and_rejects_every_change():
    rng = random.Random(1)
    drawings = list(scenes(300))
    assert all(shapes.check(image, str(scene)) for scene, image in drawings)
    accepted = [shapes.check(image, str(changed(scene, rng))) for scene, image in drawings]
    assert sum(accepted) <= 3  # of 300


def test_a_changed_drawing_is_rejected_too():
    rng = random.Random(2)
    accepted = [
        shapes.check(shapes.draw(changed(scene, rng), rng), str(scene)) for scene, _ in scenes(300, 3)
    ]
    assert sum(accepted) <= 3


def test_the_checker_rejects_what_is_no_shape():
    rng = random.Random(0)
    scene = shapes.parse("a large red circle")
    image = shapes.draw(scene, rng)
    assert shapes.check(image, str(scene))
    grain = np.random.RandomState(0).randn(*image.shape) * 8
    assert shapes.check((image + grain).clip(0, 255).astype(np.uint8), str(scene))  # a little is forgiven
    noisy = np.random.RandomState(0).randint(0, 256, image.shape, np.uint8)
    assert not shapes.check(noisy, str(scene))
    image[2:6, 2:12] = (60, 200, 80)  # a green bar beside it
    assert not shapes.check(image, str(scene))


def test_the_checker_rejects_what_is_nearly_right():
    y, x = np.mgrid[:64, :64] - 32

    def painted(mask, colour=(230, 50, 50)):
        image = np.full((64, 64, 3), shapes.BACKGROUND, np.uint8)
        image[mask] = colour
        return image

    right, caption = painted(np.hypot(x, y) < 9), "a large red circle"
    assert shapes.check(right, caption)
    second, specks = right.copy(), right.copy()
    second[np.hypot(x + 20, y) < 9] = (115, 20, 20)
    specks[2:60:10, 2:5] = (60, 200, 80)
    wrong = [second, specks, painted(abs(x) + abs(y) < 12), painted(np.hypot(x / 1.22, y * 1.22) < 9)]
    wrong += [painted(np.hypot(x + 30, y) < 9), painted(np.hypot(x, y) < 30)]
    wrong += [painted(np.hypot(x, y) < 9, (255, 130, 0)), painted(np.hypot(x, y) < 2)]
    assert not any(shapes.check(image, caption) for image in wrong)


def test_captions_say_the_scene_and_nothing_else():
    for scene, _ in scenes(100):
        assert shapes.parse(str(scene)) == scene
    for nonsense in ("a dog", "two red circle", "a red circle beside a blue square", ""):
        with pytest.raises(ValueError, match="names no shapes"):
            shapes.parse(nonsense)
    with pytest.raises(ValueError, match="only single shapes"):
        shapes.parse("two red circles left of a blue square")


def test_what_is_named_first_mostly_stands_on_the_left_or_above():
    rng = random.Random(0)
    first = {"x": [], "y": []}
    for scene in (shapes.random_scene(rng) for _ in range(600)):
        if scene.relation:
            a, b = shapes.read(shapes.draw(scene, rng))
            if not shapes.fits(a, scene.groups[0]):
                a, b = b, a
            axis = "x" if scene.relation in ("left of", "right of") else "y"
            first[axis].append(getattr(a, axis) < getattr(b, axis))
    for before in first.values():  # three of four; a standard deviation is 0.036
        assert 0.6 < np.mean(before) < 0.9


def test_held_out_pairs_never_come_up_in_training():
    def pairs(held_out):
        captions = drawn_shapes(300, held_out=held_out).captions
        return [
            {(g.colour, g.shape) for g in shapes.parse(c).groups} & set(shapes.HELD_OUT) for c in captions
        ]

    assert not any(pairs(False)) and all(pairs(True))
