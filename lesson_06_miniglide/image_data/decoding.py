"""From a record to pixels: open an image, convert it to RGB, resize it to a small square; clean its caption.

On request an image is first cropped to its bounding box. The boxes are those of Stanford Dogs: the box of
Images/<class>/<image>.jpg is in Annotation/<class>/<image>, which has no suffix, in the XML of Pascal VOC.

Whatever is unusual about an image or a caption is returned as a note. The notes are stored in caches.
"""

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image, ImageOps

from lesson_06_miniglide.image_data.records import Caption, EncodedRecord, Record, all_captions

LONG_CAPTION = 1000  # characters
BICUBIC = Image.Resampling.BICUBIC
RESIZE_FILTER = "bicubic, of JPEGs decoded at no less than twice the size"
RESIZES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "squish": lambda image, size: image.resize((size, size), BICUBIC),
    "crop": lambda image, size: ImageOps.fit(image, (size, size), BICUBIC),
}
MODE_NOTES = {"L": "gray", "1": "black and white", "P": "palette", "CMYK": "CMYK", "I;16": "16 bits"}
EXIF_ORIENTATION = 0x0112
ANNOTATIONS = "Annotation"  # folder of the bounding boxes
NO_BOX = "no bounding box is for it, so all of it is used"
BROKEN_BOX = "its bounding box cannot be read, so all of it is used"
SEVERAL_BOXES = "several bounding boxes, of which the first is used"


class Box(NamedTuple):
    """A bounding box, in fractions of the image's width and height."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Box(0, 0, 1, 1)


def decode(
    data_dir: Path, record: Record, size: int, resize: str, crop_to_box: bool = False
) -> tuple[bytes | None, list[str]]:
    """Return the RGB bytes of the resized image and what was unusual about it, or (None, why there is none).

    size: of a side, in pixels. resize: a key of RESIZES. crop_to_box: crop to the bounding box before.
    """
    if record.problem:
        return None, [record.problem]
    try:
        encoded = BytesIO(record.data) if isinstance(record, EncodedRecord) else None
        with Image.open(encoded or data_dir / record.image) as file:
            box, notes = find_box(data_dir, record.image, file.size) if crop_to_box else (WHOLE, [])
            # A large JPEG is decoded at a half, a quarter or an eighth of its size, which is much faster.
            sides = (box.right - box.left, box.bottom - box.top)  # of what is left
            width, height = (math.ceil(2 * size / side) for side in sides)
            file.draft(None, (width, height))  # type: ignore[arg-type]  # None keeps the mode
            notes += [MODE_NOTES[file.mode]] if file.mode in MODE_NOTES else []
            image: Image.Image = file if box == WHOLE else file.crop(square_crop(box, *file.size))
            if file.getexif().get(EXIF_ORIENTATION, 1) != 1:
                notes.append("rotated by its EXIF")
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                notes.append("transparent")
            return RESIZES[resize](to_rgb(image), size).tobytes(), notes
    except Exception:  # Pillow raises many kinds for broken files
        return None, ["broken, or no image"]


def find_box(data_dir: Path, image: str, image_size: tuple[int, int]) -> tuple[Box, list[str]]:
    """Return the first bounding box of an image and what was unusual about it; without a box, WHOLE.

    image: its path below data_dir. image_size: width and height, for annotations that do not say them.
    """
    path = data_dir / ANNOTATIONS / Path(image).parent.name / Path(image).stem
    if not path.is_file():
        return WHOLE, [NO_BOX]
    try:
        box, count = parse_box(path.read_bytes(), image_size)
    except (OSError, SyntaxError, LookupError, ValueError, TypeError):  # XML, its encoding, its numbers
        return WHOLE, [BROKEN_BOX]
    return box, [SEVERAL_BOXES] if count > 1 else []


class NoDoctype(ElementTree.TreeBuilder):
    """Refuses documents that declare a type, because its entities could expand to gigabytes."""

    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("an annotation has no document type")


def parse_box(xml: bytes, image_size: tuple[int, int]) -> tuple[Box, int]:
    """Return the first bounding box in an annotation of Pascal VOC, and how many there are.

    image_size: if the annotation does not say its own. Raises SyntaxError, LookupError, ValueError or
    TypeError if it cannot be read, has no box, or if nothing of the box is inside the image.
    """
    root = ElementTree.fromstring(xml, ElementTree.XMLParser(target=NoDoctype()))
    size = [float(root.findtext(f"size/{name}") or 0) for name in ("width", "height")]
    width, height = size if min(size) > 0 else image_size
    found = root.findall("object/bndbox")
    values: list[Any] = [found[0].findtext(name) for name in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = numbers = [float(value) for value in values]
    box = Box(max(0, left / width), max(0, top / height), min(1, right / width), min(1, bottom / height))
    inside = box.left < box.right and box.top < box.bottom
    if not (inside and all(map(math.isfinite, numbers))):
        raise ValueError("nothing of the box is inside the image")
    return box, len(found)


def square_crop(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the pixels (left, top, right, bottom) of the square around a box, as far as the image allows it.

    The shorter side grows around the box's centre; the square is shifted to stay inside the image. If the
    image is narrower than the square, all of its width is taken.
    """
    longer = max(1, round(max((box.right - box.left) * width, (box.bottom - box.top) * height)))

    def span(low: float, high: float, length: int) -> tuple[int, int]:
        side = min(longer, length)
        start = round((low + high) / 2 * length - side / 2)
        start = min(max(0, start), length - side)
        return start, start + side

    (left, right), (top, bottom) = span(box.left, box.right, width), span(box.top, box.bottom, height)
    return left, top, right, bottom


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB: transparent pixels become white, 16 bits become 8."""
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def clean_captions(caption: Caption) -> tuple[Caption, list[str]]:
    """Return an image's caption or its captions without empty and repeated ones, and what was unusual."""
    cleaned = [clean_caption(text) for text in all_captions(caption)]
    texts = list(dict.fromkeys(text for text, _ in cleaned if text))
    notes = list(dict.fromkeys(note for _, found in cleaned for note in found))
    return tuple(texts) if len(texts) > 1 else "".join(texts), notes


def clean_caption(caption: str) -> tuple[str, list[str]]:
    """Return the caption on one line, and what was unusual about it. Any text is allowed, even none."""
    # Half of a surrogate pair cannot be encoded; it becomes a question mark.
    encodable = caption.encode(errors="replace").decode()
    checks = {"caption with letters that do not exist": encodable != caption}
    caption = " ".join(encodable.split())
    checks |= {
        "empty caption": not caption,
        "long caption": len(caption) > LONG_CAPTION,
        "caption with other letters than ASCII": not caption.isascii(),
    }
    return caption, [note for note, applies in checks.items() if applies]
