"""An image is identified by its whole path, and nothing in a data folder is left out in silence."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import pytest

from common.errors import UserError
from common.files import read_json
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.image_data.layouts import list_files, read_records
from tests.conftest import ROOT
from tests.test_lesson_06_data import img2dataset_row, manifest, picture, save, sidecar


def photos(folder, *names):
    for i, name in enumerate(names):
        save(picture(i), folder / name)


def captions_file(path, captions):
    """Write MS COCO's captions: file name -> caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": name} for i, name in enumerate(captions)]
    annotations = [{"image_id": i, "caption": text} for i, text in enumerate(captions.values())]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def used(folder):
    """Return image -> caption of all images that can be used."""
    return {r.image: r.caption for r in read_records(folder, list_files(folder)) if not r.problem}


def problems(folder):
    """Return file -> reason of all files that cannot be used."""
    return {r.image: r.problem for r in read_records(folder, list_files(folder)) if r.problem}


# -- paths of images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "train2017", "images/train2017"])
@pytest.mark.parametrize("listed", ["train", "train2017"])
def test_splits_of_coco_with_the_same_names(tmp_path, train, listed):
    val = train.replace("train", "val")
    photos(tmp_path, f"{train}/0.jpg", f"{train}/sub/0.jpg", f"{val}/0.jpg", f"{val}/only.jpg")
    captions_file(tmp_path / f"annotations/captions_{listed}.json", {"0.jpg": "t", "sub/0.jpg": "sub"})
    captions = {"0.jpg": "v", "only.jpg": "only"}
    captions_file(tmp_path / f"annotations/captions_{listed.replace('train', 'val')}.json", captions)
    captions = {"0.jpg": "t", "sub/0.jpg": "sub"}
    expected = {f"{train}/{name}": text for name, text in captions.items()}
    assert used(tmp_path) == expected | {f"{val}/0.jpg": "v", f"{val}/only.jpg": "only"}
    assert not problems(tmp_path)


def test_an_image_of_another_split_does_not_stand_in_for_a_missing_one(tmp_path):
    photos(tmp_path, "train/0.jpg", "train/1.jpg", "val/0.jpg")
    captions_file(tmp_path / "captions_train.json", {"0.jpg": "t0", "1.jpg": "t1"})
    captions_file(tmp_path / "captions_val.json", {"0.jpg": "v0", "1.jpg": "v1"})
    captions_file(tmp_path / "captions_test.json", {"1.jpg": "no such folder"})
    assert used(tmp_path) == {"train/0.jpg": "t0", "train/1.jpg": "t1", "val/0.jpg": "v0"}
    expected = {"1.jpg": "its image is missing", "captions_test.json": "none of its images is here"}
    assert problems(tmp_path) == expected


def test_whole_paths_come_before_splits(tmp_path):
    photos(tmp_path, "train/0.jpg", "val/0.jpg")
    captions_file(tmp_path / "captions_train.json", {"val/0.jpg": "v", "train/0.jpg": "t"})
    assert used(tmp_path) == {"val/0.jpg": "v", "train/0.jpg": "t"}


