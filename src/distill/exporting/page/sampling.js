// The student's sampler, and noise that Python draws too: distill.exporting.web.page_noise.
"use strict";

// A hash of 32 bits.
function mixed(x) {
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
  return (x ^ (x >>> 16)) >>> 0;
}

// `count` values of unit noise for this seed, those of the step that is given (from 0).
// Box and Muller's method, in double precision.
function drawNoise(seed, count, step) {
  const key = mixed(seed >>> 0);
  const uniform = (i) => (mixed((key + i) >>> 0) + 0.5) / 2 ** 32;
  const pairs = Math.ceil(count / 2);
  const found = new Float32Array(2 * pairs);
  for (let k = 0; k < pairs; k += 1) {
    const at = 2 * (pairs * step + k);
    const radius = Math.sqrt(-2 * Math.log(uniform(at)));
    const angle = 2 * Math.PI * uniform(at + 1);
    found[2 * k] = radius * Math.cos(angle);
    found[2 * k + 1] = radius * Math.sin(angle);
  }
  return found.subarray(0, count);
}

// x at the next level, from x and x0 at this one: `now` and `later` hold alpha and sigma.
const SAMPLERS = {
  Consistency: (x, x0, now, later, noise) =>
    x.map((_, i) => later.alpha * x0[i] + later.sigma * noise[i]),
  Euler: (x, x0, now, later) =>
    x.map((value, i) => later.alpha * x0[i] + (later.sigma * (value - now.alpha * x0[i])) / now.sigma),
  EulerAncestral: (x, x0, now, later, noise) => {
    const rho = now.sigma / now.alpha;
    const next = later.sigma / later.alpha;
    const up = (next * Math.sqrt(rho ** 2 - next ** 2)) / rho;
    const down = Math.sqrt(next ** 2 - up ** 2);
    return x.map((value, i) => {
      const z = x0[i] + ((value / now.alpha - x0[i]) * down) / rho + up * noise[i];
      return later.alpha * z;
    });
  },
};

class Student {
  // about: student.json; sessions: name -> InferenceSession; tokenizers: name -> Tokenizer
  constructor(about, sessions, tokenizers, runtime) {
    Object.assign(this, { about, sessions, tokenizers, runtime });
    this.embedded = { caption: null };
  }

  tensor(values, shape, kind = "float32") {
    return new this.runtime.Tensor(kind, values, shape);
  }

  async embed(caption) {
    if (this.embedded.caption === caption) return this.embedded.tensors;
    const inputs = {};
    for (const [name, tokenizer] of Object.entries(this.tokenizers)) {
      const ids = tokenizer.ids(caption);
      inputs[name] = this.tensor(BigInt64Array.from(ids, BigInt), [1, ids.length], "int64");
    }
    const tensors = await this.sessions.text_encoder.run(inputs);
    this.embedded = { caption, tensors };
    return tensors;
  }

  // Bytes of a picture, [3, height, width].
  async picture(caption, seed, steps) {
    const cond = await this.embed(caption);
    const shape = this.about.latents;
    const count = shape.reduce((a, b) => a * b);
    const levels = this.about.steps[steps];
    let x = drawNoise(seed, count, 0).map((z) => this.about.first_noise_times * z);
    let x0 = x;
    for (let i = 0; i < levels.length; i += 1) {
      const inputs = {
        x_t: this.tensor(x, [1, ...shape]),
        t: this.tensor(Float32Array.of(levels[i].t), [1]),
        ...cond,
      };
      x0 = (await this.sessions.denoiser.run(inputs)).x0.data;
      if (i + 1 < levels.length) {
        const noise = drawNoise(seed, count, i + 1);
        x = SAMPLERS[this.about.sampler](x, x0, levels[i], levels[i + 1], noise);
      }
    }
    const latents = this.tensor(x0, [1, ...shape]);
    const { pixels } = await this.sessions.decoder.run({ latents });
    // Rounds to the nearest, and halves to even, as torch does.
    return Uint8ClampedArray.from(pixels.data, (value) => (value / 2 + 0.5) * 255);
  }
}
