"""From captions to padded token ids: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"  # its id fills the padding, where the mask is False and the network does not read it


class CaptionTokenizer:
    """Captions -> tokens int64 [N, context_length] and mask bool [N, context_length], True at tokens.

    There are no start and end tokens: the empty caption is all padding. Any text can be written in bytes, so
    there are no unknown words either, only words that take many tokens. Longer captions are truncated.
    """

    def __init__(self, tokenizer: Tokenizer | ByteLevelBPETokenizer, context_length: int):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.padding_id = tokenizer.token_to_id(END)

    @classmethod
    def train(
        cls, captions: Sequence[str], vocab_size: int = 512, context_length: int = 8
    ) -> "CaptionTokenizer":
        """Merge the most frequent pairs of tokens until there are at most `vocab_size` of them."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([caption.lower() for caption in captions], trainer)
        return cls(tokenizer, context_length)

    @classmethod
    def from_gpt2_files(
        cls, encoder_json: str | Path, vocab_bpe: str | Path, context_length: int = 128
    ) -> "CaptionTokenizer":
        """Load GLIDE's tokenizer: GPT-2's vocabulary and merges."""
        tokenizer = ByteLevelBPETokenizer.from_file(str(encoder_json), str(vocab_bpe))
        return cls(tokenizer, context_length)

    @classmethod
    def from_json(cls, text: str, context_length: int) -> "CaptionTokenizer":
        """Load what `to_json` returned."""
        return cls(Tokenizer.from_str(text), context_length)

    def to_json(self) -> str:
        """Return vocabulary and merges as JSON."""
        return self.tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def token_ids(self, caption: str) -> list[int]:
        """Return all token ids of a lower-cased caption, without truncation."""
        return self.tokenizer.encode(caption.lower()).ids

    def pieces(self, caption: str) -> list[str]:
        """Return the text of each token of a caption, without truncation."""
        return [self.tokenizer.decode([i]) for i in self.token_ids(caption)]

    def encode(self, captions: Sequence[str]) -> tuple[Int[Tensor, "n length"], Bool[Tensor, "n length"]]:
        """Return padded, truncated tokens and their mask."""
        assert self.padding_id is not None, f"the vocabulary lacks {END}"
        tokens = torch.full((len(captions), self.context_length), self.padding_id)
        mask = torch.zeros(len(captions), self.context_length, dtype=torch.bool)
        for i, caption in enumerate(captions):
            ids = self.token_ids(caption)[: self.context_length]
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[i, : len(ids)] = True
        return tokens, mask
