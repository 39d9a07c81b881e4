"""A frozen T5 as the text encoder: a tiny one with random weights; skipped without transformers."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.cli import run_command
from common.errors import UserError
from common.training.run_dir import saved_config
from lesson_06_miniglide import sample, train
from lesson_06_miniglide.networks import frozen_t5
from lesson_06_miniglide.networks.frozen_t5 import (
    CachedTextEncoder,
    FrozenEncoder,
    T5Config,
    encoder_from_metadata,
)


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("t5")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    captions = ["a small red circle left of a blue square", "three green triangles"]
    words.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"]))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    settings = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**settings)).save_pretrained(folder)
    return folder


def test_states_are_those_of_the_model_and_padding_is_masked(tiny_t5):
    encoder = FrozenEncoder(str(tiny_t5), 6)
    states, mask = encoder.encode(["a red circle", "", "a small red circle left of a blue square"])
    assert states.shape == (3, 6, 16) and states.dtype == torch.float16
    assert mask.sum(1).tolist() == [3, 0, 6]
    ids = torch.tensor([encoder.token_ids("a red circle")])
    alone = encoder.model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(states[0, :3].float(), alone, rtol=1e-2, atol=2e-3)


def test_padding_replaces_the_states_where_there_is_no_token():
    torch.manual_seed(0)
    text = T5Config("x", "hash", 16, 4, 8).build_encoder(12)
    states, mask = torch.randn(2, 4, 16), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    before = text(states, mask)
    assert before.pooled.shape == (2, 12) and before.token_states.shape == (2, 4, 8)
    after = text(torch.where(mask[..., None], states, states + 1), mask)
    assert torch.equal(before.token_states, after.token_states) and torch.equal(before.pooled, after.pooled)
    assert not torch.allclose(before.pooled[0], text(states + 1, mask).pooled[0])
    torch.testing.assert_close(before.pooled[0], text.proj(text.proj_in(states[0, :2]).mean(0)))


def test_states_are_computed_once_and_cached(tiny_t5, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_t5, "BATCH", 2)
    encoder, captions = FrozenEncoder(str(tiny_t5), 6), ["a", "red", "", "circle", "a red circle"]
    cached = CachedTextEncoder(encoder, tmp_path / "cache")
    first, mask = cached.encode(captions)
    plain, plain_mask = encoder.encode(captions)
    assert torch.equal(first, plain) and torch.equal(mask, plain_mask)
    monkeypatch.setattr(encoder, "states", lambda captions: pytest.fail("computed again"))
    again, _ = cached.encode(captions)
    assert torch.equal(again, first) and len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(pytest.fail.Exception):
        cached.encode(captions[:-1])  # other captions are not in the cache
    next(encoder.model.parameters()).data.add_(1)
    with pytest.raises(pytest.fail.Exception):
        cached.encode(captions)  # neither are the states of other weights


def test_training_and_sampling(tiny_t5, tmp_path, monkeypatch):
    monkeypatch.setattr("lesson_06_miniglide.image_data.captioned_images.NUM_SHAPES", 40)
    flags = ["--device", "cpu", "--dry-run", "--batch-size", "4", "--text-encoder", str(tiny_t5)]
    flags += ["--cache-dir", str(tmp_path / "cache")]
    run_command(train.main, train.Config, saved_config, argv=[*flags, "--out", str(tmp_path / "run")])
    out = tmp_path / "out.npz"
    flags = ["--checkpoint", str(tmp_path / "run"), "--prompt", "a red circle", "--steps", "2"]
    run_command(sample.main, sample.Config, argv=[*flags, "--device", "cpu", "--out", str(out)])
    assert np.load(out)["images"].shape == (8, 64, 64, 3)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["text_encoder"] == str(tiny_t5) and list((tmp_path / "cache").glob("states_*.npy"))


def test_other_weights_of_the_same_name_are_refused(tiny_t5):
    text = asdict(FrozenEncoder(str(tiny_t5), 6).config(8))
    assert encoder_from_metadata(text).context_length == 6
    with pytest.raises(UserError, match="other weights"):
        encoder_from_metadata(text | {"weights": "0"})


def test_folders_without_a_t5_are_refused(tiny_t5, tmp_path):
    def copy(name):
        return Path(shutil.copytree(tiny_t5, tmp_path / name))

    cut, other, no_tokenizer = copy("cut"), copy("other"), copy("no_tokenizer")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    weights = load_file(other / "model.safetensors")
    save_file({f"bert.{n}": w for n, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for file in no_tokenizer.glob("*token*"):
        file.unlink()
    for folder, line in ((cut, "cannot be loaded"), (other, "is not a T5 encoder"), (no_tokenizer, "cannot")):
        with pytest.raises(UserError, match=line):
            FrozenEncoder(str(folder), 6)


def test_messages_say_what_is_missing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(UserError, match="pip install transformers"):
            FrozenEncoder("t5-small", 8)
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot be loaded"):
        FrozenEncoder(str(tmp_path / "nothing"), 8)
