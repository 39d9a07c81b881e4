"""Read the records of a data set in batches, of several large files at once."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from lesson_06_miniglide.image_data.records import EncodedRecord, Record

AT_ONCE = 4  # parts that are read at the same time; the order of the images depends on it
MAX_BYTES = 2**26  # of encoded images, after which a batch ends early


def batches(
    parts: Sequence[Iterable[Record]], done: Sequence[tuple[int, int]], size: int
) -> Iterator[tuple[int, list[Record]]]:
    """Yield the number of a part and the next records of it, in an order that depends only on the data.

    AT_ONCE parts are read in turns, each in a thread of its own, one batch ahead. done: part and number of
    records of the batches that are complete; these records are left out. size: of a batch, in records.
    """
    num_done: Counter[int] = Counter()
    for part, count in done:
        num_done[part] += count
    last = done[-1][0] if done else -1
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(max(last, 0) // AT_ONCE * AT_ONCE, len(parts), AT_ONCE):
            group = range(start, min(start + AT_ONCE, len(parts)))
            order = sorted(group, key=lambda part: part <= last)  # it is the turn of those after the last
            streams = {part: islice(parts[part], num_done[part], None) for part in order}
            turns = deque((part, pool.submit(next_batch, streams[part], size)) for part in order)
            while turns:
                part, future = turns.popleft()
                if batch := future.result():
                    turns.append((part, pool.submit(next_batch, streams[part], size)))
                    yield part, batch


def next_batch(records: Iterator[Record], size: int) -> list[Record]:
    """Return the next records: `size`, or fewer if their images have more than MAX_BYTES."""
    batch: list[Record] = []
    num_bytes = 0
    for record in records:
        batch.append(record)
        num_bytes += len(record.data) if isinstance(record, EncodedRecord) else 0
        if len(batch) == size or num_bytes >= MAX_BYTES:
            break
    return batch
