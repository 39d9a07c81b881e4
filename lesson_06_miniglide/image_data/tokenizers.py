"""Which tokenizer a data set's captions get."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer

GPT2_VOCABULARY = 50_257


def make_tokenizer(
    captions: Sequence[str], text_config: TextConfig, vocabulary: str | None = None
) -> CaptionTokenizer:
    """Return a BPE trained on the captions, of at most text_config.vocab_size tokens, or GPT-2's.

    Raises UserError if the folder does not contain GPT-2's vocabulary.
    """
    if vocabulary is None:
        return CaptionTokenizer.train(captions, text_config.vocab_size, text_config.context_length)
    return gpt2_tokenizer(vocabulary, text_config.context_length)


def gpt2_tokenizer(folder: str | Path, context_length: int) -> CaptionTokenizer:
    """Return GLIDE's tokenizer, from a folder with GPT-2's encoder.json and vocab.bpe. Raises UserError."""
    files = [Path(folder) / name for name in ("encoder.json", "vocab.bpe")]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"--vocabulary {folder} lacks {missing[0].name}; it takes GPT-2's two files")
    try:
        tokenizer = CaptionTokenizer.from_gpt2_files(files[0], files[1], context_length)
    except Exception as error:  # of the library's own kind
        raise UserError(f"--vocabulary {folder} cannot be read ({error})") from None
    if tokenizer.padding_id is None or max(tokenizer.tokenizer.get_vocab().values()) >= GPT2_VOCABULARY:
        raise UserError(f"--vocabulary {folder}: its encoder.json is not GPT-2's")
    return tokenizer
