"""Parquet files and data sets of Hugging Face give the same caches as folders of files."""

import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest

from common.errors import UserError
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.image_data.captioned_images import load_images
from lesson_06_miniglide.image_data.records import Columns
from lesson_06_miniglide.training.config import Config
from tests.test_data_formats import encoded
from tests.test_lesson_06_data import manifest, picture, sidecar

# -- parquet -------------------------------------------------------------------------------------------------


class FakeParquetFile:
    """What is used of pyarrow.parquet.ParquetFile; the file is a pickled list of rows."""

    def __init__(self, path):
        self.rows = pickle.loads(path.read_bytes())
        self.schema_arrow = SimpleNamespace(names=list(self.rows[0]))

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def iter_batches(self, batch_size, columns):
        rows = [{name: row[name] for name in columns} for row in self.rows]
        for start in range(0, len(rows), batch_size):
            yield SimpleNamespace(to_pylist=lambda start=start: rows[start : start + batch_size])


@pytest.fixture(params=["fake", "real"])
def write_parquet(request, monkeypatch):
    """Return a function that writes rows to a parquet file; with pyarrow where it is installed."""
    if request.param == "real":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        return lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    module = ModuleType("pyarrow.parquet")
    module.ParquetFile = FakeParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    return lambda path, rows: path.write_bytes(pickle.dumps(rows))


def test_parquet_of_img2dataset(tmp_path, write_parquet):
    rows = [
        {"key": f"{i}", "jpg": encoded(i), "txt": "-", "caption": f"caption {i}", "status": "success", "w": 1}
        for i in range(100)
    ]
    rows[5] |= {"jpg": None, "status": "failed_to_download"}
    rows[7] |= {"jpg": b"no image"}
    write_parquet(tmp_path / "00000.parquet", rows)
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00001.parquet").write_bytes(b"broken")
    images, captions = load_cache(tmp_path)
    assert captions == [f"caption {i}" for i in range(100) if i not in (5, 7)]
    sidecar(tmp_path / "file", "99.jpg", picture(99), "caption 99")
    assert (images[-1] == load_cache(tmp_path / "file")[0][0]).all()
    skipped = manifest(tmp_path / ".cache")["skipped"]
    assert skipped.pop("never downloaded") == ["00000.parquet/5"]
    assert skipped.pop("broken, or no image") == ["00000.parquet/7"]
    ((note, names),) = skipped.items()
    assert note.startswith("it cannot be read from row 0 on") and names == ["00001.parquet"]


def test_parquet_of_hugging_face(tmp_path, write_parquet):
    (tmp_path / "data").mkdir()
    (tmp_path / "here.png").write_bytes(encoded(3, "PNG"))
    rows = [
        {"image": {"bytes": encoded(1), "path": "1.jpg"}, "text": ["one", "uno"], "label": "x"},
        {"image": {"bytes": None, "path": "here.png"}, "text": ["two"], "label": "y"},
        {"image": {"bytes": None, "path": None}, "text": ["three"], "label": "z"},
    ]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows[:1])
    captions = load_cache(tmp_path, allow_broken=True)[1]
    assert captions == [("one", "uno"), "two"]
    skipped = manifest(tmp_path / ".cache")["skipped"]
    assert skipped["not read, because it is not of the split"] == ["data/test-00000-of-00001.parquet"]
    assert load_cache(tmp_path, columns=Columns(caption="label", split="test"))[1] == ["x"]
    with pytest.raises(UserError, match=r"no column `title`, only .*label.*; name one with --caption-column"):
        load_cache(tmp_path, columns=Columns(caption="title"))
    with pytest.raises(UserError, match=r"--split dev: no \.parquet file has dev in its name"):
        load_cache(tmp_path, columns=Columns(split="dev"))


def test_libraries_that_are_missing(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.parquet needs a library: pip install pyarrow$"):
        load_cache(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"needs a library: pip install datasets$"):
        load_cache(tmp_path)
    with pytest.raises(UserError, match=r"^--dataset-name needs a library: pip install datasets$"):
        load_images(Config(dataset_name="someone/something"))


# -- data sets of Hugging Face -------------------------------------------------------------------------------


class FakeDataset:
    """What is used of datasets.Dataset. Images are decoded, unless the column is cast."""

    _fingerprint, split = "1", None

    def __init__(self, rows, undecoded=()):
        self.rows, self.undecoded = rows, undecoded
        self.column_names = list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, where):
        rows = self.rows[where]
        return {
            name: [row[name] if name != "image" or name in self.undecoded else object() for row in rows]
            for name in self.column_names
        }

    def with_format(self, kind):
        assert kind is None
        return self

    def select_columns(self, names):
        return FakeDataset([{name: row[name] for name in names} for row in self.rows], self.undecoded)

    def cast_column(self, name, feature):
        assert feature == {"decode": False}
        return FakeDataset(self.rows, (*self.undecoded, name))