def test_an_ambiguous_name_is_an_error_that_names_both_files(tmp_path):
    photos(tmp_path, "x/0.jpg", "y/0.jpg", "y/1.jpg")
    captions_file(tmp_path / "captions_all.json", {"1.jpg": "unique", "0.jpg": "which?"})
    with pytest.raises(UserError, match=r"captions_all\.json lists 0\.jpg, which may be x/0.jpg or y/0.jpg"):
        load_cache(tmp_path)
    captions_file(tmp_path / "captions_all.json", {"1.jpg": "unique", "y/0.jpg": "this"})
    assert used(tmp_path) == {"y/1.jpg": "unique", "y/0.jpg": "this"}
    (tmp_path / "captions_all.json").unlink()
    (tmp_path / "captions.txt").write_text("image,caption\n0.jpg,which?\n")
    with pytest.raises(UserError, match=r"which may be x/0.jpg or y/0.jpg"):
        load_cache(tmp_path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_as_other_machines_write_them(tmp_path, form):
    name = unicodedata.normalize(form, "Ménage à trois é.png")
    other = unicodedata.normalize("NFC" if form == "NFD" else "NFD", name)
    photos(tmp_path, f"sub/{name}", "sub/b.png", "sub/c.png", "sub/d.png", "other/d.png", "other/e.png")
    captions = {
        f"sub/{other}": "accents",
        "sub\\b.png": "backslash",
        str(tmp_path / "sub" / "c.png"): "absolute",
        "C:\\home\\me\\other\\d.png": "from another machine",
        "/home/me/data/e.png": "only its name",
    }
    images = [f"sub/{name}", "sub/b.png", "sub/c.png", "other/d.png", "other/e.png"]
    expected = dict(zip(images, captions.values()))
    rows = [json.dumps({"file_name": path, "text": text}) for path, text in captions.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert used(tmp_path) == expected
    (tmp_path / "metadata.jsonl").unlink()
    captions_file(tmp_path / "annotations" / "captions_x.json", captions)
    assert used(tmp_path) == expected
    shutil.rmtree(tmp_path / "annotations")
    (tmp_path / "sub" / other).with_suffix(".txt").write_text("accents", encoding="utf-8")
    assert used(tmp_path) == {f"sub/{name}": "accents"}


def test_metadata_of_a_folder_does_not_reach_into_another(tmp_path):
    photos(tmp_path, "train/a.png", "test/b.png", "c.png")
    (tmp_path / "train" / "metadata.csv").write_text(
        "file_name,text\na.png,a\nb.png,b\nc.png,c\n../c.png,up\n"
    )
    assert used(tmp_path) == {"train/a.png": "a", "c.png": "up"}


# -- nothing is left out in silence --------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_a_breed_in_a_linked_folder_is_used(tmp_path, inside):
    data = tmp_path / "data"
    photos(data, "Images/n02085620-Chihuahua/a.png")
    elsewhere = data / "raw" if inside else tmp_path / "raw"
    photos(elsewhere, "b.png")
    (data / "Images" / "n02099601-golden_retriever").symlink_to(elsewhere)
    expected = {"Images/n02085620-Chihuahua/a.png": "Chihuahua"}
    assert used(data) == expected | {"Images/n02099601-golden_retriever/b.png": "golden retriever"}
    assert problems(data) == ({"raw/b.png": "no caption is for it"} if inside else {})


def test_loops_and_dead_links(tmp_path):
    sidecar(tmp_path / "sub", "a.png", picture(), "a")
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "sub" / "self").symlink_to("self")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "there").symlink_to(tmp_path / "sub")
    (tmp_path / "dead_folder").symlink_to("nowhere")
    assert used(tmp_path) == {"sub/a.png": "a", "other/there/a.png": "a"}
    assert set(problems(tmp_path)) == {"dead_folder", "sub/self", "other/there/self"}
    assert set(problems(tmp_path).values()) == {"a dead link, or not a file"}
    assert load_cache(tmp_path)[1] == ["a", "a"]


def test_a_cache_behind_a_link_is_no_data(tmp_path, capsys):
    sidecar(tmp_path / "data", "a.png", picture(), "a")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "more")
    sidecar(tmp_path / "more", "b.png", picture(), "b")
    for _ in range(3):
        assert load_cache(tmp_path / "data", cache_dir=tmp_path / "more" / "cache")[1] == ["a", "b"]
    assert capsys.readouterr().out.count("data: 2 images") == 1  # built once


@pytest.mark.parametrize("suffix", ["avif", "heic", "HEIF", "jxl", "jp2"])
def test_images_in_formats_that_cannot_be_read_are_listed(tmp_path, suffix):
    sidecar(tmp_path / "s", "a.png", picture(), "a")
    img2dataset_row(tmp_path / "i", "000000001")
    photos(tmp_path / "m", "a.png")
    (tmp_path / "m" / "metadata.csv").write_text(f"file_name,text\na.png,a\nx.{suffix},x\n")
    photos(tmp_path / "d", "n02085620-Chihuahua/a.png")
    row = {"caption": "x", "status": "success"}
    for folder in (tmp_path / "s", tmp_path / "i", tmp_path / "m", tmp_path / "d" / "n02085620-Chihuahua"):
        (folder / f"x.{suffix}").write_bytes(b"pixels")
        (folder / "x.txt").write_text("x")
        if folder.name == "i":
            (folder / "x.json").write_text(json.dumps(row))
    for folder in "simd":
        with pytest.raises(UserError, match=f"x.{suffix}, its format cannot be read"):
            load_cache(tmp_path / folder)
        assert len(load_cache(tmp_path / folder, allow_broken=True)[0]) == 1
        assert any(f"x.{suffix}" in n[0] for n in manifest(tmp_path / folder / ".cache")["skipped"].values())


def test_a_folder_of_nothing_else_says_why(tmp_path):
    (tmp_path / "x.heic").write_bytes(b"pixels")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=r"none of its 1 records can be used \(the first: x.heic, its format"):
        load_cache(tmp_path)


