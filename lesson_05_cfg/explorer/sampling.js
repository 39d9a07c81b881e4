/**
 * The maths of lessons 1, 2 and 5 in JavaScript: a noising process, guidance, three samplers, and noise.
 *
 * Images are Float32Array of C*H*W values in [-1, 1]. A denoiser is an async function (x_t, t) ->
 * {eps_hat, v, ...}: predicted noise and the learned variance's interpolation weight. t is a timestep of the
 * process that the network was trained on, i an index into the respaced one.
 */

/** The process of lesson 1's GaussianDiffusion, restricted to some timesteps (all by default). */
export class GaussianDiffusion {
  constructor(alpha_bar, timesteps = alpha_bar.map((_, t) => t)) {
    this.timesteps = timesteps;
    this.alpha_bar = timesteps.map((t) => alpha_bar[t]);
    this.alpha_bar_prev = [1, ...this.alpha_bar.slice(0, -1)];
    this.betas = this.alpha_bar.map((value, i) => 1 - value / this.alpha_bar_prev[i]);
    this.beta_tilde = this.betas.map((b, i) => (b * (1 - this.alpha_bar_prev[i])) / (1 - this.alpha_bar[i]));
    this.numTimesteps = timesteps.length;
  }

  /** Keep `steps` evenly spaced timesteps, the last and the first included. */
  respaceEvenly(steps) {
    const last = this.numTimesteps - 1;
    if (!(steps >= 1 && steps <= last + 1)) throw new RangeError(`cannot take ${steps} steps`);
    return new GaussianDiffusion(this.alpha_bar, linspace(last, 0, steps).map(roundHalfToEven).reverse());
  }

  /** The x_0 that a predicted noise implies, not clipped. */
  x_0FromNoise(x_t, i, eps_hat) {
    const [scale, ratio] = [1 / Math.sqrt(this.alpha_bar[i]), Math.sqrt(1 / this.alpha_bar[i] - 1)];
    return x_t.map((x, k) => scale * x - ratio * eps_hat[k]);
  }

  /** The noise that x_0 implies; computed again after clipping. */
  noiseFromX_0(x_t, i, x_0) {
    const [scale, ratio] = [1 / Math.sqrt(this.alpha_bar[i]), Math.sqrt(1 / this.alpha_bar[i] - 1)];
    return x_t.map((x, k) => (scale * x - x_0[k]) / ratio);
  }
}

/** n evenly spaced numbers, counted from the nearer end: halfway between two timesteps the last bit decides. */
function linspace(start, end, n) {
  if (n === 1) return [start];
  const stride = (end - start) / (n - 1);
  const near = Math.floor(n / 2);
  return Array.from({ length: n }, (_, i) => (i < near ? start + stride * i : end - stride * (n - 1 - i)));
}

/** Half-way cases go to the even number, as in PyTorch. */
function roundHalfToEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

export const clampX_0 = (x_0) => x_0.map((x) => Math.min(1, Math.max(-1, x)));

/**
 * Classifier-free guidance: eps = eps_uncond + s (eps_cond - eps_uncond).
 * cond, uncond: {eps_hat, v}. The variance is that of the conditional branch, or of the only one that counts.
 */
export function guide(cond, uncond, guidance_scale) {
  if (guidance_scale === 0) return uncond;
  if (guidance_scale === 1) return cond;
  const eps_hat = uncond.eps_hat.map((eps, k) => eps + guidance_scale * (cond.eps_hat[k] - eps));
  return { eps_hat, v: cond.v };
}

/** What all samplers do first: ask the denoiser, and clip the x_0 that its prediction implies. */
async function predict(process, denoiser, x_t, i) {
  const output = await denoiser(x_t, process.timesteps[i]);
  return { output, x_0: clampX_0(process.x_0FromNoise(x_t, i, output.eps_hat)) };
}

