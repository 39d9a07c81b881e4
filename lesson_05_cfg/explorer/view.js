/** What the page shows of a run: one step at a time, and the row of thumbnails. */

const STRIP = 10; // thumbnails per row
const HEAT = ["#080a1e", "#3c1e78", "#b4326e", "#fa8c3c", "#fff0aa"].map(toRGB); // of attention, 0 to 1

export const $ = (id) => document.getElementById(id);

/** A new element with some of its properties set. */
export const element = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);

/** x_t and predicted x_0 at a position of the slider; the last position is the finished image. */
function imagesAt(run, position) {
  const { steps, numSteps } = run;
  const step = steps[Math.min(position, steps.length - 1)];
  const finished = position >= numSteps && steps.length === numSteps;
  return finished ? { x_t: step.x_prev, x_0: step.x_prev, step } : { x_t: step.x_t, x_0: step.x_0, step };
}

/**
 * Show one step of both runs in all panels.
 * runs: {first, second}, each {caption, tokens, scale, numSteps, process, steps, seconds} or null.
 */
export function showStep(runs, position, tokenizer) {
  const run = runs.first;
  if (!run?.steps.length) return;
  const { x_t, x_0, step } = imagesAt(run, position);
  drawImage($("x_t"), x_t);
  for (const id of ["x_0", "attending", "compare-first"]) drawImage($(id), x_0);
  drawImage($("compare-second"), runs.second?.steps.length ? imagesAt(runs.second, position).x_0 : null);
  showTime(run, position, step);
  showGuidance(run, step);
  showAttention(run, step, tokenizer);
  for (const canvas of $("strip").children) {
    canvas.classList.toggle("shown", Number(canvas.dataset.position) === position);
  }
}

function showTime(run, position, step) {
  const finished = position >= run.numSteps;
  const duration = run.seconds ? ` in ${run.seconds.toFixed(1)} s` : "";
  const text = finished
    ? `Finished: ${run.numSteps} steps${duration}`
    : `Step ${position + 1} of ${run.numSteps}, t = ${step.t}`;
  $("time-value").textContent = text;
  $("time").setAttribute("aria-valuetext", text);
  $("x_t-index").textContent = finished ? "0" : "t";
  $("x_t-text").textContent = finished ? "the finished image" : "the noisy image";
  const caption = run.caption || "the empty caption";
  $("x_t").setAttribute("aria-label", finished ? `finished image of ${caption}` : `x_t at t = ${step.t}`);
  $("x_0").setAttribute("aria-label", `x_0 predicted at t = ${step.t} for ${caption}`);
}

/** What the network says with and without the caption, as images, and their difference around gray. */
function showGuidance(run, step) {
  const { cond, uncond } = step.output;
  const x_0Of = ({ eps_hat }) => run.process.x_0FromNoise(step.x_t, step.i, eps_hat);
  const [withCaption, without] = [x_0Of(cond), x_0Of(uncond)];
  const difference = withCaption.map((x, k) => x - without[k]);
  const largest = difference.reduce((max, x) => Math.max(max, Math.abs(x)), 0);
  const contrast = 1 / Math.max(largest, 0.05);
  drawImage($("without"), without);
  drawImage($("with"), withCaption);
  drawImage($("difference"), difference.map((x) => contrast * x));
  drawImage($("guided"), step.x_0);
  $("difference-detail").textContent = `gray is 0, at most ${largest.toFixed(2)}`;
  $("guided-scale").textContent = run.scale;
}

/** One map per token of the caption, all on the scale of the largest attention at this step. */
function showAttention(run, step, tokenizer) {
  const { attention } = step.output.cond; // [token, 8, 8]
  const size = attention.length / tokenizer.contextLength;
  const tokens = run.tokens.slice(0, tokenizer.contextLength);
  const tiles = $("attention").children;
  while (tiles.length > tokens.length) tiles[tiles.length - 1].remove();
  while (tiles.length < tokens.length) $("attention").append(newTile(Math.sqrt(size)));
  const largest = Math.max(...attention.subarray(0, size * tokens.length), 1e-6);
  tokens.forEach((id, i) => {
    const map = attention.subarray(i * size, (i + 1) * size);
    const [canvas, label] = tiles[i].children;
    label.textContent = `“${tokenizer.text(id)}” up to ${Math.round(100 * Math.max(...map))}\u00a0%`;
    canvas.setAttribute("aria-label", `attention to ${label.textContent}`);
    drawHeat(canvas, map.map((x) => Math.sqrt(x / largest))); // the root makes weak attention visible
  });
}

function newTile(size) {
  const figure = element("figure");
  const canvas = element("canvas", { width: size, height: size });
  canvas.setAttribute("role", "img");
  figure.append(canvas, element("figcaption"));
  return figure;
}

/** Two rows of thumbnails along time: x_t and the predicted x_0. */
export function showStrip(run) {
  const count = Math.min(STRIP, run.numSteps + 1);
  const strip = $("strip");
  if (strip.children.length !== 2 * count) {
    const thumbnails = Array.from({ length: 2 * count }, () => element("canvas", { width: 32, height: 32 }));
    strip.style.gridTemplateColumns = `repeat(${count}, 1fr)`;
    strip.replaceChildren(...thumbnails);
  }
  [...strip.children].forEach((canvas, i) => {
    const position = Math.round(((i % count) * run.numSteps) / (count - 1));
    canvas.dataset.position = position;
    const known = position < run.steps.length || run.steps.length === run.numSteps;
    const images = known ? imagesAt(run, position) : { x_t: null, x_0: null };
    drawImage(canvas, i < count ? images.x_t : images.x_0);
  });
}

/** image: [3, H, W] in [-1, 1], values outside are clipped; null leaves the canvas blank. */
export function drawImage(canvas, image) {
  const size = canvas.width * canvas.height;
  const pixels = new ImageData(canvas.width, canvas.height);
  for (let k = 0; image && k < size; k++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * k + c] = image[c * size + k] * 127.5 + 127.5; // rounds, clips
    pixels.data[4 * k + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** values: in [0, 1], drawn from dark blue to light yellow. */
function drawHeat(canvas, values) {
  const pixels = new ImageData(canvas.width, canvas.height);
  values.forEach((value, k) => {
    const x = value * (HEAT.length - 1);
    const low = Math.min(Math.floor(x), HEAT.length - 2);
    const mix = (from, c) => from + (x - low) * (HEAT[low + 1][c] - from);
    pixels.data.set([...HEAT[low].map(mix), 255], 4 * k);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function toRGB(colour) {
  return [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
}