def test_a_stray_readme_does_not_decide_the_layout(tmp_path):
    photos(tmp_path, "a.png", "b.png")
    (tmp_path / "README.txt").write_text("my photos")
    with pytest.raises(UserError, match=r"holds no images with captions; looked for .*metadata\.jsonl"):
        load_cache(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert load_cache(tmp_path, allow_broken=True)[1] == ["a"]
    skipped = {"its .txt is missing": ["b.png"], "no image is for it": ["README.txt"]}
    assert manifest(tmp_path / ".cache")["skipped"] == skipped


def test_every_file_with_captions_is_used_or_listed_and_the_layout_is_named(tmp_path):
    photos(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,from the table\n")
    for name in ("a.txt", "captions.txt", "b.caption", "notes.TXT"):
        (tmp_path / name).write_text("x")
    assert load_cache(tmp_path)[1] == ["from the table"]  # files that are not read are not damage
    found = manifest(tmp_path / ".cache")
    assert [sorted(names) for names in found["skipped"].values()] == [
        ["a.txt", "b.caption", "captions.txt", "notes.TXT"]
    ]
    assert "metadata.jsonl or .csv" in found["layout"] and found["layout"].endswith("by metadata.csv")
    (tmp_path / "metadata.csv").unlink()
    assert load_cache(tmp_path)[1] == ["x"]
    assert manifest(tmp_path / ".cache")["layout"].endswith("by a.txt")


def test_the_text_files_of_img2dataset_are_no_strays(tmp_path):
    img2dataset_row(tmp_path, "000000001")
    (tmp_path / "00000" / "000000001.txt").write_text("a photo")
    assert load_cache(tmp_path)[1] == ["a photo"] and not manifest(tmp_path / ".cache")["skipped"]


# -- names that are not text ---------------------------------------------------------------------------------

LOAD = "import sys; from lesson_06_miniglide.image_data.cache import load_cache; "
LOAD += "print(len(load_cache(sys.argv[1], cache_dir=sys.argv[2], allow_broken=True)[0]))"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_in_latin_1_are_read_and_escaped(tmp_path):
    data = tmp_path / os.fsdecode(b"p\xe9")
    for name in (b"caf\xe9", b"th\xe9"):
        sidecar(data, os.fsdecode(name + b".png"), picture(), "x")
    (data / os.fsdecode(b"th\xe9.png")).write_bytes(b"broken")
    save(picture().convert("L"), data / os.fsdecode(b"caf\xe9.png"))
    images, captions = load_cache(data, cache_dir=tmp_path / "c", allow_broken=True)
    assert len(images) == 1 and captions == ["x"]
    path = next((tmp_path / "c").glob("*/manifest.json"))
    assert b"caf\\udce9.png" in path.read_bytes()
    assert read_json(path)["converted"] == {"gray": [os.fsdecode(b"caf\xe9.png")]}
    (path.parent / "manifest.json").unlink()  # an interrupted build goes on
    assert load_cache(data, cache_dir=tmp_path / "c", allow_broken=True)[1] == ["x"]
    with pytest.raises(UserError, match="are broken"):
        load_cache(data, cache_dir=tmp_path / "c")
    (data / "metadata.csv").write_bytes(b"file_name,text\ncaf\xe9.png,listed\n")
    assert load_cache(data, cache_dir=tmp_path / "c")[1] == ["listed"]


@pytest.mark.skipif(sys.platform != "linux", reason="LC_ALL decides the encoding on Linux only")
def test_no_file_depends_on_the_encoding_of_the_system(tmp_path):
    sidecar(tmp_path / "data", "0.png", picture().convert("L"), "ένας σκύλος\nein Löwe")
    save(picture(), tmp_path / "data" / "中.png")
    system = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = ["-X", "warn_default_encoding", "-W", "always::EncodingWarning"]
    command = [sys.executable, *options, "-c", LOAD, str(tmp_path / "data"), str(tmp_path / "c")]
    for env in (system, system, dict(os.environ)):  # built, read again, read elsewhere
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout.split()[-1] == "1", result.stderr
        ours = [line for line in result.stderr.splitlines() if line.startswith(str(ROOT))]
        assert not [line for line in ours if "EncodingWarning" in line and "/lesson_06_miniglide/" in line]
    assert load_cache(tmp_path / "data", cache_dir=tmp_path / "c", allow_broken=True)[1] == [
        ("ένας σκύλος", "ein Löwe")
    ]