/** Ancestral sampling with the learned variance (Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021). */
export async function* ddpmSample(process, denoiser, x_T, gaussianNoise) {
  const { betas, beta_tilde, alpha_bar, alpha_bar_prev } = process;
  let x_t = x_T;
  for (let i = process.numTimesteps - 1; i >= 0; i--) {
    const { output, x_0 } = await predict(process, denoiser, x_t, i);
    const coef_x_0 = (betas[i] * Math.sqrt(alpha_bar_prev[i])) / (1 - alpha_bar[i]);
    const coef_x_t = ((1 - alpha_bar_prev[i]) * Math.sqrt(1 - betas[i])) / (1 - alpha_bar[i]);
    let x_prev = x_t.map((x, k) => coef_x_0 * x_0[k] + coef_x_t * x);
    if (i > 0) {
      const [low, high] = [Math.log(beta_tilde[i]), Math.log(betas[i])];
      const sigma = output.v.map((v) => Math.exp(0.5 * (low + ((v + 1) / 2) * (high - low))));
      const noise = gaussianNoise(x_t.length);
      x_prev = x_prev.map((mean, k) => mean + sigma[k] * noise[k]);
    }
    yield { i, t: process.timesteps[i], x_t, x_0, x_prev, output };
    x_t = x_prev;
  }
}

/** DDIM without added noise (Song et al. 2021, eq. 12). */
export async function* ddimSample(process, denoiser, x_T) {
  let x_t = x_T;
  for (let i = process.numTimesteps - 1; i >= 0; i--) {
    const { output, x_0 } = await predict(process, denoiser, x_t, i);
    const eps_hat = process.noiseFromX_0(x_t, i, x_0);
    const [alpha, sigma] = signalAndNoise(process.alpha_bar_prev[i]);
    const x_prev = x_0.map((x, k) => alpha * x + sigma * eps_hat[k]);
    yield { i, t: process.timesteps[i], x_t, x_0, x_prev, output };
    x_t = x_prev;
  }
}

/** DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); the first and the last two steps are of first order. */
export async function* dpmpp2mSample(process, denoiser, x_T) {
  const lambda = process.alpha_bar.map((value) => 0.5 * Math.log(value / (1 - value)));
  let x_t = x_T;
  let x_0Before = null;
  for (let i = process.numTimesteps - 1; i >= 0; i--) {
    const { output, x_0 } = await predict(process, denoiser, x_t, i);
    let x_prev = x_0;
    if (i > 0) {
      const h = lambda[i - 1] - lambda[i];
      const extrapolation = x_0Before && i > 1 ? h / (2 * (lambda[i] - lambda[i + 1])) : 0;
      const x_0Mid = x_0.map((x, k) => x + extrapolation * (x - (x_0Before ?? x_0)[k]));
      const sigma = signalAndNoise(process.alpha_bar[i])[1];
      const [alphaPrev, sigmaPrev] = signalAndNoise(process.alpha_bar[i - 1]);
      const [ratio, weight] = [sigmaPrev / sigma, -alphaPrev * Math.expm1(-h)];
      x_prev = x_t.map((x, k) => ratio * x + weight * x_0Mid[k]);
    }
    yield { i, t: process.timesteps[i], x_t, x_0, x_prev, output };
    [x_t, x_0Before] = [x_prev, x_0];
  }
}

const signalAndNoise = (alpha_bar) => [Math.sqrt(alpha_bar), Math.sqrt(1 - alpha_bar)];

export const SAMPLERS = { "dpm++": dpmpp2mSample, ddim: ddimSample, ddpm: ddpmSample };

/**
 * A seeded source of white noise: n -> Float32Array of n normal numbers. This is not PyTorch's generator; a
 * seed gives another image here than in Python. Uniform numbers from splitmix32, normal ones by Box-Muller.
 */
export function noiseSource(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x9e3779b9) >>> 0;
    let z = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return ((z ^ (z >>> 15)) >>> 0) / 2 ** 32;
  };
  return (n) =>
    Float32Array.from(
      { length: n },
      () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()),
    );
}
