// Training, replayed: what the run's checkpoints make of a few images, and what its monitors said.
"use strict";

wejepa.ui.page("replay", async (root) => {
  const {make, panel, picture, heat, legend, slider, choice, button, atNextFrame} = wejepa.ui;
  const {N, WIDTH, GRID} = wejepa;
  const {tensors, notes} = await wejepa.load("replay"), points = notes.epochs.length, count = notes.names.length;
  const images = Array.from({length: count}, (_, i) => picture(tensors.images.data.slice(i * 1024, (i + 1) * 1024)));
  const state = {point: 0, image: 0, chosen: N / 2 + 4};

  const pick = (place) => {
    state.chosen = place;
    update();
  };
  const board = panel("Image", {act: pick, moved: pick, note: "click a patch", label: "Patches of the image. Arrow keys choose a patch."});
  const colours = panel("Tokens", {note: "like tokens, like colours", label: "The image's tokens as colours"});
  const similar = panel("Similarity", {note: "to the chosen token", label: "How much each token is like the chosen one"});
  const wrong = panel("Error", {note: "of predicting each patch", label: "Mean prediction error of each patch"});
  const line = make("p", {class: "live-line", role: "status"});

  // A monitor is a line over the epochs; a bar stands at the chosen one.
  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, text = "") => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };
  const MONITORS = [ // the loss of epoch 1 is far above all others, which it would press into a flat line
    ["loss", "Loss", 2, "How far the predictions are from the teacher's tokens. It may rise while the model learns, because the tokens change: while they say more, they are harder to predict."],
    ["teacher_variance", "Teacher variance", 2, "How much the teacher's tokens differ between images at one place. At 0 all images get the same tokens, and nothing is learnt: the run has collapsed."],
    ["rankme", "RankMe", 0, "How many of the 64 dimensions the tokens really use. When it stays small, few things can be told apart."],
    ["knn", "k-NN accuracy", 2, "How often an image's nearest neighbours, by its tokens, are of the same class. It needs labels, which training itself never sees."],
  ];
  const monitors = MONITORS.map(([name, title, digits, meaning]) => {
    const values = notes[name], low = Math.min(...values), high = Math.max(...(name === "loss" ? values.slice(1) : values)), last = values.length;
    const x = (epoch) => 34 + (epoch / last) * 214, y = (v) => 146 - ((v - low) / (high - low)) * 132;
    const svg = draw("svg", {viewBox: "0 0 256 164", role: "img", "aria-label": `${title} over ${last} epochs, from ${values[0].toFixed(digits)} to ${values[last - 1].toFixed(digits)}`, class: "live-chart"});
    const bar = draw("line", {y1: 8, y2: 150, class: "live-bar"}), dot = draw("circle", {r: 4, class: "live-dot"});
    svg.append(
      draw("line", {x1: 34, x2: 248, y1: 150, y2: 150, class: "live-axis"}), draw("text", {x: 30, y: 18, "text-anchor": "end"}, high.toFixed(digits)),
      draw("text", {x: 30, y: 150, "text-anchor": "end"}, low.toFixed(digits)), draw("text", {x: 34, y: 162}, "0"),
      draw("text", {x: 248, y: 162, "text-anchor": "end"}, `${last} epochs`),
      draw("polyline", {points: values.map((v, i) => `${x(i + 1)},${y(v)}`).join(" "), class: "live-curve"}), bar, dot);
    const value = make("span");
    return {element: make("figure", {class: "live-panel"}, make("figcaption", {}, make("b", {}, `${title}: `, value)), svg, make("p", {class: "live-note"}, meaning)), at: (epoch) => {
      bar.setAttribute("x1", x(epoch));
      bar.setAttribute("x2", x(epoch));
      dot.setAttribute("cx", x(Math.max(1, epoch)));
      dot.setAttribute("cy", Math.max(8, y(values[Math.max(1, epoch) - 1])));
      dot.setAttribute("visibility", epoch ? "visible" : "hidden");
      value.textContent = epoch ? values[epoch - 1].toFixed(digits) : "from epoch 1 on";
    }};
  });

  const update = atNextFrame(() => {
    const {point, image, chosen} = state, at = (point * count + image) * N;
    const tokens = tensors.tokens.data.subarray(at * WIDTH, (at + N) * WIDTH), epoch = notes.epochs[point];
    board.draw((paint) => {
      paint.image(images[image]);
      paint.frame(chosen, "#e8590c");
    });
    colours.draw((paint) => {
      for (let p = 0; p < N; p++) paint.fill(p, `rgb(${[0, 1, 2].map((c) => tensors.colours.data[(at + p) * 3 + c]).join()})`);
    });
    similar.draw((paint) => {
      for (let p = 0; p < N; p++) paint.fill(p, heat((wejepa.cosine(tokens, chosen, tokens, p) + 1) / 2));
      paint.frame(chosen, "#e8590c");
    });
    let total = 0;
    wrong.draw((paint) => {
      for (let p = 0; p < N; p++) {
        total += tensors.errors.data[at + p];
        paint.fill(p, heat(tensors.errors.data[at + p] / 0.6));
      }
    });
    monitors.forEach((monitor) => monitor.at(epoch));
    line.textContent = `${epoch ? `After ${epoch} epochs` : "Before training"}: mean prediction error ${(total / N).toFixed(2)} on this image.`;
    epochs.output.textContent = String(epoch);
    epochs.input.setAttribute("aria-valuetext", `epoch ${epoch}`);
  });
  const epochs = slider("Epoch", {min: 0, max: points - 1, step: 1, value: 0}, (value) => {
    state.point = value;
    update();
  });
  let timer = null;
  const play = button("Play", () => {
    if (timer) {
      clearInterval(timer);
      timer = null;
    } else {
      if (state.point === points - 1) state.point = -1;
      timer = setInterval(() => {
        epochs.input.value = ++state.point;
        if (state.point === points - 1) play.click();
        update();
      }, 700);
    }
    play.textContent = timer ? "Stop" : "Play";
  });
  const which = choice("Image", notes.names.map((name, i) => [String(i), name]), "0", (value) => {
    state.image = Number(value);
    update();
  });
  root.replaceChildren(
    make("div", {class: "live-row"}, epochs.element, play, which.element), line,
    make("div", {class: "live-panels live-four"}, board.element, colours.element, similar.element, wrong.element),
    make("div", {class: "live-row live-keys"}, legend("similarity −1", "1", ""), legend("error 0", "0.6 or more", "")),
    make("h2", {}, "What the monitors said"), make("p", {class: "live-note"}, "Each axis goes from the smallest value of the run to the largest, not from 0. " +
      `Only the loss of epoch 1, ${notes.loss[0].toFixed(2)}, lies above its axis.`),
    make("div", {class: "live-panels live-monitors"}, ...monitors.map((m) => m.element)));
  update();
});
