"""How fast training gets its images: from the cache, and decoded anew at each access."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from lesson_06_miniglide.cache import BICUBIC, load_cache
from lesson_06_miniglide.captioned_images import as_batch, captioned_images, make_tokenizer
from lesson_06_miniglide.presets import IMAGE_SIZE, TINY_TEXT
from lesson_06_miniglide.sources import list_files, read_records


def decoded(path):
    """A picture as the original loads it, whenever it is needed."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), BICUBIC))


def data_rates(data_dir, dogs, batch_size):
    """{"cache": images/s, "decoded on access": images/s}: a folder's images in random batches, each once.

    A cache is read by one thread, as in training; decoding has a thread a core. Raises UserError.
    """
    with TemporaryDirectory() as folder:
        images, captions = load_cache(data_dir, IMAGE_SIZE, dogs=dogs, cache_dir=folder)
        data = captioned_images("", images, captions).tokenized(make_tokenizer(captions, TINY_TEXT))
        batches = torch.randperm(len(data)).split(batch_size)
        cached = rate(data.batch, batches)
    records = read_records(data_dir, list_files(data_dir), dogs)
    paths = [Path(data_dir) / record.image for record in records if not record.problem]
    batches = torch.randperm(len(paths)).split(batch_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def load(indices):
            return as_batch(np.stack(list(pool.map(decoded, [paths[i] for i in indices.tolist()]))))

        return {"cache": cached, "decoded on access": rate(load, batches)}


def rate(load, batches):
    """Items a second; the first batch is not counted."""
    load(batches[0])
    started = time.perf_counter()
    for batch in batches[1:]:
        load(batch)
    return sum(map(len, batches[1:])) / (time.perf_counter() - started)
