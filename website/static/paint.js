// Paint the context: what the predictor answers at every patch that the student does not see, as the nearest real patch.
"use strict";

wejepa.ui.page("paint", async (root) => {
  const {make, button, panel, picture, heat, legend, key, imagesOf, chooser, choice, atNextFrame} = wejepa.ui;
  const {N, WIDTH, GRID} = wejepa;
  const compact = root.hasAttribute("data-compact");
  const [weights, file] = await Promise.all([wejepa.load("weights"), wejepa.load("images")]);
  const {mean, std, heads, first} = file.notes, model = wejepa.model(weights.tensors, heads), images = imagesOf(file);
  const usual = file.tensors.target_means.data;

  // Patches that stand for predicted tokens: those of training images, encoded one after the other while the page is idle.
  const bank = file.tensors.bank, stock = [];
  const fillBank = () => {
    const until = performance.now() + 12;
    do {
      const bytes = bank.data.slice(stock.length * 1024, (stock.length + 1) * 1024);
      stock.push(wejepa.targetsOf(model.teacher.encode(wejepa.normalise(bytes, mean, std))));
    } while (performance.now() < until && stock.length < bank.shape[0]);
    if (stock.length < bank.shape[0]) return setTimeout(fillBank, 4);
    update();
    root.setAttribute("data-full", "");
  };

  const state = {seen: new Uint8Array(N), brush: "turn", to: 1};
  const use = (image) => {
    state.first = false;
    state.picture = picture(image.bytes);
    state.input = wejepa.normalise(image.bytes, mean, std);
    state.targets = wejepa.targetsOf(model.teacher.encode(state.input));
    update();
  };

  const act = (place, phase) => {
    state.first = false;
    if (phase === "start") state.to = state.brush === "turn" ? 1 - state.seen[place] : Number(state.brush === "show");
    state.seen[place] = state.to;
    update();
  };
  const whole = panel("Image", {note: "what the teacher sees", label: "The whole image"});
  const student = panel("Context: paint here", {
    act, moved: (place) => (spoken.textContent = describe(place)), painted: true, note: "what the student sees",
    label: "The context: patches that the student sees. Arrow keys move, space shows or hides the patch.",
  });
  const guess = panel("Prediction", {note: "the nearest real patches", label: "The nearest real patch to each prediction"});
  const wrong = panel("Error", {note: "of each prediction", label: "Prediction error at every hidden place"});
  const line = make("p", {class: "live-line"}), spoken = make("p", {class: "live-spoken", role: "status"});
  let errors = new Float32Array(N);

  const describe = (place) => {
    const where = `row ${Math.floor(place / GRID) + 1}, column ${(place % GRID) + 1}: `;
    return where + (state.seen[place] ? "seen" : `hidden, prediction error ${errors[place].toFixed(2)}`);
  };

  /** The picture of a training image; every one of them is made once. */
  const pictures = [];
  const bankPicture = (k) => (pictures[k] ??= picture(bank.data.slice(k * 1024, (k + 1) * 1024)));

  /** The training image whose token at the place is nearest to prediction i; for the first picture it is known before any is encoded. */
  function nearest(predicted, i, place) {
    if (state.first && stock.length < bank.shape[0]) return first.nearest[place];
    let best = null, least = Infinity;
    for (let item = 0; item < stock.length; item++) {
      let distance = 0;
      for (let k = 0; k < WIDTH; k++) distance += (predicted[i * WIDTH + k] - stock[item][place * WIDTH + k]) ** 2;
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
    whole.draw((paint) => paint.image(state.picture));
    student.draw((paint) => {
      paint.image(state.picture);
      asked.forEach(paint.hide);
    });
    guess.draw((paint) => {
      paint.image(state.picture);
      seen.forEach((place) => paint.skip(place, false));
      asked.forEach((place, i) => {
        const item = nearest(predicted, i, place);
        item === null ? paint.hide(place) : paint.patch(bankPicture(item), place, place);
      });
    });
    wrong.draw((paint) => {
      seen.forEach((place) => paint.skip(place));
      asked.forEach((place) => paint.fill(place, heat(errors[place] / 0.6)));
    });
    const n = asked.length;
    line.textContent = n
      ? `The student sees ${seen.length} of ${N} patches. ${n > 1 ? `Mean error of the ${n} predictions` : "Error of the one prediction"}: ` +
        `${(total / n).toFixed(2)}. Guessing the average token of ${n > 1 ? "each" : "its"} place instead: ${(plain / n).toFixed(2)}.`
      : "The student sees everything, so nothing is left to predict. Hide some patches.";
    root.lastUpdate = performance.now() - began;
  }
  const update = atNextFrame(compute);

  let draws = 1;
  const set = (shown) => {
    state.first = false;
    for (let p = 0; p < N; p++) state.seen[p] = shown(p) ? 1 : 0;
    update();
  };
  const sampled = () => {
    const settings = {targetScale: [0.15, 0.2], targetAspect: [0.75, 1.5], contextScale: [0.85, 1], contextAspect: [1, 1], blocks: 4, share: 0.33};
    const {context} = wejepa.masks.sample(1, GRID, settings, wejepa.masks.random(draws++));
    set((p) => context[0].includes(p));
  };
  const buttons = make("div", {class: "live-row"},
    button("As in training", sampled), button("Left half", () => set((p) => p % GRID < GRID / 2)),
    button("Top half", () => set((p) => p < N / 2)), button("Hide all", () => set(() => false)), button("Show all", () => set(() => true)));
  const brush = choice("Brush", [["turn", "shows or hides"], ["show", "shows"], ["hide", "hides"]], "turn", (value) => (state.brush = value));
  if (!compact) buttons.prepend(brush.element);
  const shown = compact ? images.filter((_, i) => i < 30 && i % 3 === 0) : images;
  root.replaceChildren(
    make("div", {class: "live-panels live-four"}, whole.element, student.element, guess.element, wrong.element),
    make("div", {class: "live-row live-keys"}, key(["hidden", "hidden from the student"], ["skipped", "not predicted, because the student sees it"]),
      legend("error 0", "0.6 or more", "")),
    line, spoken, buttons, chooser("Image", shown, shown.indexOf(images[first.image]), use));
  use(images[first.image]);
  set((p) => p % GRID < GRID / 2);
  state.first = true;
  compute();
  setTimeout(fillBank, 50);
});
