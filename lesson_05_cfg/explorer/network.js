/** Lesson 5's network in onnxruntime-web: loading, encoding captions, and predictions for both branches. */

import { CaptionTokenizer } from "./tokenizer.js";

// WebAssembly is the default: it runs everywhere, and for a network this small it is what we have measured.
const BACKENDS = {
  wasm: { script: "ort.wasm.min.mjs", binary: "ort-wasm-simd-threaded" },
  webgpu: { script: "ort.webgpu.min.mjs", binary: "ort-wasm-simd-threaded.jsep" },
};

/** Whether this browser can compute on a GPU at all. */
export async function hasWebGPU() {
  return Boolean(await navigator.gpu?.requestAdapter().catch(() => null));
}

/** Fetch a file, reporting its bytes as they arrive. Throws if it is not there. */
async function fetchBytes(url, onBytes) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  const chunks = [];
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(chunks).arrayBuffer());
    chunks.push(value);
    onBytes(value.length);
  }
}

const fetchJSON = async (url, onBytes) =>
  JSON.parse(new TextDecoder().decode(await fetchBytes(url, onBytes)));

export class TextToImageNetwork {
  /** backend: "wasm" or "webgpu". onBytes: called with the size of each part that arrives. */
  static async load(backend = "wasm", onBytes = () => {}) {
    const { script, binary } = BACKENDS[backend];
    const [ort, wasm, textEncoder, unet, tokenizer, constants] = await Promise.all([
      import(`./ort/${script}`),
      fetchBytes(`./ort/${binary}.wasm`, onBytes),
      fetchBytes("./model/text_encoder.onnx", onBytes),
      fetchBytes("./model/unet.onnx", onBytes),
      fetchJSON("./model/tokenizer.json", onBytes),
      fetchJSON("./model/model.json", onBytes),
    ]);
    ort.env.logLevel = "error"; // it warns about nodes that are better left to the CPU
    ort.env.wasm.numThreads = 1; // more need response headers that static hosts do not send
    ort.env.wasm.wasmBinary = wasm.buffer;
    ort.env.wasm.wasmPaths = { mjs: new URL(`./ort/${binary}.mjs`, import.meta.url).href };
    const network = new TextToImageNetwork();
    network.ort = ort;
    network.constants = constants;
    const open = (graph, provider) =>
      ort.InferenceSession.create(graph, { executionProviders: [provider], logSeverityLevel: 3 });
    network.textEncoder = await open(textEncoder, "wasm");
    network.unet = await open(unet, backend);
    network.tokenizer = new CaptionTokenizer(tokenizer, {
      contextLength: constants.context_length,
      paddingId: constants.padding_id,
      pieces: constants.pieces,
    });
    return network;
  }

  /** Encode a caption and the empty one: {pooled, token_states}, a batch of two, to be used at every step. */
  async encode(caption) {
    const [cond, uncond] = [this.tokenizer.encode(caption), this.tokenizer.encode("")];
    const shape = [2, this.constants.context_length];
    const tokens = new this.ort.Tensor("int64", BigInt64Array.of(...cond.tokens, ...uncond.tokens), shape);
    const mask = new this.ort.Tensor("bool", Uint8Array.of(...cond.mask, ...uncond.mask), shape);
    return this.textEncoder.run({ tokens, mask });
  }

  /**
   * What the network predicts with the caption and without it, in one batch of two.
   * text: of `encode`. Returns {cond, uncond}, each {eps_hat, v, attention} (attention: [token, 8, 8], flat).
   */
  async predict(x_t, t, text) {
    const shape = this.constants.image_shape;
    const both = new Float32Array(2 * x_t.length);
    both.set(x_t);
    both.set(x_t, x_t.length);
    const output = await this.unet.run({
      x_t: new this.ort.Tensor("float32", both, [2, ...shape]),
      t: new this.ort.Tensor("int64", BigInt64Array.of(BigInt(t), BigInt(t)), [2]),
      pooled: text.pooled,
      token_states: text.token_states,
    });
    const half = (branch) => {
      const part = ({ data }) => data.slice((branch * data.length) / 2, ((branch + 1) * data.length) / 2);
      return { eps_hat: part(output.eps_hat), v: part(output.v), attention: part(output.attention) };
    };
    return { cond: half(0), uncond: half(1) };
  }
}
