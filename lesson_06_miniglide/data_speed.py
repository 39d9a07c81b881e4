"""How fast training gets its images: from the cache, and decoded anew at each access."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from common.command import UserError
from common.runs import read_json
from lesson_06_miniglide.cache import BICUBIC, load_cache
from lesson_06_miniglide.captioned_images import as_batch, captioned_images, make_tokenizer
from lesson_06_miniglide.presets import IMAGE_SIZE, TINY_TEXT
from lesson_06_miniglide.sources import list_files, read_records


def decoded(path):
    """A picture as the original loads it, whenever it is needed: decoded whole, then made small."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), BICUBIC))


def data_rates(data_dir, dogs, batch_size):
    """Images a second of a folder: while the "cache" is built, from it, and "decoded on access".

    The last two in random batches, each image once. The cache, which fits into memory here, is read by one
    thread, as in training; decoding has a thread a core. Raises UserError.
    """
    with TemporaryDirectory() as folder:
        images, captions = load_cache(data_dir, IMAGE_SIZE, dogs=dogs, cache_dir=folder)
        if len(images) <= batch_size:
            raise UserError(f"--data-dir has {len(images)} images; it takes more than --batch-size")
        data = captioned_images("", images, captions).tokenized(make_tokenizer(captions, TINY_TEXT))
        batches = torch.randperm(len(data)).split(batch_size)
        cached = rate(data.batch, batches)
        manifest = read_json(next(Path(folder).glob("*/manifest.json")))
    skipped = {name for names in manifest["skipped"].values() for name in names}
    records = read_records(data_dir, list_files(data_dir), dogs)
    paths = [Path(data_dir) / record.image for record in records if record.image not in skipped]
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def load(indices):
            return as_batch(np.stack(list(pool.map(decoded, [paths[i] for i in indices.tolist()]))))

        built = manifest["images"] / (60 * manifest["minutes"])
        return {"cache, built": built, "cache": cached, "decoded on access": rate(load, batches)}


def rate(load, batches):
    """Items a second; the first batch is not counted."""
    load(batches[0])
    started = time.perf_counter()
    for batch in batches[1:]:
        load(batch)
    return sum(map(len, batches[1:])) / (time.perf_counter() - started)
