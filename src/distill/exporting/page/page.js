// The page: pictures change as one types.
"use strict";

const find = (id) => document.getElementById(id);
const FILES = window.FILES; // name -> base64 of the compressed file; scripts beside the page set it

async function file(name) {
  const packed = Uint8Array.from(atob(FILES[name]), (character) => character.charCodeAt(0));
  delete FILES[name]; // it is not read again
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function json(name) {
  return JSON.parse(new TextDecoder().decode(await file(name)));
}

async function load() {
  const script = new Blob([await file("runtime.mjs")], { type: "text/javascript" });
  const wasm = ort.env.wasm;
  wasm.numThreads = 1; // more need headers that only a server can send
  wasm.wasmPaths = { mjs: URL.createObjectURL(script) };
  wasm.wasmBinary = await file("runtime.wasm");
  const about = await json("student.json");
  const sessions = {};
  for (const [name, part] of Object.entries(about.networks)) {
    find("status").textContent = `loading ${part.file}`;
    sessions[name] = await ort.InferenceSession.create(await file(part.file));
  }
  const tokenizers = {};
  for (const [name, found] of Object.entries(await json("tokenizers.json"))) {
    tokenizers[name] = new Tokenizer(found);
  }
  return new Student(about, sessions, tokenizers, ort);
}

function draw(canvas, bytes, height, width) {
  const area = height * width;
  const image = new ImageData(width, height);
  for (let i = 0; i < area; i += 1) {
    image.data.set([bytes[i], bytes[area + i], bytes[2 * area + i], 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function start(student) {
  const [height, width] = student.about.pixels;
  const canvases = [...document.querySelectorAll("canvas")];
  for (const canvas of canvases) Object.assign(canvas, { width, height });
  let wanted = 0; // number of the newest request
  let last = Promise.resolve();

  async function pictures(mine) {
    const caption = find("caption").value;
    const steps = document.querySelector("input[name=steps]:checked").value;
    const seed = Number(find("seed").value);
    const began = performance.now();
    for (const [i, canvas] of canvases.entries()) {
      if (mine !== wanted) return;
      const bytes = await student.picture(caption, seed + i, steps);
      draw(canvas, bytes, height, width);
      canvas.title = `seed ${seed + i}`;
      await new Promise((resume) => setTimeout(resume)); // typing comes first
    }
    const each = (performance.now() - began) / canvases.length / 1000;
    find("status").textContent = `${each.toFixed(2)} s a picture, in this browser`;
    document.body.dataset.shown = JSON.stringify([caption, seed, steps]);
  }

  function ask() {
    wanted += 1;
    const mine = wanted;
    last = last.then(() => pictures(mine)).catch(fail);
  }

  for (const input of document.querySelectorAll("input")) {
    input.disabled = Boolean(input.name) && !(input.value in student.about.steps);
    input.addEventListener("input", ask);
  }
  find("another").addEventListener("click", () => {
    find("seed").value = Number(find("seed").value) + canvases.length;
    ask();
  });
  ask();
}

function fail(error) {
  find("status").textContent = `this browser cannot run the student: ${error.message ?? error}`;
  throw error;
}

load().then((student) => {
  window.student = student;
  start(student);
}, fail);
