// I-JEPA's forward pass in plain JavaScript: what wejepa/model.py computes, on the weights that ship. No page code here.
"use strict";

const wejepa = (() => {
  const here = document.currentScript ? document.currentScript.src.replace(/[^/]*$/, "") : "";
  const waiting = {};

  // ---------------------------------------------------------------- files

  /** The bytes of a data file. A page that was opened from a folder may not read files, so there the bytes come as a script. */
  async function bytesOf(name) {
    if (location.protocol !== "file:") {
      const response = await fetch(`${here}${name}.safetensors`);
      if (!response.ok) throw new Error(`${name}.safetensors: ${response.status}`);
      return response.arrayBuffer();
    }
    return new Promise((resolve, reject) => {
      waiting[name] = resolve;
      const script = document.createElement("script");
      script.src = `${here}${name}.data.js`;
      script.onerror = () => reject(new Error(`${name}.data.js cannot be read`));
      document.head.append(script);
    });
  }

  /** Called by a data file that came as a script. */
  function arrived(name, text) {
    waiting[name](Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  }

  function fromHalf(bits) {
    const out = new Float32Array(bits.length);
    for (let i = 0; i < bits.length; i++) {
      const h = bits[i], exponent = (h >> 10) & 31, fraction = h & 1023;
      const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
      out[i] = h & 32768 ? -size : size;
    }
    return out;
  }

  /** The tensors of a safetensors file: {name: {data, shape}}, and its notes. */
  function parse(buffer) {
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
    const tensors = {};
    for (const [name, entry] of Object.entries(header)) {
      if (name === "__metadata__") continue;
      const part = buffer.slice(8 + length + entry.data_offsets[0], 8 + length + entry.data_offsets[1]);
      const kinds = {F16: () => fromHalf(new Uint16Array(part)), F32: () => new Float32Array(part), U8: () => new Uint8Array(part), I8: () => new Int8Array(part)};
      tensors[name] = {data: kinds[entry.dtype](), shape: entry.shape};
    }
    return {tensors, notes: JSON.parse(header.__metadata__?.notes ?? "{}")};
  }

  const load = async (name) => parse(await bytesOf(name));

  // ---------------------------------------------------------------- layers; tokens are (n, width), rows one after the other

  /** x (n, inner) times the transposed weight (outer, inner), plus the bias. Four rows at a time, so that a weight is read once for them. */
  function linear(x, n, weight, bias) {
    const outer = bias.length, inner = weight.length / outer, y = new Float32Array(n * outer);
    let i = 0;
    for (; i + 3 < n; i += 4) {
      const a = i * inner, b = a + inner, c = b + inner, d = c + inner;
      for (let o = 0, w = 0; o < outer; o++, w += inner) {
        let p = bias[o], q = p, r = p, s = p;
        for (let k = 0; k < inner; k++) {
          const v = weight[w + k];
          p += x[a + k] * v;
          q += x[b + k] * v;
          r += x[c + k] * v;
          s += x[d + k] * v;
        }
        const at = i * outer + o;
        y[at] = p;
        y[at + outer] = q;
        y[at + 2 * outer] = r;
        y[at + 3 * outer] = s;
      }
    }
    for (; i < n; i++) {
      for (let o = 0, w = 0; o < outer; o++, w += inner) {
        let p = bias[o];
        for (let k = 0; k < inner; k++) p += x[i * inner + k] * weight[w + k];
        y[i * outer + o] = p;
      }
    }
    return y;
  }

  /** Each row with mean 0 and variance 1, then scaled and shifted; without weights it is the targets' layer norm. */
  function layerNorm(x, n, weight, bias, eps = 1e-6) {
    const width = x.length / n, y = new Float32Array(x.length);
    for (let i = 0; i < n; i++) {
      let mean = 0, variance = 0;
      for (let k = 0; k < width; k++) mean += x[i * width + k];
      mean /= width;
      for (let k = 0; k < width; k++) variance += (x[i * width + k] - mean) ** 2;
      const scale = 1 / Math.sqrt(variance / width + eps);
      for (let k = 0; k < width; k++) {
        const v = (x[i * width + k] - mean) * scale;
        y[i * width + k] = weight ? v * weight[k] + bias[k] : v;
      }
    }
    return y;
  }

  /** The error function to seven digits (Abramowitz and Stegun, 7.1.26). */
  function erf(x) {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * Math.exp(-x * x);
    return x < 0 ? tail - 1 : 1 - tail;
  }

  function gelu(x) {
    for (let i = 0; i < x.length; i++) x[i] *= 0.5 * (1 + erf(x[i] * Math.SQRT1_2));
    return x;
  }

  /** Self-attention over n tokens; the first `skip` are attended to, but get no answer. Weights (heads, n - skip, n) go to `record`. */
  function attention(x, n, layer, heads, skip, record) {
    const width = x.length / n, d = width / heads, rows = n - skip, scale = 1 / Math.sqrt(d);
    const qkv = linear(x, n, layer.qkvWeight, layer.qkvBias), stride = 3 * width;
    const out = new Float32Array(rows * width), weights = new Float32Array(heads * rows * n);
    for (let h = 0; h < heads; h++) {
      for (let i = 0; i < rows; i++) {
        const q = (i + skip) * stride + h * d, at = (h * rows + i) * n;
        let largest = -Infinity, total = 0;
        for (let j = 0; j < n; j++) {
          const k = j * stride + width + h * d;
          let dot = 0;
          for (let c = 0; c < d; c++) dot += qkv[q + c] * qkv[k + c];
          weights[at + j] = dot * scale;
          if (weights[at + j] > largest) largest = weights[at + j];
        }
        for (let j = 0; j < n; j++) total += weights[at + j] = Math.exp(weights[at + j] - largest);
        const to = i * width + h * d;
        for (let j = 0; j < n; j++) {
          const share = (weights[at + j] /= total), v = j * stride + 2 * width + h * d;
          for (let c = 0; c < d; c++) out[to + c] += share * qkv[v + c];
        }
      }
    }
    record?.push(weights);
    return linear(out, rows, layer.projWeight, layer.projBias);
  }

  function block(x, n, layer, heads, skip = 0, record = null) {
    const width = x.length / n, rows = n - skip, y = x.slice(skip * width);
    const mixed = attention(layerNorm(x, n, layer.norm1Weight, layer.norm1Bias), n, layer, heads, skip, record);
    for (let i = 0; i < y.length; i++) y[i] += mixed[i];
    const hidden = gelu(linear(layerNorm(y, rows, layer.norm2Weight, layer.norm2Bias), rows, layer.mlp0Weight, layer.mlp0Bias));
    const added = linear(hidden, rows, layer.mlp2Weight, layer.mlp2Bias);
    for (let i = 0; i < y.length; i++) y[i] += added[i];
    return y;
  }

  /** A transformer's blocks by their names in the file. */
  function blocksOf(tensors, prefix) {
    const blocks = [];
    for (let i = 0; tensors[`${prefix}blocks.${i}.norm1.weight`]; i++) {
      const get = (name) => tensors[`${prefix}blocks.${i}.${name}`].data;
      blocks.push({
        norm1Weight: get("norm1.weight"), norm1Bias: get("norm1.bias"), norm2Weight: get("norm2.weight"), norm2Bias: get("norm2.bias"),
        qkvWeight: get("attn.qkv.weight"), qkvBias: get("attn.qkv.bias"), projWeight: get("attn.proj.weight"), projBias: get("attn.proj.bias"),
        mlp0Weight: get("mlp.0.weight"), mlp0Bias: get("mlp.0.bias"), mlp2Weight: get("mlp.2.weight"), mlp2Bias: get("mlp.2.bias"),
      });
    }
    return blocks;
  }

  // ---------------------------------------------------------------- the networks

  const SIZE = 32, PATCH = 4, GRID = SIZE / PATCH, N = GRID * GRID, WIDTH = 64;

  class Encoder {
    constructor(tensors, prefix, heads) {
      const get = (name) => tensors[prefix + name].data;
      this.heads = heads;
      this.positions = get("pos_embed");
      this.patchWeight = get("patch_embed.proj.weight");
      this.patchBias = get("patch_embed.proj.bias");
      this.normWeight = get("norm.weight");
      this.normBias = get("norm.bias");
      this.blocks = blocksOf(tensors, prefix);
    }

    /**
     * Tokens of an image (3, 32, 32), or of the patches `keep` alone: (n, 64).
     * `layers` and `attentions`, where given, get what each block leaves and the weights (heads, n, n) it used.
     */
    encode(image, {keep = null, layers = null, attentions = null} = {}) {
      const places = keep ?? [...Array(N).keys()], n = places.length;
      if (!n) return new Float32Array(0);
      const patches = new Float32Array(n * 3 * PATCH * PATCH);
      places.forEach((place, i) => {
        const top = Math.floor(place / GRID) * PATCH, left = (place % GRID) * PATCH;
        for (let c = 0, at = i * 48; c < 3; c++)
          for (let y = 0; y < PATCH; y++)
            for (let x = 0; x < PATCH; x++) patches[at++] = image[(c * SIZE + top + y) * SIZE + left + x];
      });
      let tokens = linear(patches, n, this.patchWeight, this.patchBias);
      places.forEach((place, i) => {
        for (let k = 0; k < WIDTH; k++) tokens[i * WIDTH + k] += this.positions[place * WIDTH + k];
      });
      for (const layer of this.blocks) {
        tokens = block(tokens, n, layer, this.heads, 0, attentions);
        layers?.push(tokens);
      }
      tokens = layerNorm(tokens, n, this.normWeight, this.normBias);
      if (layers) layers[layers.length - 1] = tokens;
      return tokens;
    }
  }

  class Predictor {
    constructor(tensors, heads) {
      const get = (name) => tensors[`predictor.${name}`].data;
      this.heads = heads;
      this.positions = get("pos_embed");
      this.maskToken = get("mask_token");
      this.embedWeight = get("embed.weight");
      this.embedBias = get("embed.bias");
      this.normWeight = get("norm.weight");
      this.normBias = get("norm.bias");
      this.projWeight = get("proj.weight");
      this.projBias = get("proj.bias");
      this.blocks = blocksOf(tensors, "predictor.");
    }

    /** Predicted tokens (asked, 64) from the student's tokens of the places `seen`. */
    predict(context, seen, asked) {
      const n = seen.length + asked.length, width = this.maskToken.length;
      if (!asked.length) return new Float32Array(0);
      let x = new Float32Array(n * width);
      if (seen.length) x.set(linear(context, seen.length, this.embedWeight, this.embedBias));
      for (let i = 0; i < asked.length; i++) x.set(this.maskToken, (seen.length + i) * width);
      [...seen, ...asked].forEach((place, i) => {
        for (let k = 0; k < width; k++) x[i * width + k] += this.positions[place * width + k];
      });
      this.blocks.forEach((layer, i) => {
        const skip = i === this.blocks.length - 1 ? seen.length : 0; // nobody asks what becomes of the context's tokens
        x = block(x, n, layer, this.heads, skip);
      });
      return linear(layerNorm(x, asked.length, this.normWeight, this.normBias), asked.length, this.projWeight, this.projBias);
    }
  }

  /** Student, teacher and predictor of the weights file. */
  function model(tensors, heads) {
    return {
      student: new Encoder(tensors, "student_encoder.", heads),
      teacher: new Encoder(tensors, "teacher_encoder.", heads),
      predictor: new Predictor(tensors, heads),
    };
  }

  // ---------------------------------------------------------------- measures

  /** What the predictor is asked for: layer-normalised teacher tokens. */
  const targetsOf = (tokens) => layerNorm(tokens, tokens.length / WIDTH, null, null, 1e-5);

  /** Smooth-L1 between row i of a and row j of b: the training loss of one patch. */
  function smoothL1(a, i, b, j) {
    let total = 0;
    for (let k = 0; k < WIDTH; k++) {
      const e = Math.abs(a[i * WIDTH + k] - b[j * WIDTH + k]);
      total += e < 1 ? 0.5 * e * e : e - 0.5;
    }
    return total / WIDTH;
  }

  /** Cosine similarity of row i of a and row j of b. */
  function cosine(a, i, b, j, width = WIDTH) {
    let ab = 0, aa = 0, bb = 0;
    for (let k = 0; k < width; k++) {
      const u = a[i * width + k], v = b[j * width + k];
      ab += u * v;
      aa += u * u;
      bb += v * v;
    }
    return ab / Math.max(Math.sqrt(aa * bb), 1e-12);
  }

  /** Abnar and Zuidema's rollout over layers of weights (heads, n, n): (n, n). */
  function rollout(attentions, n, heads) {
    let total = null;
    for (const weights of attentions) {
      const step = new Float32Array(n * n);
      for (let h = 0; h < heads; h++) for (let i = 0; i < n * n; i++) step[i] += (0.5 * weights[h * n * n + i]) / heads;
      for (let i = 0; i < n; i++) step[i * n + i] += 0.5;
      if (total) {
        const product = new Float32Array(n * n);
        for (let i = 0; i < n; i++)
          for (let k = 0; k < n; k++) for (let j = 0, s = step[i * n + k]; j < n; j++) product[i * n + j] += s * total[k * n + j];
        total = product;
      } else total = step;
    }
    return total;
  }

  /** Tokens of several images as colours from 0 to 1, (n, 3): their first three principal components over all of them. */
  function colours(tokens) {
    const n = tokens.length / WIDTH, centred = Float64Array.from(tokens), covariance = new Float64Array(WIDTH * WIDTH);
    for (let k = 0; k < WIDTH; k++) {
      let mean = 0;
      for (let i = 0; i < n; i++) mean += tokens[i * WIDTH + k] / n;
      for (let i = 0; i < n; i++) centred[i * WIDTH + k] -= mean;
    }
    for (let i = 0; i < n; i++)
      for (let a = 0; a < WIDTH; a++) for (let b = 0, v = centred[i * WIDTH + a]; b < WIDTH; b++) covariance[a * WIDTH + b] += v * centred[i * WIDTH + b];
    const out = new Float32Array(n * 3);
    for (let part = 0; part < 3; part++) {
      // The power method: multiply, normalise, repeat; then take the direction out and go on with the next.
      let direction = Float64Array.from({length: WIDTH}, (_, k) => Math.sin(1 + k * (part + 1))), size = 0;
      for (let round = 0; round < 200; round++) {
        const next = new Float64Array(WIDTH);
        for (let a = 0; a < WIDTH; a++) for (let b = 0; b < WIDTH; b++) next[a] += covariance[a * WIDTH + b] * direction[b];
        size = Math.hypot(...next) || 1;
        let moved = 0;
        for (let a = 0; a < WIDTH; a++) {
          next[a] /= size;
          moved += Math.abs(next[a] - direction[a]);
        }
        direction = next;
        if (moved < 1e-9) break;
      }
      for (let a = 0; a < WIDTH; a++) for (let b = 0; b < WIDTH; b++) covariance[a * WIDTH + b] -= size * direction[a] * direction[b];
      const values = new Float64Array(n);
      for (let i = 0; i < n; i++) for (let k = 0; k < WIDTH; k++) values[i] += centred[i * WIDTH + k] * direction[k];
      const sign = Math.max(...values) >= -Math.min(...values) ? 1 : -1; // so that a picture repeats
      const sorted = values.map((v) => sign * v).sort();
      const low = sorted[Math.floor(0.02 * (n - 1))], high = sorted[Math.ceil(0.98 * (n - 1))]; // outliers would grey the rest
      for (let i = 0; i < n; i++) out[i * 3 + part] = Math.min(1, Math.max(0, (sign * values[i] - low) / Math.max(high - low, 1e-9)));
    }
    return out;
  }

  // ---------------------------------------------------------------- images

  /** Bytes of a grey (1024) or colour (3072) image as the encoder takes them: (3, 32, 32). */
  function normalise(bytes, mean, std) {
    const plane = SIZE * SIZE, out = new Float32Array(3 * plane);
    for (let i = 0; i < out.length; i++) out[i] = (bytes[bytes.length === plane ? i % plane : i] / 255 - mean) / std;
    return out;
  }

  /** RGBA pixels (height, width, 4) to bytes (3, 32, 32): the centre square, each result the mean under a triangle, as in wejepa.data.crops. */
  function resample(pixels, width, height) {
    const side = Math.min(width, height), step = side / SIZE, support = Math.max(1, step);
    const weightsAlong = (length) =>
      Array.from({length: SIZE}, (_, i) => {
        const centre = (length - side) / 2 + (i + 0.5) * step, first = Math.max(0, Math.floor(centre - support));
        const weights = [];
        for (let k = first; k < Math.min(length, centre + support); k++) weights.push(Math.max(0, 1 - Math.abs(k + 0.5 - centre) / support));
        const total = weights.reduce((a, b) => a + b, 0);
        return {first, weights: weights.map((w) => w / total)};
      });
    const across = weightsAlong(width), down = weightsAlong(height), out = new Uint8ClampedArray(3 * SIZE * SIZE);
    const narrowed = new Float32Array(height * SIZE * 3);
    for (let y = 0; y < height; y++)
      across.forEach(({first, weights}, x) => {
        weights.forEach((w, k) => {
          const at = (y * width + first + k) * 4, opacity = pixels[at + 3] / 255; // transparent parts are on white
          for (let c = 0; c < 3; c++) narrowed[(y * SIZE + x) * 3 + c] += w * (255 + (pixels[at + c] - 255) * opacity);
        });
      });
    down.forEach(({first, weights}, y) => {
      for (let x = 0; x < SIZE; x++)
        for (let c = 0; c < 3; c++) {
          let total = 0;
          weights.forEach((w, k) => (total += w * narrowed[((first + k) * SIZE + x) * 3 + c]));
          out[(c * SIZE + y) * SIZE + x] = total;
        }
    });
    return Uint8Array.from(out);
  }

  return {
    load, arrived, model, Encoder, Predictor, targetsOf, smoothL1, cosine, rollout, colours, normalise, resample, layerNorm,
    SIZE, PATCH, GRID, N, WIDTH,
  };
})();
