"""Lesson 5: export the model to ONNX, for the explorer and for every other ONNX runtime.

    python lesson_05_cfg/export_onnx.py        # needs: pip install onnx onnxscript

It writes text_encoder.onnx, unet.onnx, tokenizer.json and model.json. `explorer/serve.py` adds the page that
runs them in a browser.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.cli import run_command
from common.digits.captions import CAPTIONS, COLOURS, HELD_OUT, PALETTE, WORDS
from common.errors import UserError
from common.files import make_folder, write_atomically, write_json, write_text
from common.training.checkpoints import weights_hash
from lesson_04_text_conditioning.captioned_mnist import PROMPTS
from lesson_04_text_conditioning.studies.attention_maps import record_attention
from lesson_04_text_conditioning.text_transformer import TextEncoding
from lesson_05_cfg.pipeline import TextToImagePipeline

DIST = Path(__file__).parent / "explorer" / "dist"  # generated, not committed
MODEL_FILES = ("text_encoder.onnx", "unet.onnx", "tokenizer.json", "model.json")
ATTENTION_SIZE = 8  # resolution of the attention maps
MIN_HALF = 64  # values that a tensor must have to be stored in half precision


@dataclass(frozen=True)
class Config:
    """Lesson 5: export text encoder, UNet, tokenizer and constants for ONNX runtimes."""

    checkpoint: str | None = None  # a .safetensors file or a run's folder; default: the pretrained weights
    out: str | None = None  # folder to write; default: lesson_05_cfg/explorer/dist/model


class TextEncoderGraph(nn.Module):
    """(tokens [N, L], mask [N, L]) -> pooled [N, emb_channels], token_states [N, L, width]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self, tokens: Int[Tensor, "n length"], mask: Bool[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n emb_channels"], Float[Tensor, "n length width"]]:
        text = self.network.encode_text(tokens, mask)  # type: ignore[operator]
        return text.pooled, text.token_states


class UNetGraph(nn.Module):
    """(x_t [N, C, H, W], t [N], pooled, token_states) -> eps_hat, v [N, C, H, W], attention [N, L, 8, 8].

    eps_hat is converted from the predicted velocity, as in the pipeline, and v is the learned variance.
    attention: how much each position attends to each token, the mean over the heads and the layers at 8x8.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self,
        x_t: Float[Tensor, "n c h w"],
        t: Int[Tensor, "n"],
        pooled: Float[Tensor, "n emb_channels"],
        token_states: Float[Tensor, "n length width"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        with record_attention(self.network, ATTENTION_SIZE) as maps:
            output = self.network(x_t, t, text=TextEncoding(pooled, token_states))
        c = x_t.shape[1]
        return output[:, :c], output[:, c:], maps[0]


def to_onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str]) -> Any:
    """Return a module as an onnx.ModelProto with a dynamic batch size.

    inputs: examples [N, ...] by name. outputs: names. Weights are stored in half precision wherever that
    loses nothing, as with the pretrained weights; all computation stays in float32. Raises UserError if a
    library is missing.
    """
    onnx = import_onnx()
    n = torch.export.Dim("N", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the name of an axis, and the exporter's own code
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: n} for _ in inputs),
        )
    assert program is not None
    model = onnx.ModelProto.FromString(program.model_proto.SerializeToString())
    strip_source_locations(model)
    halve_weights(model)
    onnx.checker.check_model(model)
    return model


def import_onnx() -> Any:
    """Return the module onnx. Raises UserError if it, or the exporter's onnxscript, cannot be imported."""
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        reason = f"the export needs two more libraries ({error})"
        raise UserError(f"{reason}: pip install onnx onnxscript") from None
    return onnx


def strip_source_locations(model: Any) -> None:
    """Delete the exporter's notes on our source code: an eighth of the file, with paths of this machine."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for item in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del item.metadata_props[:]
    del model.graph.metadata_props[:], model.metadata_props[:]


def halve_weights(model: Any) -> None:
    """Store tensors whose values float16 represents exactly in float16, and cast them back in the graph.

    The runtime folds these casts when it loads the model, so that a step takes no longer.
    """
    onnx, casts = import_onnx(), []
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < MIN_HALF:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            name = weight.name
            weight.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def model_constants(pipe: TextToImagePipeline) -> dict[str, Any]:
    """Return everything besides weights that sampling and the page need, as JSON."""
    tokenizer: Any = pipe.tokenizer
    pieces = tokenizer.tokenizer.pre_tokenizer
    return {
        "weights": weights_hash(pipe.network),
        "image_shape": pipe.image_shape,
        "range": [-1, 1],  # of images; pixel = round((x + 1) * 127.5)
        "alpha_bar": pipe.process.alpha_bar.tolist(),
        "context_length": tokenizer.context_length,
        "padding_id": tokenizer.padding_id,
        "longest_caption": max(len(tokenizer.token_ids(caption)) for caption in CAPTIONS),  # in tokens
        "pieces": sorted({piece for text in CAPTIONS for piece, _ in pieces.pre_tokenize_str(text)}),
        "prompts": PROMPTS,
        "digits": WORDS,
        "colours": {name: list(PALETTE[name]) for name in COLOURS},
        "held_out": HELD_OUT,  # for each digit, the colour that it never has in training
    }


def export_model(pipe: TextToImagePipeline, folder: Path) -> None:
    """Write MODEL_FILES, about 4 MB for the pretrained weights. Raises UserError."""
    import_onnx()
    make_folder(folder, "--out")
    network = pipe.network
    tokens, mask = pipe.tokenizer.encode(PROMPTS[:2])
    pooled, token_states = network.encode_text(tokens, mask)
    text_inputs = {"tokens": tokens, "mask": mask}
    x_t, t = torch.zeros(2, *pipe.image_shape), torch.tensor([0, 1])
    unet_inputs = {"x_t": x_t, "t": t, "pooled": pooled, "token_states": token_states}
    graphs = {
        "text_encoder.onnx": to_onnx(TextEncoderGraph(network), text_inputs, ["pooled", "token_states"]),
        "unet.onnx": to_onnx(UNetGraph(network), unet_inputs, ["eps_hat", "v", "attention"]),
    }
    for name, graph in graphs.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=graph.SerializeToString()))
    vocabulary: Any = pipe.tokenizer
    write_text(folder / "tokenizer.json", json.dumps(json.loads(vocabulary.to_json())))
    write_json(folder / "model.json", model_constants(pipe))


def main(config: Config) -> None:
    import_onnx()  # before a minute of work
    folder = Path(config.out) if config.out else DIST / "model"
    export_model(TextToImagePipeline.from_pretrained(config.checkpoint, "cpu"), folder)
    size = sum((folder / name).stat().st_size for name in MODEL_FILES)
    print(f"{folder}: {', '.join(MODEL_FILES)}, {size / 1e6:.1f} MB in all")


if __name__ == "__main__":
    run_command(main, Config)
