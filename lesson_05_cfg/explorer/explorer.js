/** The page: reads the settings, samples with two guidance scales, and keeps every step to be looked at. */

import { hasWebGPU, TextToImageNetwork } from "./network.js";
import { GaussianDiffusion, guide, noiseSource, SAMPLERS } from "./sampling.js";
import { $, drawImage, element, showStep, showStrip } from "./view.js";

const runs = { first: null, second: null }; // one per guidance scale, as view.js shows them
let network = null;
let latest = 0; // number of the newest request; older ones stop at their next step
let running = Promise.resolve();
let following = true; // the time slider moves along while sampling
let timer = null; // while the steps are played

// -- Sampling -----------------------------------------------------------------------------------------------

function readSettings() {
  const seed = Math.floor(Number($("seed").value) || 0);
  return {
    caption: $("caption").value.trim(),
    sampler: $("sampler").value,
    numSteps: Number($("steps").value),
    seed: Math.min(2 ** 31 - 1, Math.max(0, seed)),
    scales: { first: Number($("scale").value), second: Number($("other-scale").value) },
  };
}

/** Sample with the current settings, once the run before has stopped. force: also what has not changed. */
function generate(force = false) {
  const request = ++latest;
  announce("");
  showSettings();
  if (network) running = running.then(() => sampleBoth(request, force)).catch(showError);
  return running;
}

async function sampleBoth(request, force) {
  const { scales, ...settings } = readSettings();
  const keyOf = (name) => JSON.stringify({ ...settings, scale: scales[name] });
  const isDone = (name) => runs[name]?.key === keyOf(name) && runs[name].seconds;
  const missing = Object.keys(runs).filter((name) => force || !isDone(name));
  for (const name of missing) runs[name] = null;
  for (const name of missing) if (request === latest) await sample(name, request, keyOf(name));
  if (request === latest) announce("Both guidance scales are finished.");
}

/** Sample for one of the two scales and show every step, until another request comes. key: the settings. */
async function sample(name, request, key) {
  const { caption, sampler, numSteps, seed, scale } = JSON.parse(key);
  const process = new GaussianDiffusion(network.constants.alpha_bar).respaceEvenly(numSteps);
  const tokens = network.tokenizer.tokenIds(caption);
  const run = { key, caption, tokens, scale, numSteps, process, steps: [] };
  runs[name] = run;
  if (name === "first") following = true;
  const started = performance.now();
  const text = await network.encode(caption);
  const denoiser = async (x_t, t) => {
    const { cond, uncond } = await network.predict(x_t, t, text);
    return { ...guide(cond, uncond, scale), cond, uncond };
  };
  const gaussianNoise = noiseSource(seed);
  const x_T = gaussianNoise(network.constants.image_shape.reduce((a, b) => a * b));
  for await (const step of SAMPLERS[sampler](process, denoiser, x_T, gaussianNoise)) {
    run.steps.push(step);
    showRun(name);
    await nextPaint();
    if (request !== latest) return;
  }
  run.seconds = (performance.now() - started) / 1000;
  showRun(name);
  if (name === "first") announce(`${caption || "the empty caption"}: finished.`);
}

/** Let the browser paint this step and handle input. In a hidden tab sampling waits. */
const nextPaint = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));

// -- Showing ------------------------------------------------------------------------------------------------

function showRun(name) {
  const run = runs[name];
  if (name === "first") {
    $("time").max = run.numSteps;
    if (following) $("time").value = run.seconds ? run.numSteps : run.steps.length - 1;
    showStrip(run);
  }
  showCurrentStep();
}

function showCurrentStep() {
  if (network) showStep(runs, Number($("time").value), network.tokenizer);
}

/** Tell users of a screen reader what others see. */
function announce(text) {
  $("announcement").textContent = text;
}

function showError(error) {
  console.error(error);
  $("loading").hidden = true;
  $("time-value").textContent = `This does not work here: ${error.message}`;
  announce($("time-value").textContent);
}

function showSettings() {
  const { caption, numSteps, scales } = readSettings();
  $("scale-value").textContent = $("first-scale").textContent = scales.first;
  $("other-scale-value").textContent = $("second-scale").textContent = scales.second;
  $("steps-value").textContent = numSteps;
  for (const chip of $("examples").children) {
    chip.setAttribute("aria-pressed", String(chip.textContent === caption));
  }
  const notes = network ? notesOn(caption) : [];
  $("notes").replaceChildren(...notes.map((text) => element("li", { textContent: text })));
}

// -- Notes on captions --------------------------------------------------------------------------------------