ROWS = [
    {"image": {"bytes": encoded(i), "path": f"{i}.jpg"}, "text": f"text {i}", "fr": f"texte {i}"}
    for i in range(600)
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replace the library datasets, and go to an empty folder; return the arguments of load_dataset."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if kwargs["split"] != "train":
            raise ValueError('Unknown split "dev". Should be one of [train].\nmore lines')
        return FakeDataset(ROWS)

    module = ModuleType("datasets")
    module.load_dataset, module.Image = load_dataset, dict
    module.load_from_disk = lambda folder: pickle.loads((tmp_path / "saved" / "rows").read_bytes())
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_data_set_of_the_hub(tmp_path, hub):
    data = load_images(Config(dataset_name="someone/things", flip=False))
    assert hub == [(("someone/things", None), {"split": "train"})]
    assert data.captions == [f"text {i}" for i in range(600)] and data.name == "someone/things_train"
    sidecar(tmp_path / "file", "599.jpg", picture(599), "x")
    assert (data.images[599] == load_cache(tmp_path / "file")[0][0]).all()
    config = Config(
        dataset_name="someone/things", dataset_config_name="big", caption_column="fr", image_limit=7
    )
    data = load_images(config)
    assert data.captions == [f"texte {i}" for i in range(7)] and hub[1][0] == ("someone/things", "big")
    assert len(list((tmp_path / "data" / "huggingface").iterdir())) == 2


def test_errors_about_data_sets_of_the_hub(hub):
    for flags, message in (
        ({"split": "dev"}, r'--split dev cannot be loaded \(Unknown split "dev".*\[train\].\)$'),
        ({"image_column": "img"}, "has no column `img`, only image, text, fr; name one with --image-column"),
        ({"data_dir": "photos"}, "--dataset-name excludes --data-dir"),
        ({"dogs": True}, "--dataset-name excludes --data-dir and --dogs"),
    ):
        with pytest.raises(UserError, match=message):
            load_images(Config(dataset_name="someone/things", **flags))


@pytest.mark.parametrize("flag", ["data_dir", "dataset_name"])
def test_a_folder_of_save_to_disk(tmp_path, hub, flag):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "rows").write_bytes(
        pickle.dumps({"train": FakeDataset(ROWS[:3]), "test": FakeDataset(ROWS[3:5])})
    )
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert load_images(Config(**{flag: str(saved)})).captions == ["text 0", "text 1", "text 2"]
    assert load_images(Config(**{flag: str(saved)}, split="test")).captions == ["text 3", "text 4"]
    with pytest.raises(UserError, match="has no split dev, only train, test; name it with --split"):
        load_images(Config(**{flag: str(saved)}, split="dev"))
    assert not hub


def test_columns_and_splits_are_refused_where_they_mean_nothing(tmp_path):
    sidecar(tmp_path, "a.png", picture(), "a")
    for columns in (Columns(split="val"), Columns(caption="title")):
        with pytest.raises(
            UserError, match=r"next to name\.jpg; --image-column, --caption-column and --split"
        ):
            load_cache(tmp_path, columns=columns)
    assert load_cache(tmp_path, columns=Columns("image", "text"))[1] == ["a"]


def test_the_real_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    rows = [{"image": row["image"], "text": row["text"]} for row in ROWS[:5]]
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "table").mkdir()
    dataset.to_parquet(str(tmp_path / "table" / "a.parquet"))
    images, captions = load_cache(tmp_path / "saved", cache_dir=tmp_path / "c")
    assert captions == [f"text {i}" for i in range(5)]
    assert (load_cache(tmp_path / "table")[0] == images).all()
    sidecar(tmp_path / "file", "4.jpg", picture(4), "x")
    assert (images[4] == load_cache(tmp_path / "file")[0][0]).all()
