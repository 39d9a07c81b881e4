"""A caption is text or an error, an image can have several, and prompts are read like captions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from lesson_04_text_conditioning.prompts import PromptConfig
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.image_data.captioned_images import captioned_images
from lesson_06_miniglide.image_data.tokenizers import make_tokenizer
from tests.test_lesson_06_data import coco, img2dataset_row, manifest, picture, save


def photos(folder, names, content=None):
    """Write an image per name, and a file of bytes per entry of `content`."""
    for i, name in enumerate(names):
        save(picture(i), folder / name)
    for name, data in (content or {}).items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def captions_of(folder, **settings):
    return load_cache(folder, allow_broken=True, **settings)[1]


def skipped(folder):
    return manifest(folder / ".cache")["skipped"]


# -- encodings -----------------------------------------------------------------------------------------------

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
MARKS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-32-be": b"\0\0\xfe\xff"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_byte_order_mark_is_honoured_everywhere(tmp_path, encoding):
    def encoded(text):
        return MARKS.get(encoding, b"") + text.encode(encoding)

    row = {"caption": "ein Löwe", "status": "success", "key": "1"}
    images = [{"id": 1, "file_name": "a.png"}]
    annotations = [{"image_id": 1, "caption": "ein Löwe"}]
    layouts = {
        "a.txt": "ein Löwe\r\n",
        "metadata.csv": "file_name,text\r\na.png,ein Löwe\r\n",
        "metadata.jsonl": '{"file_name": "a.png", "text": "ein Löwe"}\r\n',
        "captions.txt": "image,caption\r\na.png,ein Löwe\r\n",
        "a.json": json.dumps(row, ensure_ascii=False),
        "captions_x.json": json.dumps({"images": images, "annotations": annotations}, ensure_ascii=False),
    }
    for name, text in layouts.items():
        photos(tmp_path / name, ["a.png"], {name: encoded(text)})
        assert captions_of(tmp_path / name) == ["ein Löwe"], name
    (tmp_path / "prompts.txt").write_bytes(encoded("ein Löwe\r\nzwei\r\n"))
    assert PromptConfig(prompts_file=str(tmp_path / "prompts.txt")).prompts(()) == ["ein Löwe", "zwei"]


def test_text_in_another_encoding_is_listed_as_broken(tmp_path):
    no_mark = "a dog".encode("utf-16-le")
    half = "\ufeffa dog".encode("utf-16-le")[:-1]
    texts = {"a.txt": b"caf\xe9", "b.txt": "café", "c.txt": no_mark, "d.txt": half}
    photos(tmp_path, ["a.png", "b.png", "c.png", "d.png"], texts)
    with pytest.raises(UserError, match=r"75\.0% of its records .*a\.png, its caption is not text"):
        load_cache(tmp_path)
    assert captions_of(tmp_path) == ["café"]
    assert skipped(tmp_path) == {"its caption is not text in UTF-8": ["a.png", "c.png", "d.png"]}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_only_the_row_that_is_not_utf8_is_broken(tmp_path, name):
    rows = [b'{"file_name": "a.png", "text": "caf\xe9"}', b'{"file_name": "b.png", "text": "ok"}']
    text = b"\n".join(rows) if name.endswith("jsonl") else b"file_name,text\na.png,caf\xe9\nb.png,ok\n"
    photos(tmp_path, ["a.png", "b.png"], {name: text})
    assert captions_of(tmp_path) == ["ok"]
    assert skipped(tmp_path) == {"its caption is not text in UTF-8": ["a.png"]}


@pytest.mark.parametrize("content", [b"caf\xe9", "a dog".encode("utf-16-le"), b"\xff\xfea"])
def test_prompts_in_another_encoding_are_refused(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"not.* text.* in UTF-8"):
        PromptConfig(prompts_file=str(tmp_path / "p.txt")).prompts(())


# -- types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0, "int"), (7, "int"), (False, "bool"), (0.0, "float"), ({}, "dict"), (["x", 1], "int")],
)
def test_a_caption_of_another_type_is_refused_by_name(tmp_path, value, kind):
    problem = f"its caption is not text but of the type {kind}"
    rows = [{"file_name": "a.png", "text": value}, {"file_name": "b.png", "text": "b"}]
    photos(tmp_path / "m", ["a.png", "b.png"], {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    img2dataset_row(tmp_path / "i", "000000001", caption=value)
    img2dataset_row(tmp_path / "i", "000000002")
    (tmp_path / "c").mkdir()
    coco(tmp_path / "c", (1, 2), (1, 2), [(1, value), (2, "b")])
    first = {"m": "a.png", "i": "00000/000000001.jpg", "c": "val2017/000000000001.jpg"}
    for folder in ("m", "i", "c"):
        with pytest.raises(UserError, match=problem):
            load_cache(tmp_path / folder)
        assert skipped(tmp_path / folder) == {problem: [first[folder]]}


@pytest.mark.parametrize("value", [None, "", [], [None], "  "])
def test_a_data_set_without_captions_is_refused(tmp_path, value):
    rows = [{"file_name": f"{i}.png", "text": value} for i in range(3)]
    text = "\n".join(map(json.dumps, rows))
    photos(tmp_path, ["0.png", "1.png", "2.png"], {"metadata.jsonl": text})
    for allow_broken in (False, True):
        with pytest.raises(UserError, match="captions of all its 3 images are empty"):
            load_cache(tmp_path, allow_broken=allow_broken)
    rows[1]["text"] = "a dog"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_cache(tmp_path)[1] == ["", "a dog", ""]
    assert manifest(tmp_path / ".cache")["converted"] == {"empty caption": ["0.png", "2.png"]}


def test_a_caption_is_not_cut_at_a_comma_without_quotes(tmp_path):
    text = "file_name,text\na.png,a dog, running\nb.png,b\n"
    photos(tmp_path, ["a.png", "b.png"], {"metadata.csv": text})
    assert captions_of(tmp_path) == ["b"]
    assert list(skipped(tmp_path).values()) == [["a.png"]]


# -- several captions per image ------------------------------------------------------------------------------


def test_every_layout_can_have_several_captions_per_image(tmp_path):
    dogs = ("a dog", "a brown dog", "ein Hund")
    text = "\n".join(dogs)
    photos(tmp_path / "sidecars", ["a.png", "b.png"], {"a.txt": f"{text}\n\n  \n", "b.txt": "b"})
    rows = [("a.png", list(dogs)), ("b.png", "b")]
    lines = "\n".join(json.dumps({"file_name": name, "text": caption}) for name, caption in rows)
    photos(tmp_path / "lists", ["a.png", "b.png"], {"metadata.jsonl": lines})
    csv = "file_name,text\n" + "".join(f"a.png,{dog}\n" for dog in dogs) + "b.png,b\n"
    photos(tmp_path / "rows", ["a.png", "b.png"], {"metadata.csv": csv})
    img2dataset_row(tmp_path / "img2dataset", "000000000", caption=list(dogs))
    img2dataset_row(tmp_path / "img2dataset", "000000001", caption="b")
    (tmp_path / "coco").mkdir()
    coco(tmp_path / "coco", (1, 2), (1, 2), [(1, dogs[0]), (2, "b"), (1, dogs[1]), (1, dogs[2])])
    for folder in ("sidecars", "lists", "rows", "img2dataset", "coco"):
        images, captions = load_cache(tmp_path / folder)
        assert captions == [dogs, "b"] and len(images) == 2, folder
        assert load_cache(tmp_path / folder)[1] == captions  # from the cache


def test_flickr8k(tmp_path):
    captions = {f"{i}_x.jpg": tuple(f"caption {j}, of {i} ." for j in range(5)) for i in (10, 11)}
    rows = [f'{name},"{text}"' for name, texts in captions.items() for text in texts]
    photos(tmp_path / "Images", captions)
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows, "12_x.jpg,lost"]) + "\n")
    assert captions_of(tmp_path) == list(captions.values())
    assert skipped(tmp_path) == {"its image is missing": ["12_x.jpg"]}
    assert "captions.txt" in manifest(tmp_path / ".cache")["layout"]


def test_repeated_and_empty_captions_do_not_count(tmp_path):
    photos(tmp_path, ["a.png"], {"a.txt": "a  dog\na dog\n"})
    assert captions_of(tmp_path) == ["a dog"]
    text = '{"file_name": "a.png", "text": ["x", "", null, "y"]}'
    photos(tmp_path / "sub", ["a.png"], {"metadata.jsonl": text})
    assert captions_of(tmp_path / "sub") == [("x", "y")]


def tokenized(captions):
    images = np.zeros((len(captions), 64, 64, 3), np.uint8)
    data = captioned_images("x", images, captions)
    tokenizer = make_tokenizer(data.captions, TextConfig(300, context_length=12))
    rows = [tuple(tokens) for tokens in tokenizer.encode(data.captions)[0].tolist()]
    text_of = dict(zip(rows, data.captions))
    return data.tokenized(tokenizer), lambda tokens: [text_of[tuple(row)] for row in tokens.tolist()]


def test_one_caption_is_drawn_each_time_and_each_equally_often():
    data, texts = tokenized(["alone", ("a", "b", "c", "d", "e"), ("x", "y")])
    torch.manual_seed(0)
    drawn = texts(data.batch(torch.tensor([1, 0, 2]).repeat(2000))[1])
    counts = {text: drawn.count(text) for text in data.captions}
    assert counts.pop("alone") == 2000
    for text, expected in dict.fromkeys("abcde", 400).items() | dict.fromkeys("xy", 1000).items():
        assert abs(counts[text] - expected) < 5 * expected**0.5
    torch.manual_seed(0)
    assert texts(data.batch(torch.tensor([1, 0, 2]).repeat(2000))[1]) == drawn  # a seed repeats a run


def test_images_with_one_caption_need_no_random_numbers():
    data, _ = tokenized(["a", "b", "a"])
    torch.manual_seed(0)
    data.batch(torch.tensor([0, 1, 2]))
    after = torch.rand(4)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(4))


def test_validation_images_keep_their_first_caption():
    captions = [(f"{i} first", f"{i} second", f"{i} third") for i in range(20)]
    data, texts = tokenized(captions)
    train, validation = data.split(0.5)
    for _ in range(5):
        everything = torch.arange(len(validation))
        assert texts(validation.batch(everything)[1]) == validation.captions_for(everything)
    assert all(text.endswith("first") for text in validation.captions_for(torch.arange(len(validation))))
    assert set(train.most_frequent(99)) == {text for i in train.indices.tolist() for text in captions[i]}


def test_truncated_captions_are_counted_of_all(capsys):
    data = captioned_images("x", np.zeros((2, 64, 64, 3), np.uint8), [("short", "long " * 99), "short"])
    assert data.tokenized(make_tokenizer(data.captions, TextConfig(300, context_length=8))).num_truncated == 1
    assert "1 of 3 are truncated to 8 tokens" in capsys.readouterr().out


def test_pixels_do_not_depend_on_the_number_of_captions(tmp_path):
    photos(tmp_path / "one", ["a.png"], {"a.txt": "x"})
    photos(tmp_path / "two", ["a.png"], {"a.txt": "x\ny"})
    one, two = (load_cache(tmp_path / name)[0][0] for name in ("one", "two"))
    expected = np.asarray(picture(0).resize((64, 64), Image.Resampling.BICUBIC))
    assert (one == expected).all() and (two == expected).all()
