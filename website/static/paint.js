// Paint the context: what the predictor expects at every patch that the student does not see.
"use strict";

wejepa.ui.page("paint", async (root) => {
  const {make, button, panel, picture, heat, legend, imagesOf, chooser, choice, atNextFrame} = wejepa.ui;
  const {N, WIDTH, GRID} = wejepa;
  const compact = root.hasAttribute("data-compact");
  const [weights, file] = await Promise.all([wejepa.load("weights"), wejepa.load("images")]);
  const {mean, std, heads} = file.notes, model = wejepa.model(weights.tensors, heads), images = imagesOf(file);
  const usual = file.tensors.target_means.data;

  // Patches that stand for predicted tokens: those of training images, encoded one after the other while the page is idle.
  const bank = file.tensors.bank, stock = [];
  const fillBank = () => {
    const until = performance.now() + 12;
    do {
      const bytes = bank.data.slice(stock.length * 1024, (stock.length + 1) * 1024);
      stock.push({picture: picture(bytes), tokens: wejepa.targetsOf(model.teacher.encode(wejepa.normalise(bytes, mean, std)))});
    } while (performance.now() < until && stock.length < bank.shape[0]);
    update();
    if (stock.length < bank.shape[0]) setTimeout(fillBank, 4);
    else root.setAttribute("data-full", "");
  };

  const state = {seen: new Uint8Array(N), brush: "turn", to: 1};
  const use = (image) => {
    state.picture = picture(image.bytes);
    state.input = wejepa.normalise(image.bytes, mean, std);
    state.targets = wejepa.targetsOf(model.teacher.encode(state.input));
    update();
  };

  const act = (place, phase) => {
    if (phase === "start") state.to = state.brush === "turn" ? 1 - state.seen[place] : Number(state.brush === "show");
    state.seen[place] = state.to;
    update();
  };
  const student = panel("What the student sees", {
    act, moved: (place) => (spoken.textContent = describe(place)),
    label: "Patches of the image. Arrow keys move, space shows or hides the patch.",
  });
  const guess = panel("What the predictor expects", {label: "The image with the nearest real patch at every hidden place"});
  const wrong = panel("How far off it is", {label: "Prediction error at every hidden place"});
  const line = make("p", {class: "live-line"}), spoken = make("p", {class: "live-spoken", role: "status"});
  let errors = new Float32Array(N);

  const describe = (place) => {
    const where = `row ${Math.floor(place / GRID) + 1}, column ${(place % GRID) + 1}: `;
    return where + (state.seen[place] ? "seen" : `hidden, prediction error ${errors[place].toFixed(2)}`);
  };

  function nearest(predicted, i, place) {
    let best = null, least = Infinity;
    for (const item of stock) {
      let distance = 0;
      for (let k = 0; k < WIDTH; k++) distance += (predicted[i * WIDTH + k] - item.tokens[place * WIDTH + k]) ** 2;
      if (distance < least) [least, best] = [distance, item];
    }
    return best;
  }

  function compute() {
    const began = performance.now();
    const places = [...Array(N).keys()], seen = places.filter((p) => state.seen[p]), asked = places.filter((p) => !state.seen[p]);
    const predicted = model.predictor.predict(model.student.encode(state.input, {keep: seen}), seen, asked);
    errors = new Float32Array(N);
    let total = 0, plain = 0;
    asked.forEach((place, i) => {
      total += errors[place] = wejepa.smoothL1(predicted, i, state.targets, place);
      plain += wejepa.smoothL1(usual, place, state.targets, place);
    });
    student.draw((paint) => {
      paint.image(state.picture);
      asked.forEach(paint.hide);
    });
    guess.draw((paint) => {
      paint.image(state.picture);
      asked.forEach((place, i) => {
        const item = nearest(predicted, i, place);
        item ? paint.patch(item.picture, place, place) : paint.hide(place);
      });
    });
    wrong.draw((paint) => {
      places.forEach((place) => (state.seen[place] ? paint.patch(state.picture, place, place) : paint.fill(place, heat(errors[place] / 0.6))));
    });
    const n = asked.length;
    line.textContent = n
      ? `${seen.length} of ${N} patches are seen. Mean error of the ${n} predictions: ${(total / n).toFixed(2)}. ` +
        `Always guessing the mean token of the place: ${(plain / n).toFixed(2)}.`
      : "Everything is seen, so nothing is left to predict. Hide some patches.";
    root.lastUpdate = performance.now() - began;
  }
  const update = atNextFrame(compute);

  let draws = 1;
  const set = (shown) => {
    for (let p = 0; p < N; p++) state.seen[p] = shown(p) ? 1 : 0;
    update();
  };
  const sampled = () => {
    const settings = {targetScale: [0.15, 0.2], targetAspect: [0.75, 1.5], contextScale: [0.85, 1], contextAspect: [1, 1], blocks: 4, share: 0.33};
    const {context} = wejepa.masks.sample(1, GRID, settings, wejepa.masks.random(draws++));
    set((p) => context[0].includes(p));
  };
  const buttons = make("div", {class: "live-row"},
    button("A mask as in training", sampled), button("Left half", () => set((p) => p % GRID < GRID / 2)),
    button("Top half", () => set((p) => p < N / 2)), button("Hide all", () => set(() => false)), button("Show all", () => set(() => true)));
  const brush = choice("Brush", [["turn", "show or hide"], ["show", "show"], ["hide", "hide"]], "turn", (value) => (state.brush = value));
  if (!compact) buttons.prepend(brush.element);
  root.replaceChildren(
    make("div", {class: "live-panels"}, student.element, guess.element, wrong.element), line, spoken, legend("0", "0.6 or more", "smooth-L1 to the teacher's token"),
    buttons, chooser("Image", compact ? images.slice(0, 30).filter((_, i) => i % 3 === 0) : images, compact ? 7 : 21, use));
  set((p) => p % GRID < GRID / 2);
  use(compact ? images[21] : images[21]);
  compute();
  setTimeout(fillBank, 50);
});
