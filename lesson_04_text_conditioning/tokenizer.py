"""From captions to numbers: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), padded, masked."""

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # its id fills the padding, where the mask is False and nobody looks


class CaptionTokenizer:
    """Captions -> tokens int64 [N, context] and mask bool [N, context], True where there is a token.

    There is no start and no end token: the empty caption is all padding. Any text can be written in bytes, so
    there is no unknown word either, only words in many pieces. What does not fit into the context is cut off.
    """

    def __init__(self, tokenizer, context):
        self.tokenizer, self.context = tokenizer, context
        self.padding_id = tokenizer.token_to_id(END)

    @classmethod
    def train(cls, captions, vocab_size=512, context=8):
        """Merge the most frequent pairs of tokens until there are `vocab_size` of them."""

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([caption.lower() for caption in captions], trainer)
        return cls(tokenizer, context)

    @classmethod
    def from_gpt2_files(cls, encoder_json, vocab_bpe, context=128):
        """GLIDE's tokenizer: GPT-2's vocabulary and merges."""
        tokenizer = ByteLevelBPETokenizer.from_file(str(encoder_json), str(vocab_bpe))
        return cls(tokenizer, context)

    @classmethod
    def from_json(cls, text, context):
        return cls(Tokenizer.from_str(text), context)

    def to_json(self):
        return self.tokenizer.to_str()

    @property
    def vocab_size(self):
        return self.tokenizer.get_vocab_size()

    def pieces(self, caption):
        """The caption's token ids, however many."""
        return self.tokenizer.encode(caption.lower()).ids

    def encode(self, captions):
        tokens = torch.full((len(captions), self.context), self.padding_id)
        mask = torch.zeros(len(captions), self.context, dtype=torch.bool)
        for i, caption in enumerate(captions):
            ids = self.pieces(caption)[: self.context]
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[i, : len(ids)] = True
        return tokens, mask
