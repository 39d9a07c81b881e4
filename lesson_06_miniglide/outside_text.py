"""Captions read by a language model that was trained on text alone and stays as it is (Imagen: Saharia et al.
2022).

    python lesson_06_miniglide/train.py --text-encoder t5-small        # needs: pip install transformers

Its states take the place of lesson 4's tokens: computed once for all captions, kept on the disk, and turned
into a Text by a small trained layer.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.command import UserError
from common.runs import digest, make_folder, write_atomically
from lesson_04_text_conditioning.text_transformer import Text

BATCH = 64  # captions at a time


@dataclass(frozen=True)
class OutsideConfig:
    """In the place of lesson 4's TextConfig."""

    encoder: str  # a name or a folder that transformers knows
    weights: str  # their digest
    states: int  # width of its states
    context: int  # tokens
    width: int

    def new_encoder(self, emb_channels):
        return OutsideText(self, emb_channels)


class OutsideText(nn.Module):
    """states [N, context, d], mask bool [N, context] -> Text.

    The whole caption is the mean of its tokens, as in Imagen, the empty one of its padding.
    """

    def __init__(self, config, emb_channels):
        super().__init__()
        self.into = nn.Sequential(nn.Linear(config.states, config.width), nn.LayerNorm(config.width))
        self.padding_embedding = nn.Parameter(0.02 * torch.randn(config.context, config.width))
        self.proj = nn.Linear(config.width, emb_channels)
        nn.init.normal_(self.proj.weight, std=0.2)  # as in lesson 4: captions that differ must count

    def forward(self, states, mask):
        x = torch.where(mask[..., None], self.into(states.float()), self.padding_embedding)
        counted = mask | ~mask.any(1, keepdim=True)  # [N, context]
        return Text(self.proj((x * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)), x)


class FrozenEncoder:
    """In the place of lesson 4's CaptionTokenizer: captions -> float16 states [N, context, d] and mask.

    name: t5-small, another encoder of T5's kind, or a folder with one. Raises UserError if the library or
    the weights are missing.
    """

    def __init__(self, name, context):
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError:
            raise UserError("--text-encoder needs a library: pip install transformers") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, found = T5EncoderModel.from_pretrained(name, output_loading_info=True)
            self.model = model.eval().requires_grad_(False)
        except Exception as error:  # of three libraries' kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--text-encoder {name} cannot be had ({reason}); name a folder with it"
            ) from None
        self.name, self.context, self.width = name, context, self.model.config.d_model
        if missing := sorted(set(found["missing_keys"]) - {"encoder.embed_tokens.weight"}):
            raise UserError(f"--text-encoder {name} is not of T5's kind: it has no {missing[0]}")
        if self.tokenizer.unk_token_id in self.pieces("a"):
            raise UserError(f"--text-encoder {name} cannot read: its folder lacks the tokenizer's files")

    def config(self, width):
        return OutsideConfig(self.name, digest(self.model), self.width, self.context, width)

    def pieces(self, caption):
        """The caption's token ids, however many."""
        return self.tokenizer(caption)["input_ids"]

    def mask(self, captions):
        """bool [N, context]: where there is a token. Of the empty caption nowhere, as in lesson 4."""
        read = self.read(captions)["attention_mask"].bool()
        return read & torch.tensor([bool(caption) for caption in captions])[:, None]

    def read(self, captions):
        settings = {"max_length": self.context, "padding": "max_length", "truncation": True}
        return self.tokenizer(captions, return_tensors="pt", **settings)

    @torch.no_grad()
    def states(self, captions):
        read = self.read(captions)
        answer = self.model(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        return answer.last_hidden_state.half()

    def encode(self, captions):
        parts = [captions[i : i + BATCH] for i in range(0, len(captions), BATCH)]
        return torch.cat([self.states(part) for part in parts]), self.mask(captions)


class KeptStates:
    """An encoder of one data set's captions, whose states are computed once and kept in `folder`."""

    def __init__(self, encoder, folder):
        self.encoder, self.folder, self.pieces = encoder, Path(folder), encoder.pieces

    def encode(self, captions):
        encoder = self.encoder
        ids = encoder.read(captions)["input_ids"]
        settings = f"{digest(encoder.model)} {list(ids.shape)}".encode() + ids.numpy().tobytes()
        path = self.folder / f"states_{sha256(settings).hexdigest()[:16]}.npy"
        if not path.exists():
            make_folder(self.folder, "--cache-dir")
            write_atomically(path, lambda part: self.write(part, captions))
        return torch.from_numpy(np.load(path, mmap_mode="c")), encoder.mask(captions)

    def write(self, path, captions):
        shape = (len(captions), self.encoder.context, self.encoder.width)
        states = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        for i in tqdm(range(0, len(captions), BATCH), desc="captions read"):
            states[i : i + BATCH] = self.encoder.states(captions[i : i + BATCH]).numpy()
        states.flush()


def encoder_of(text):
    """The encoder that a checkpoint was trained with. text: its OutsideConfig as a dict. Raises UserError."""
    encoder = FrozenEncoder(text["encoder"], text["context"])
    if digest(encoder.model) != text["weights"]:
        raise UserError(
            f"{text['encoder']} holds other weights now than those that --checkpoint learned from"
        )
    return encoder


def is_outside(facts):
    """Whether a checkpoint's captions are read by an encoder from outside."""
    return "encoder" in facts["text"]
