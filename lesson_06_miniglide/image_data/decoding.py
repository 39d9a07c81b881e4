"""From a record to pixels: open an image, convert it to RGB, resize it to a small square; clean its caption.

Whatever is unusual about an image or a caption is returned as a note. The notes are stored in caches.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

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


def decode(data_dir: Path, record: Record, size: int, resize: str) -> tuple[bytes | None, list[str]]:
    """Return the RGB bytes of the resized image and what was unusual about it, or (None, why there is none).

    size: of a side, in pixels. resize: a key of RESIZES.
    """
    if record.problem:
        return None, [record.problem]
    try:
        encoded = BytesIO(record.data) if isinstance(record, EncodedRecord) else None
        with Image.open(encoded or data_dir / record.image) as file:
            # A large JPEG is decoded at a half, a quarter or an eighth of its size, which is much faster.
            file.draft(None, (2 * size, 2 * size))  # type: ignore[arg-type]  # None keeps the mode
            notes = [MODE_NOTES[file.mode]] if file.mode in MODE_NOTES else []
            image: Image.Image = file
            if file.getexif().get(EXIF_ORIENTATION, 1) != 1:
                notes.append("rotated by its EXIF")
                image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                notes.append("transparent")
            return RESIZES[resize](to_rgb(image), size).tobytes(), notes
    except Exception:  # Pillow raises many kinds for broken files
        return None, ["broken, or no image"]


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
