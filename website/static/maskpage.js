// The mask sampler with its settings; coverage is counted while one looks.
"use strict";

wejepa.ui.page("masks", async (root) => {
  const {make, slider, tick, button, picture, heat, legend, key, imagesOf, atNextFrame, panel} = wejepa.ui;
  const {random, sample} = wejepa.masks, {GRID, N} = wejepa;
  const image = picture(imagesOf(await wejepa.load("images"))[7 * 3].bytes);
  const settings = {targetScale: [0.15, 0.2], targetAspect: [0.75, 1.5], contextScale: [0.85, 1], contextAspect: [1, 1], blocks: 4, share: 0.33};
  const bugs = {exclusive: false, cut: false, tied: false};
  const COLOURS = ["#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#999999", "#6a3d9a"], ENOUGH = 20000;
  let batch = 64, seed = 1, count, counting, sizes, least, most;

  const draws = [1, 2, 3].map((k) => panel(`Draw ${k}`, {label: `Masks of draw ${k}: hidden patches are tinted, frames are target blocks`}));
  const target = panel("Targets", {note: "how often each patch is predicted", label: "How often each patch is in a target block"});
  const context = panel("Context", {note: "how often the student sees it", label: "How often the student sees each patch"});
  const line = make("p", {class: "live-line"}), counted = make("p", {class: "live-line"}), trouble = make("p", {class: "live-trouble", role: "status"});
  const asked = new Float64Array(N), shown = new Float64Array(N);

  function drawn() {
    const masks = sample(batch, GRID, settings, random(seed), bugs);
    draws.forEach(({draw}, k) => draw((paint) => {
      paint.image(image);
      const seen = new Set(masks.context[k]);
      for (let p = 0; p < N; p++) if (!seen.has(p)) paint.hide(p);
      masks.targets[k].forEach((block, m) => paint.box(block[0], ...masks.block, COLOURS[m % COLOURS.length], 4 + 3 * m));
    }));
    line.textContent = `The student sees ${masks.context[0].length} of ${N} patches. The predictor is asked for ${settings.blocks} ` +
      `block${settings.blocks > 1 ? "s" : ""} of ${masks.block[0]} × ${masks.block[1]} patches.`;
    asked.fill(0);
    shown.fill(0);
    count = 0;
    sizes = most = 0;
    least = N;
    counting ??= setTimeout(more, 0);
  }

  /** Some more batches, for ten milliseconds at a time, until there are enough. */
  const rand = random(99);
  function more() {
    const until = performance.now() + 10;
    while (performance.now() < until && count < ENOUGH) {
      const masks = sample(batch, GRID, settings, rand, bugs);
      for (let b = 0; b < batch; b++) {
        new Set(masks.targets[b].flat()).forEach((p) => asked[p]++);
        masks.context[b].forEach((p) => shown[p]++);
      }
      const size = masks.context[0].length;
      sizes += batch * size;
      [least, most] = [Math.min(least, size), Math.max(most, size)];
      count += batch;
    }
    const upper = shown.slice(0, N / 2).reduce((a, b) => a + b, 0) / shown.reduce((a, b) => a + b, 0);
    const never = asked.filter((v) => !v).length;
    for (const [map, values] of [[target, asked], [context, shown]])
      map.draw((paint) => values.forEach((v, p) => paint.fill(p, heat(v / count / 0.8))));
    counted.textContent = `Counted over ${count.toLocaleString("en")} images: ${(sizes / count).toFixed(1)} patches of context on average, ` +
      `${Math.round(100 * upper)} % of them in the upper half; ${never ? `${never} patches are never a target` : "every patch is a target at some time"}. ` +
      (bugs.cut ? `All ${batch} images of a batch are cut to its shortest context, so the number differs between batches: it lay between ${least} and ${most}.`
        : "Every image has the same number of context patches.");
    root.setAttribute("data-counted", count);
    counting = count < ENOUGH ? setTimeout(more, 8) : null;
  }

  const change = atNextFrame(() => {
    const patches = settings.share + settings.targetScale[1];
    trouble.textContent = patches > 1 ? "Context and one target block do not fit into the grid together, so the blocks are made smaller." : "";
    drawn();
  });
  const NOTES = {
    blocks: "Target blocks of an image. They may overlap one another.",
    share: "The share of the patches that the student sees. wejepa's sampler gives every image this same number; contexts that are cut ignore it.",
    targetScale: "The area of a target block as a share of the image, drawn between the two.",
    targetAspect: "The shape of a target block: above 1 it is tall, below 1 wide.",
    contextScale: "The area of the large rectangle that the context is taken from, as a share of the image.",
    contextAspect: "The shape of that rectangle: 1 is a square.",
    batch: "Images that are drawn together. All their blocks have one shape; only their places differ.",
  };
  /** A row: the sliders, and beside them what the setting means. */
  function setting(name, ...sliders) {
    const note = make("p", {class: "live-note", id: `live-note-${name}`}, NOTES[name]);
    sliders.forEach(({input}) => input.setAttribute("aria-describedby", note.id));
    return make("div", {class: "live-setting"}, make("div", {class: "live-sliders"}, ...sliders.map((s) => s.element)), note);
  }
  const pair = (text, name, min, max) => {
    const ends = ["least", "most"].map((which, i) => slider(`${text}, ${which}`, {min, max, step: 0.01, value: settings[name][i]}, (value) => {
      settings[name][i] = value;
      const other = ends[1 - i];
      if ((i === 0 && value > settings[name][1]) || (i === 1 && value < settings[name][0])) {
        settings[name][1 - i] = value;
        other.input.value = other.output.textContent = value;
      }
      change();
    }));
    return setting(name, ...ends);
  };
  const single = (text, name, range, use) => setting(name, slider(text, range, (v) => { use(v); change(); }));
  const switches = [
    ["exclusive", "Blocks never reach the last row and the last column, because the last place where a block would fit is never drawn"],
    ["cut", "Every context keeps what the targets leave, and is cut to the shortest of the batch, from its end, so its lower rows are lost"],
    ["tied", "One random number draws a block's area and its shape, so large blocks are always tall; areas are rounded down to whole patches"],
  ].map(([name, text]) => tick(text, false, (on) => {
    bugs[name] = on;
    change();
  }));
  const all = (on) => {
    switches.forEach(({input}) => (input.checked = on));
    for (const name of Object.keys(bugs)) bugs[name] = on;
    change();
  };
  root.replaceChildren(
    make("div", {class: "live-panels"}, ...draws.map((d) => d.element)),
    key(["hidden", "hidden from the student"], [COLOURS[0], "a target block, one colour for each"]), line,
    make("div", {class: "live-row"}, button("Draw again", () => { seed++; change(); }), button("wejepa's sampler", () => all(false)), button("The published sampler", () => all(true))),
    make("fieldset", {class: "live-switches"}, make("legend", {}, "What the published sampler does otherwise"), ...switches.map((s) => s.element)),
    make("h2", {}, "Counted over many draws"),
    make("div", {class: "live-split live-counts"}, make("div", {class: "live-panels live-two"}, target.element, context.element),
      make("div", {}, legend("in no image", "in 80 % of the images or more", ""), counted)),
    make("fieldset", {class: "live-settings"}, make("legend", {}, "Settings"), trouble,
      single("Target blocks", "blocks", {min: 1, max: 8, step: 1, value: settings.blocks}, (v) => (settings.blocks = v)),
      single("Context share", "share", {min: 0.05, max: 0.8, step: 0.01, value: settings.share}, (v) => (settings.share = v)),
      pair("Target area", "targetScale", 0.02, 0.6), pair("Target height over width", "targetAspect", 0.3, 3),
      pair("Context area", "contextScale", 0.2, 1), pair("Context height over width", "contextAspect", 0.3, 3),
      single("Images in a batch", "batch", {min: 3, max: 256, step: 1, value: batch}, (v) => (batch = v))));
  drawn();
});
