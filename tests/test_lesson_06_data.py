"""Lesson 6's data: the layouts, all kinds of broken files, a cache that survives interruptions, batches."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_06_miniglide.image_data import cache
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.image_data.captioned_images import captioned_images
from lesson_06_miniglide.image_data.layouts import list_files, read_records
from lesson_06_miniglide.image_data.tokenizers import make_tokenizer
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


def coco(folder, present, listed, captions):
    """Write MS COCO's layout: ids of the images present, of those listed, and captions (id, text)."""
    for n in present:
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
    images, captions = load_cache(tmp_path)  # one of four is missing, but a dead link is not damage
    assert images.shape == (3, 64, 64, 3) and captions == ["caption 0", "caption 1", "caption 2"]
    assert manifest(tmp_path / ".cache")["skipped"] == {"never downloaded": ["00000/000000003.json"]}


def test_the_caption_of_a_dog_is_the_whole_breed(tmp_path):
    for name in ("n02089078-black-and-tan_coonhound", "n02085620-Chihuahua"):
        save(picture(), tmp_path / "Images" / name / "x.jpg")
    for start in (tmp_path, tmp_path / "Images"):  # the folder above Images, or Images itself
        records = read_records(start, list_files(start), dogs=True)
        assert sorted(r.caption for r in records) == ["Chihuahua", "black-and-tan coonhound"]
        assert read_records(start, list_files(start)) == records  # detected without --dogs, too


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
    images, captions = load_cache(tmp_path)  # an image of another list is not damage
    assert len(images) == 1 and captions == [('a "red", small fox', "nothing")]  # two rows for one image


def test_coco(tmp_path):
    captions = [(n, f"{n} {which}") for which in ("first", "second") for n in (285, 139)]
    coco(tmp_path, (139, 285, 777), (139, 285, 632), captions)
    records = read_records(tmp_path, list_files(tmp_path))
    assert [(r.caption, r.problem) for r in records] == [
        (("139 first", "139 second"), None),
        (("285 first", "285 second"), None),
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


# -- broken and unusual files --------------------------------------------------------------------------------


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
    exif[0x0112] = 6  # rotated by a quarter turn
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
    assert (by_name["transparent"] == 255).all()  # transparent pixels become white
    assert abs(by_name["16 bits"].astype(int) - 128).max() <= 1
    assert by_name["cmyk"].mean((0, 1))[0] > 200 > 60 > by_name["cmyk"].mean((0, 1))[1]  # red
    upright = by_name["rotated"].mean((1, 2))  # the white half, on the left in the file, is on top
    assert upright[:28].min() > 200 and upright[36:].max() < 60


def test_metadata_with_byte_order_marks_line_breaks_and_surrogates(tmp_path):
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


def test_unusual_things_in_a_folder(tmp_path):
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
    monkeypatch.setattr(cache, "CHUNK_SIZE", 4)
    for i in range(18):
        sidecar(tmp_path / "data", f"{i:02}.png", picture(i), f"number {i}")
    (tmp_path / "data" / "05.png").write_bytes(b"broken")
    return tmp_path / "data"


def test_pixels_are_resized_by_pillow(many):
    images, captions = load_cache(many, allow_broken=True)
    assert captions[:6] == [f"number {i}" for i in (0, 1, 2, 3, 4, 6)]
    squished = picture(6).resize((64, 64), Image.Resampling.BICUBIC)
    assert (images[5] == np.asarray(squished)).all()
    cropped, _ = load_cache(many, resize="crop", allow_broken=True)
    middle = picture(6).crop((5, 0, 35, 30)).resize((64, 64), Image.Resampling.BICUBIC)
    assert abs(cropped[5].astype(int) - np.asarray(middle)).max() <= 8
    assert abs(cropped[5].astype(int) - np.asarray(squished)).max() > 50


def test_a_limit_takes_exactly_so_many_readable_images(many):
    images, captions = load_cache(many, limit=7, allow_broken=True)
    assert len(images) == 7 and captions[-1] == "number 7"
    counts = manifest(many / ".cache")
    assert counts["images"] == 7 and counts["records"] == 8  # one of the first eight is broken
    assert len(load_cache(many, limit=4)[0]) == 4  # none of the first four is broken


def test_a_large_jpeg_is_resized_as_well_as_a_small_one(tmp_path):
    sidecar(tmp_path, "large.jpg", picture(1, (700, 500)), "large", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        plain = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert abs(load_cache(tmp_path)[0][0] - plain).max() <= 6


def test_a_cache_may_be_inside_the_data_folder(many, capsys):
    for _ in range(2):
        assert len(load_cache(many, cache_dir=many / "cache", allow_broken=True)[0]) == 17
    assert capsys.readouterr().out.count("data: 17 images") == 1  # built once
    with pytest.raises(UserError, match="name another folder"):
        load_cache(many, cache_dir=many)


def test_data_sets_of_the_same_name_can_share_a_cache_folder(tmp_path):
    for i in (1, 2):
        sidecar(tmp_path / str(i) / "photos", "a.png", picture(), f"{i}")
    caches = {i: load_cache(tmp_path / str(i) / "photos", cache_dir=tmp_path / "c")[1] for i in (1, 2)}
    assert caches == {1: ["1"], 2: ["2"]} and len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_interrupted_build_continues(many, monkeypatch, after):
    whole, captions = load_cache(many, allow_broken=True)
    whole, calls = np.array(whole), []
    folder = next((many / ".cache").iterdir())
    lines = (folder / "chunks.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.json").unlink()
    (folder / "chunks.jsonl").write_text(
        "".join(lines[:after]) + lines[after][:20]
    )  # interrupted within a line
    decode = cache.decode
    monkeypatch.setattr(cache, "decode", lambda *args: calls.append(1) or decode(*args))
    again, captions_again = load_cache(many, allow_broken=True)
    assert (again == whole).all() and captions_again == captions
    assert len(calls) == 18 - 4 * after


def test_two_processes_at_once(many):
    code = "import sys; from lesson_06_miniglide.image_data import cache; cache.CHUNK_SIZE = 2; "
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


def test_warnings_are_not_left_switched_off(many):
    before = list(warnings.filters)
    load_cache(many, allow_broken=True)
    assert warnings.filters == before


def test_the_cache_is_reused_until_the_data_change(many, monkeypatch):
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


def test_batches_contain_images_with_their_captions():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3) * 50
    data = captioned_images("x", images, ["zero", "odd", "two", "odd", "four"])
    tokenizer = make_tokenizer(data.captions, TextConfig(300, context_length=4))
    x_0, tokens, _ = data.tokenized(tokenizer).batch(torch.tensor([3, 0]))
    assert torch.allclose(x_0[:, 0, 0, 0], torch.tensor([150, 0]) / 127.5 - 1)
    assert torch.equal(tokens, tokenizer.encode(["odd", "zero"])[0].int())
    train, val = data.split(0.4)
    assert sorted([*train.indices.tolist(), *val.indices.tolist()]) == [0, 1, 2, 3, 4] and len(val) == 2
    assert train.captions_for(torch.arange(3)) == [
        ["zero", "odd", "two", "odd", "four"][i] for i in train.indices
    ]


def test_truncated_captions_are_counted(capsys):
    captions = ["short", "long " * 99, "long " * 99]
    data = captioned_images("x", np.zeros((3, 64, 64, 3), np.uint8), captions)
    assert data.tokenized(make_tokenizer(captions, TextConfig(300, context_length=8))).num_truncated == 2
    assert "2 of 3 are truncated to 8 tokens" in capsys.readouterr().out