/** What a visitor should know about a caption before wondering about its image. */
function notesOn(caption) {
  if (!caption) return ["The empty caption: the network draws any digit in any color."];
  const { tokenizer, constants } = network;
  const { context_length: length, longest_caption: longest } = constants;
  const notes = [];
  const unknown = tokenizer.unknownWords(caption).map((word) => `“${shorten(word, 20)}”`);
  if (unknown.length) {
    const guess = "The network reads such words in pieces and guesses. Try a caption like “a red seven”.";
    notes.push(`No training caption has ${shorten(unknown.join(", "), 80)} in this place. ${guess}`);
  }
  const ids = tokenizer.tokenIds(caption);
  if (ids.length > length) {
    const read = ids.slice(0, length).map((id) => tokenizer.text(id));
    notes.push(`This caption is too long. It is cut after the first ${length} tokens: “${read.join(" ")}”.`);
  } else if (ids.length > longest) {
    const warning = `The longest in training had ${longest}, and longer ones usually give noise.`;
    notes.push(`This caption has ${ids.length} tokens. ${warning}`);
  }
  const pair = heldOutPair(caption);
  if (pair && !notes.length) {
    notes.push(`No training image was a ${pair}. The network has to combine what it knows of both words.`);
  }
  return notes;
}

/** "green zero" if the caption asks for a digit in the color that training never showed it in. */
function heldOutPair(caption) {
  const { digits, colours, held_out } = network.constants;
  const words = caption.toLowerCase().split(/\s+/);
  const digit = digits.findIndex((name, i) => words.includes(name) || words.includes(String(i)));
  const colour = Object.keys(colours).find((name) => words.includes(name));
  return digit >= 0 && held_out[digit] === colour ? `${colour} ${digits[digit]}` : null;
}

const shorten = (text, length) => (text.length > length ? `${text.slice(0, length)}…` : text);

// -- Time ---------------------------------------------------------------------------------------------------

function showPosition(position) {
  following = false;
  $("time").value = position;
  showCurrentStep();
}

function play() {
  const [position, end] = [Number($("time").value), Number($("time").max)];
  showPosition(position < end ? position : 0);
  setPlaying(true);
  const advance = () => {
    const next = Number($("time").value) + 1;
    if (next > end) pause();
    else showPosition(next);
  };
  timer = setInterval(advance, Math.min(200, 4000 / end));
}

function pause() {
  clearInterval(timer);
  timer = null;
  setPlaying(false);
}

function setPlaying(playing) {
  $("play").textContent = playing ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play the steps");
}

// -- Starting -----------------------------------------------------------------------------------------------

function addListeners() {
  const on = (id, type, listener) => $(id).addEventListener(type, listener);
  on("form", "submit", (event) => {
    event.preventDefault();
    generate(true);
  });
  for (const id of ["scale", "steps", "sampler", "seed", "other-scale"]) {
    on(id, "input", showSettings);
    on(id, "change", () => generate());
  }
  on("caption", "input", showSettings);
  on("new-seed", "click", () => {
    $("seed").value = Math.floor(Math.random() * 10000);
    generate();
  });
  on("examples", "click", ({ target }) => {
    if (target.tagName !== "BUTTON") return;
    $("caption").value = target.textContent;
    generate();
  });
  on("time", "input", () => {
    pause();
    showPosition($("time").value);
  });
  on("strip", "click", ({ target }) => {
    if (!target.dataset.position) return;
    pause();
    showPosition(target.dataset.position);
  });
  on("play", "click", () => (timer ? pause() : play()));
  on("backend", "change", () => load($("backend").value).catch(showError));
}

async function load(backend) {
  latest++;
  await running;
  network = null;
  $("loading").hidden = false;
  $("time-value").textContent = "Loading the model …";
  const total = Number(document.body.dataset.bytes);
  let bytes = 0;
  network = await TextToImageNetwork.load(backend, (more) => {
    bytes += more;
    $("loading").value = Math.min(1, bytes / total);
  });
  $("loading").hidden = true;
  for (const id of ["generate", "play", "time"]) $(id).disabled = false;
  const toChip = (prompt) => element("button", { type: "button", textContent: prompt });
  $("examples").replaceChildren(...network.constants.prompts.map(toChip));
  await generate(true);
}

addListeners();
showSettings();
drawImage($("x_t"), noiseSource(readSettings().seed)(3 * 32 * 32)); // the first x_T, while the model loads
load("wasm").catch(showError);
hasWebGPU().then((available) => ($("backend-setting").hidden = !available));
navigator.serviceWorker?.register("service_worker.js");
