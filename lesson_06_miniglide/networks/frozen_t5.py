"""A frozen language model as the text encoder (Imagen: Saharia et al. 2022).

    python lesson_06_miniglide/train.py --text-encoder t5-small        # needs: pip install transformers

Its hidden states take the place of lesson 4's tokens. They are computed once for all captions, cached on the
disk, and turned into a TextEncoding by a small trained layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from common.files import make_folder, write_atomically
from common.training.checkpoints import weights_hash
from lesson_04_text_conditioning.text_transformer import TextEncoding

BATCH = 64  # captions per batch


@dataclass(frozen=True)
class T5Config:
    """Settings of a frozen encoder and its adapter, in place of lesson 4's TextConfig."""

    encoder: str  # a name or a folder that transformers knows
    weights: str  # hash of its weights
    states: int  # width of its hidden states
    context_length: int  # tokens
    width: int  # of the token states that the UNet sees

    def build_encoder(self, emb_channels: int) -> nn.Module:
        """Return the trained layer (states, mask) -> TextEncoding."""
        return T5Adapter(self, emb_channels)


class T5Adapter(nn.Module):
    """(hidden states [N, L, d], mask bool [N, L]) -> TextEncoding.

    The pooled embedding is the mean over the tokens, as in Imagen; for the empty caption, over its padding.
    """

    def __init__(self, config: T5Config, emb_channels: int):
        super().__init__()
        self.proj_in = nn.Sequential(nn.Linear(config.states, config.width), nn.LayerNorm(config.width))
        self.padding_embedding = nn.Parameter(0.02 * torch.randn(config.context_length, config.width))
        self.proj = nn.Linear(config.width, emb_channels)
        nn.init.normal_(self.proj.weight, std=0.2)  # as in lesson 4: different captions must matter at once

    def forward(self, states: Float[Tensor, "n length d"], mask: Bool[Tensor, "n length"]) -> TextEncoding:
        x = torch.where(mask[..., None], self.proj_in(states.float()), self.padding_embedding)
        counted = mask | ~mask.any(1, keepdim=True)  # [N, L]
        pooled = (x * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
        return TextEncoding(self.proj(pooled), x)


class FrozenEncoder:
    """Captions -> float16 hidden states [N, L, d] and mask, in place of lesson 4's CaptionTokenizer.

    name: t5-small, another T5 encoder, or a folder with one. Raises UserError if the library or the weights
    are missing.
    """

    def __init__(self, name: str, context_length: int):
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
                f"--text-encoder {name} cannot be loaded ({reason}); name a folder that contains it"
            ) from None
        self.name, self.context_length, self.width = name, context_length, self.model.config.d_model
        if missing := sorted(set(found["missing_keys"]) - {"encoder.embed_tokens.weight"}):
            raise UserError(f"--text-encoder {name} is not a T5 encoder: it has no {missing[0]}")
        if self.tokenizer.unk_token_id in self.token_ids("a"):
            raise UserError(f"--text-encoder {name} cannot tokenize: its folder lacks the tokenizer's files")

    def config(self, width: int) -> T5Config:
        """Return the settings to save, for an adapter of this width."""
        return T5Config(self.name, weights_hash(self.model), self.width, self.context_length, width)

    def token_ids(self, caption: str) -> list[int]:
        """Return all token ids of a caption, without truncation."""
        return self.tokenizer(caption)["input_ids"]

    def mask(self, captions: Sequence[str]) -> Bool[Tensor, "n length"]:
        """Return True where there is a token; for the empty caption nowhere, as in lesson 4."""
        read = self.tokenize(captions)["attention_mask"].bool()
        return read & torch.tensor([bool(caption) for caption in captions])[:, None]

    def tokenize(self, captions: Sequence[str]) -> Any:
        settings = {"max_length": self.context_length, "padding": "max_length", "truncation": True}
        return self.tokenizer(list(captions), return_tensors="pt", **settings)

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> Float[Tensor, "n length d"]:
        """Return the encoder's hidden states in float16."""
        read = self.tokenize(captions)
        output = self.model(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        return output.last_hidden_state.half()

    def encode(self, captions: Sequence[str]) -> tuple[Float[Tensor, "n length d"], Bool[Tensor, "n length"]]:
        """Return hidden states and mask."""
        parts = [captions[i : i + BATCH] for i in range(0, len(captions), BATCH)]
        return torch.cat([self.states(part) for part in parts]), self.mask(captions)


class CachedTextEncoder:
    """A frozen encoder that computes the hidden states of a data set once and keeps them in `folder`."""

    def __init__(self, encoder: FrozenEncoder, folder: str | Path):
        self.encoder, self.folder = encoder, Path(folder)
        self.token_ids: Callable[[str], list[int]] = encoder.token_ids
        self.context_length = encoder.context_length

    def encode(self, captions: Sequence[str]) -> tuple[Float[Tensor, "n length d"], Bool[Tensor, "n length"]]:
        """Return memory-mapped hidden states and mask. Raises UserError if the folder cannot be written."""
        encoder = self.encoder
        ids = encoder.tokenize(captions)["input_ids"]
        settings = f"{weights_hash(encoder.model)} {list(ids.shape)}".encode() + ids.numpy().tobytes()
        path = self.folder / f"states_{sha256(settings).hexdigest()[:16]}.npy"
        if not path.exists():
            make_folder(self.folder, "--cache-dir")
            write_atomically(path, lambda part: self.write(part, captions))
        return torch.from_numpy(np.load(path, mmap_mode="c")), encoder.mask(captions)

    def write(self, path: Path, captions: Sequence[str]) -> None:
        shape = (len(captions), self.encoder.context_length, self.encoder.width)
        states = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        for i in tqdm(range(0, len(captions), BATCH), desc="encoding captions"):
            states[i : i + BATCH] = self.encoder.states(captions[i : i + BATCH]).numpy()
        states.flush()


def encoder_from_metadata(text: Mapping[str, Any]) -> FrozenEncoder:
    """Return the frozen encoder of a checkpoint. text: its T5Config as a dict. Raises UserError."""
    encoder = FrozenEncoder(text["encoder"], text["context_length"])
    if weights_hash(encoder.model) != text["weights"]:
        raise UserError(
            f"{text['encoder']} has other weights now than those that --checkpoint was trained with"
        )
    return encoder


def uses_t5(metadata: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's captions are read by a frozen encoder."""
    return "encoder" in metadata["text"]
