"""Shards give the same cache as a folder of files, also if they are damaged or the build is interrupted."""

import io
import json
import tarfile
import threading

import numpy as np
import pytest

from common.errors import UserError
from lesson_06_miniglide.image_data import cache
from lesson_06_miniglide.image_data.batches import AT_ONCE, batches
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.image_data.records import Record
from tests.test_lesson_06_data import manifest, picture, sidecar


def encoded(seed, format="JPEG"):
    buffer = io.BytesIO()
    picture(seed).save(buffer, format)
    return buffer.getvalue()


def sample(key, caption="a photo", **more):
    """Return the three files that img2dataset writes for an image."""
    row = {"caption": caption, "key": key, "status": "success"} | more
    files = {"jpg": encoded(int(key)), "txt": caption.encode(), "json": json.dumps(row).encode()}
    return {f"{key}.{suffix}": content for suffix, content in files.items()}


def shard(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shards(folder, counts):
    """Write one shard for each count of images, with what img2dataset writes next to it."""
    for i, count in enumerate(counts):
        keys = [f"{i:05}{j:04}" for j in range(count)]
        files = {name: data for key in keys for name, data in sample(key, f"caption {key}").items()}
        shard(folder / f"{i:05}.tar", files)
        (folder / f"{i:05}_stats.json").write_text('{"count": 3, "status_dict": {}}')
        (folder / f"{i:05}.parquet").write_bytes(b"the log")


# -- WebDataset shards ---------------------------------------------------------------------------------------


def test_shards_give_the_cache_of_the_same_files(tmp_path, monkeypatch):
    shards(tmp_path / "data", [3, 2])
    before, modes, tar_open = sorted((tmp_path / "data").iterdir()), [], tarfile.open
    monkeypatch.setattr(
        tarfile, "open", lambda *args, **kw: modes.append(kw["mode"]) or tar_open(*args, **kw)
    )
    images, captions = load_cache(tmp_path / "data", cache_dir=tmp_path / "c")
    keys = ["000000000", "000000001", "000000002", "000010000", "000010001"]
    assert captions == [f"caption {key}" for key in keys] and modes == ["r|*"] * 2
    assert sorted((tmp_path / "data").iterdir()) == before  # nothing was extracted
    for key in keys:
        sidecar(tmp_path / "files", f"{key}.jpg", picture(int(key)), f"caption {key}")
    assert (images == load_cache(tmp_path / "files")[0]).all()
    content = manifest(tmp_path / "c")
    assert "00000.tar" in content["layout"] and content["records"] == 5 and not content["skipped"]


@pytest.mark.parametrize("name", ["a.tar", "sub/b.tgz", "c.tar.xz"])
def test_compressed_shards_and_several_captions(tmp_path, name):
    files = {
        "./x/1.jpg": encoded(1),
        "./x/1.txt": "one\n\ntwo\n".encode("utf-16"),
        "x/2.json": b'{"caption": ["three", "four"]}',
        "x/2.PNG": encoded(2, "PNG"),
        "x/3.cls": b"7",
        "x/3.txt": b"text",
        "x/._3.jpg": b"of macOS",
        "x/3.json": b'{"caption": null}',
        "x/3.webp": encoded(3, "WEBP"),
    }
    shard(tmp_path / name, files, "w:" + {"tgz": "gz", "xz": "xz"}.get(name[-3:].strip("."), ""))
    images, captions = load_cache(tmp_path)
    assert captions == [("one", "two"), ("three", "four"), "text"] and len(images) == 3


def test_broken_members_are_listed(tmp_path):
    files = sample("000000000") | sample("000000001") | sample("000000002") | sample("000000003")
    files["000000001.jpg"] = b"no image"
    files["000000002.json"] = b'{"caption": "a pho'
    del files["000000003.jpg"]
    files |= {"4.jpg": encoded(4), "5.jpg": encoded(5), "5.txt": b"caf\xe9", "6.heic": b"", "6.txt": b"six"}
    files |= sample("000000007", status="failed_to_download")
    files |= {
        "8.jpg": encoded(8),
        "8.mask.png": encoded(9, "PNG"),
        "8.txt": b"eight",
        "README.txt": b"read me",
    }
    shard(tmp_path / "0.tar", files)
    assert load_cache(tmp_path, allow_broken=True)[1] == ["a photo", "eight"]
    assert manifest(tmp_path / ".cache")["skipped"] == {
        "broken, or no image": ["0.tar/000000001.jpg"],
        "its .json is broken": ["0.tar/000000002.jpg"],
        "no image is next to it in its .tar": ["0.tar/000000003.txt", "0.tar/README.txt"],
        "no .txt or .json with a caption is next to it in its .tar": ["0.tar/4.jpg"],
        "its caption is not text in UTF-8": ["0.tar/5.jpg"],
        "its format cannot be read; convert it to PNG or JPEG": ["0.tar/6.heic"],
        "never downloaded": ["0.tar/000000007.jpg"],
        "another image of the same key is used": ["0.tar/8.mask.png"],
    }
    with pytest.raises(UserError, match=r"of its records are broken \(the first: 0\.tar/000000001\.jpg"):
        load_cache(tmp_path)


def damaged(content, damage):
    """Return the content of a shard of three images with damage to the third one."""
    third = content.index(b"000000002.jpg\0")
    return {
        "within an image": content[: third + 700],
        "within a header": content[: third + 100],
        "before a header": content[:third],
        "in a header": content[: third + 150] + b"\xff" * 8 + content[third + 158 :],
        "no shard": b"<html>404</html>" * 99,
        "empty file": b"",
    }[damage]


DAMAGES = ["within an image", "within a header", "before a header", "in a header", "no shard", "empty file"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_at_the_end_of_a_shard_is_listed(tmp_path, damage):
    shards(tmp_path, [3, 1])
    content = damaged((tmp_path / "00000.tar").read_bytes(), damage)
    (tmp_path / "00000.tar").write_bytes(content)
    whole = 0 if damage in DAMAGES[4:] else 2
    assert load_cache(tmp_path, allow_broken=True)[1] == [
        *(f"caption 00000000{i}" for i in range(whole)),
        "caption 000010000",
    ]
    ((note, names),) = manifest(tmp_path / ".cache")["skipped"].items()
    assert note.startswith("the rest of it cannot be read (") and names == ["00000.tar"]


def test_a_shard_without_a_file_is_an_error(tmp_path):
    shard(tmp_path / "0.tar", {})
    with pytest.raises(UserError, match="none of its 0 records can be used"):
        load_cache(tmp_path)


def test_an_interrupted_build_of_shards_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK_SIZE", 2)
    counts = [5, 1, 2, 3, 4, 2]
    shards(tmp_path, counts)
    images, captions = load_cache(tmp_path)
    images, expected = np.array(images), []
    for group in (range(4), range(4, 6)):  # four shards take turns, two images each
        for start in range(0, 6, 2):
            for i in group:
                keys = range(start, min(start + 2, counts[i]))
                expected += [f"caption {i:05}{j:04}" for j in keys]
    assert captions == expected
    folder = next((tmp_path / ".cache").iterdir())
    lines = (folder / "chunks.jsonl").read_text().splitlines(keepends=True)
    for done in range(len(lines)):
        (folder / "manifest.json").unlink()
        (folder / "chunks.jsonl").write_text("".join(lines[:done]) + lines[done][:9])
        again, captions_again = load_cache(tmp_path)
        assert captions_again == captions and (again == images).all()
    limited = load_cache(tmp_path, limit=5)
    assert limited[1] == captions[:5] and (limited[0] == images[:5]).all()


def test_several_parts_are_read_at_once():
    barrier = threading.Barrier(AT_ONCE, timeout=60)  # passed when so many threads wait at it

    def part(i):
        barrier.wait()
        yield Record(f"{i}", "")

    found = [batch for _, batch in batches([part(i) for i in range(2 * AT_ONCE)], [], 10)]
    assert [[record.image for record in batch] for batch in found] == [[f"{i}"] for i in range(2 * AT_ONCE)]


def test_a_shard_next_to_another_layout_is_listed(tmp_path):
    sidecar(tmp_path, "a.png", picture(), "a")
    shards(tmp_path, [1])
    (tmp_path / "train.parquet").write_bytes(b"")
    assert load_cache(tmp_path)[1] == ["a"]
    (names,) = manifest(tmp_path / ".cache")["skipped"].values()
    assert names == ["00000.tar", "train.parquet"]
