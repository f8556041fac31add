// Click a patch: where it looks, which tokens are like it, in two images, trained beside untrained.
"use strict";

wejepa.ui.page("patch", async (root) => {
  const {make, panel, picture, heat, legend, key, imagesOf, chooser, choice, tick, atNextFrame} = wejepa.ui;
  const {N, WIDTH, GRID} = wejepa, CHOSEN = "#e8590c", OTHER = "#0a84d6", CAP = 0.98;
  const [weights, file] = await Promise.all([wejepa.load("weights"), wejepa.load("images")]);
  const {mean, std, heads} = file.notes, images = imagesOf(file), depth = 3, layerMeans = file.tensors.layer_means.data;
  const encoders = [new wejepa.Encoder(weights.tensors, "teacher_encoder.", heads), new wejepa.Encoder(file.tensors, "untrained_encoder.", heads)];
  const NAMES = ["trained", "untrained"];
  const state = {view: "pairs", layer: String(depth), head: "mean", both: true, centred: false, chosen: N / 2 + 4, sides: [{}, {}]};

  const use = (side) => (image) => {
    const input = wejepa.normalise(image.bytes, mean, std);
    state.sides[side] = {picture: picture(image.bytes), found: encoders.map((encoder) => {
      const layers = [], attentions = [];
      encoder.encode(input, {layers, attentions});
      return {layers, attentions};
    })};
    update();
  };
  const pick = (place) => {
    state.chosen = place;
    update();
  };
  const board = panel("Image A", {act: pick, moved: pick, note: "click a patch", label: "Patches of image A. Arrow keys choose a patch."});
  const other = panel("Image B", {note: "to compare with"});
  const maps = encoders.map((_, e) => ["A", "B"].map((side) => panel(`Map of ${side}`, {note: `${NAMES[e]} encoder`, label: `Map of image ${side}, ${NAMES[e]} encoder`})));
  const line = make("p", {class: "live-line", role: "status"}), meaning = make("p", {class: "live-meaning"});
  const keys = make("div", {class: "live-keys"});
  const MEANINGS = {
    attention: "Each map shows where the chosen patch looks: the weights with which its token takes over what the other tokens of the same image hold. They sum to 1 in each map.",
    similarity: "Each map shows how much every token is like the token of the chosen patch of A: in A itself, and in B.",
    components: "The tokens' 64 numbers are reduced to three, shown as red, green and blue. Patches of one colour have like tokens, within an image and between A and B.",
    pairs: "Each patch of A has a colour of its own, by its place. Each patch of B takes the colour of the patch of A whose token is most like its own. If the same part of both things has the same colour, the encoder has found the correspondence.",
  };

  /** The tokens of a side under an encoder at the layer, less what every image has at the place where that is asked for. */
  function tokensOf(side, e) {
    const layer = (state.layer === "rollout" ? depth : Number(state.layer)) - 1, tokens = state.sides[side].found[e].layers[layer];
    if (!state.centred) return tokens;
    const at = (e * depth + layer) * N * WIDTH;
    return tokens.map((v, i) => v - layerMeans[at + i]);
  }

  function attentionOf(side, e) {
    const {attentions} = state.sides[side].found[e], out = new Float32Array(N);
    if (state.layer === "rollout") return wejepa.rollout(attentions, N, heads).slice(state.chosen * N, (state.chosen + 1) * N);
    const weights = attentions[Number(state.layer) - 1], which = state.head === "mean" ? [...Array(heads).keys()] : [Number(state.head) - 1];
    for (const h of which) for (let j = 0; j < N; j++) out[j] += weights[(h * N + state.chosen) * N + j] / which.length;
    return out;
  }

  const similar = (tokens, others) => Float32Array.from({length: N}, (_, j) => wejepa.cosine(tokens, state.chosen, others, j));
  const largest = (values) => values.indexOf(Math.max(...values));
  const hue = (place) => `hsl(${(place % GRID) * 40} ${40 + 7 * Math.floor(place / GRID)}% ${30 + 6 * Math.floor(place / GRID)}%)`;

  function compute() {
    const began = performance.now(), {view, chosen} = state, shownEncoders = state.both ? [0, 1] : [0];
    const values = shownEncoders.map((e) => [0, 1].map((side) => (view === "attention" ? attentionOf(side, e) : similar(tokensOf(0, e), tokensOf(side, e)))));
    // Few patches get far more attention than all others: on a scale up to the largest, the other maps would be dark all over.
    const sorted = view === "attention" ? values.flat().flatMap((v) => [...v]).sort((a, b) => a - b) : [1];
    const most = sorted[Math.floor(CAP * (sorted.length - 1))];
    const matches = shownEncoders.map((_, k) => largest(values[k][1]));
    for (const e of [0, 1]) for (const side of [0, 1]) maps[e][side].element.hidden = !shownEncoders.includes(e);
    board.draw((paint) => {
      paint.image(state.sides[0].picture);
      paint.frame(chosen, CHOSEN);
    });
    other.draw((paint) => {
      paint.image(state.sides[1].picture);
      if (view === "attention") paint.frame(chosen, CHOSEN);
      else if (view !== "components") matches.forEach((place, k) => paint.frame(place, k ? OTHER : CHOSEN));
    });
    const near = [0, 0]; // patches of B whose match in A is at the same place, or next to it
    shownEncoders.forEach((e, k) => {
      const both = new Float32Array(2 * N * WIDTH);
      [0, 1].forEach((side) => both.set(tokensOf(side, e), side * N * WIDTH));
      const colours = view === "components" ? wejepa.colours(both) : null;
      [0, 1].forEach((side) => maps[e][side].draw((paint) => {
        for (let p = 0; p < N; p++) {
          if (colours) paint.fill(p, `rgb(${[0, 1, 2].map((c) => Math.round(255 * colours[(side * N + p) * 3 + c])).join()})`);
          else if (view === "pairs") {
            let from = p;
            if (side) {
              let best = -2;
              for (let a = 0; a < N; a++) {
                const c = wejepa.cosine(both, a, both, N + p);
                if (c > best) [best, from] = [c, a];
              }
              near[e] += Math.max(Math.abs((from % GRID) - (p % GRID)), Math.abs(Math.floor(from / GRID) - Math.floor(p / GRID))) <= 1;
            }
            paint.fill(p, hue(from));
          } else paint.fill(p, heat(view === "attention" ? values[k][side][p] / most : (values[k][side][p] + 1) / 2));
        }
        paint.frame(side && view !== "attention" && view !== "components" ? matches[k] : chosen, CHOSEN);
      }));
    });
    const where = `Row ${Math.floor(chosen / GRID) + 1}, column ${(chosen % GRID) + 1}`;
    const best = values[0][0].indexOf(Math.max(...values[0][0]));
    line.textContent = view === "attention"
      ? `${where} of A looks most at row ${Math.floor(best / GRID) + 1}, column ${(best % GRID) + 1} (trained). All maps share one scale.`
      : view === "pairs" ? `For ${near[0]} of ${N} patches of B, the match in A is at the same place or next to it (trained${state.both ? `; untrained: ${near[1]}` : ""}).`
      : view === "components" ? "Like colours are like tokens, in A and in B. Which colour it is means nothing."
        : `${where} of A is most like row ${Math.floor(matches[0] / GRID) + 1}, column ${(matches[0] % GRID) + 1} of B (trained): ` +
          `cosine similarity ${values[0][1][matches[0]].toFixed(2)}.`;
    meaning.textContent = MEANINGS[view];
    const frames = [[CHOSEN, view === "attention" ? "the chosen patch, and the same place in B" : "the chosen patch of A, and the patch of B that is most like it"]];
    if (state.both && view !== "attention") frames.push([OTHER, "in image B: the patch most like it to the untrained encoder"]);
    keys.replaceChildren(...(view === "components" ? [] : [key(...frames)]), ...(view === "attention" ? [legend("no attention", `${(most * N).toFixed(1)} × an even share or more`, "")]
      : view === "similarity" ? [legend("cosine −1", "1", "")] : []));
    head.element.hidden = view !== "attention" || state.layer === "rollout";
    centred.element.hidden = view === "attention";
    rolled.disabled = view !== "attention";
    root.lastUpdate = performance.now() - began;
  }
  const update = atNextFrame(() => state.sides[0].picture && state.sides[1].picture && compute());
  const set = (name) => (value) => {
    state[name] = value;
    if (name === "view" && value !== "attention" && state.layer === "rollout") layer.select.value = state.layer = String(depth);
    update();
  };
  const view = choice("Show", [["pairs", "correspondences"], ["similarity", "token similarity"], ["components", "principal components"], ["attention", "attention"]], "pairs", set("view"));
  const layer = choice("Layer", [["1", "1"], ["2", "2"], ["3", "3, the last"], ["rollout", "all: rollout"]], "3", set("layer"));
  const head = choice("Head", [["mean", "mean"], ["1", "1"], ["2", "2"]], "mean", set("head"));
  const rolled = layer.select.querySelector('[value="rollout"]');
  const both = tick("Also show the same encoder untrained", true, set("both"));
  const centred = tick("Take away the mean token of each place", false, set("centred"));
  root.replaceChildren(
    make("div", {class: "live-row"}, view.element, layer.element, head.element),
    make("div", {class: "live-row"}, both.element, centred.element),
    make("div", {class: "live-split live-patch"},
      make("div", {class: "live-panels live-pairs"}, board.element, other.element, ...maps.flatMap((row) => row.map((map) => map.element))),
      make("div", {class: "live-words"}, meaning, keys, line),
      make("div", {class: "live-choosers"}, make("h2", {}, "Choose image A"), chooser("Image A", images, 27, use(0)), make("h2", {}, "Choose image B"), chooser("Image B", images, 29, use(1)))));
  use(0)(images[27]);
  use(1)(images[29]);
});
