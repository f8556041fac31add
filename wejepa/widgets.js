// What the browser does for wejepa.widgets: it draws what the kernel has computed, and tells it what was chosen. One function for all explorers.
//
// From the kernel: `controls` (what can be chosen, each a trait of that name), `pictures` (encoded images), and `view` (what is drawn now).
// Every choice sends one message, and every answer is one new `view`.

const WIDTH = 288; // of a panel, in CSS pixels

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const bytesOf = (view) => new Uint8ClampedArray(view.buffer, view.byteOffset, view.byteLength);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const percent = (value) => `${Math.round(100 * value)} %`;
// A front end may load this file once for each explorer, so a count would repeat.
const unique = () => `wejepa-${Math.random().toString(36).slice(2)}`;

// ---------------------------------------------------------------- what can be chosen

// Each gives the node to show, and `follow`, which takes over the model's value.
const CONTROLS = {
  choice(spec, choose) {
    const select = make("select", { id: spec.id, "aria-describedby": spec.help && `${spec.id}-help` });
    spec.options.forEach(([, label]) => select.append(make("option", {}, label)));
    select.addEventListener("change", () => choose(spec.options[select.selectedIndex][0]));
    const follow = (value) => { select.selectedIndex = spec.options.findIndex(([option]) => option === value); };
    return { node: labelled(spec, select), follow };
  },

  tabs(spec, choose) {
    const inputs = spec.options.map(([option, label]) => {
      const input = make("input", { type: "radio", name: spec.id, onchange: () => choose(option) });
      return [option, input, make("label", {}, input, make("span", {}, label))];
    });
    const box = make("fieldset", { class: "wejepa-tabs" }, make("legend", {}, spec.label), ...inputs.map(([, , label]) => label));
    return { node: box, follow: (value) => inputs.forEach(([option, input]) => { input.checked = option === value; }) };
  },

  number(spec, choose) {
    const shown = make("output", { for: spec.id });
    const input = make("input", {
      type: "range", id: spec.id, min: spec.min, max: spec.max, step: spec.step, "aria-describedby": spec.help && `${spec.id}-help`,
      oninput: () => { say(Number(input.value)); choose(Number(input.value)); },
    });
    const say = (value) => {
      shown.textContent = spec.names ? spec.names[value] : spec.percent ? percent(value) : String(value);
      input.setAttribute("aria-valuetext", shown.textContent);
    };
    return { node: labelled(spec, input, shown), follow: (value) => { input.value = value; say(value); } };
  },

  pair(spec, choose) { // a range, by its two ends
    const shown = make("output", {});
    const ends = ["smallest", "largest"].map((name, k) => make("input", {
      type: "range", min: spec.min, max: spec.max, step: spec.step, "aria-label": `${spec.label}, ${name}`,
      "aria-describedby": spec.help && `${spec.id}-help`, id: k ? null : spec.id,
      oninput: () => { // an end that is pushed past the other takes it along
        const values = ends.map((end) => Number(end.value));
        if (values[0] > values[1]) values[1 - k] = values[k];
        follow(values);
        choose(values);
      },
    }));
    const follow = (values) => {
      values.forEach((value, k) => { ends[k].value = value; });
      shown.textContent = `${values[0]} to ${values[1]}`;
    };
    return { node: labelled(spec, make("div", { class: "wejepa-pair" }, ...ends), shown), follow };
  },

  toggle(spec, choose) {
    const input = make("input", { type: "checkbox", id: spec.id, onchange: () => choose(input.checked) });
    const node = make("div", { class: "wejepa-control" }, make("label", { class: "wejepa-toggle" }, input, spec.label), ...helped(spec));
    return { node, follow: (value) => { input.checked = value; } };
  },

  thumbnails(spec, choose, urls) {
    const inputs = spec.options.map(([option, label, picture]) => {
      const input = make("input", { type: "radio", name: spec.id, "aria-label": label, onchange: () => choose(option) });
      const face = picture === null ? make("span", {}, label) : make("img", { src: urls[picture], alt: "", draggable: "false" });
      return [option, input, make("label", { title: label }, input, face)];
    });
    const box = make("fieldset", { class: "wejepa-thumbnails" }, make("legend", {}, spec.label), make("div", {}, ...inputs.map(([, , label]) => label)));
    return { node: box, follow: (value) => inputs.forEach(([option, input]) => { input.checked = option === value; }) };
  },

  buttons(spec, choose, urls, model) { // each sets a trait to what it stands for; null counts it up
    const box = make("div", { class: "wejepa-buttons", role: "group", "aria-label": spec.label });
    spec.options.forEach(([name, option, label]) => {
      const press = () => { model.set(name, option ?? model.get(name) + 1); model.save_changes(); };
      box.append(make("button", { type: "button", onclick: press }, label));
    });
    return { node: box, follow: () => {} };
  },
};

function helped(spec) {
  return spec.help ? [make("p", { class: "wejepa-help", id: `${spec.id}-help` }, spec.help)] : [];
}

function labelled(spec, input, ...more) {
  return make("div", { class: "wejepa-control" }, make("label", { for: spec.id }, spec.label), ...more, input, ...helped(spec));
}

// ---------------------------------------------------------------- a picture with patches

class Panel {
  constructor(ask) {
    this.title = make("figcaption");
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.stage = make("div", { class: "wejepa-stage" }, this.canvas);
    this.low = make("span");
    this.high = make("span");
    this.ramp = make("canvas", { class: "wejepa-ramp", width: 256, height: 1, "aria-hidden": "true" });
    this.scale = make("div", { class: "wejepa-scale" }, this.low, this.ramp, this.high);
    this.note = make("p", { class: "wejepa-note" });
    this.crops = make("div", { class: "wejepa-crops", role: "list" });
    this.node = make("figure", { class: "wejepa-panel" }, this.title, this.stage, this.scale, this.note, this.crops);
    this.hovered = null;
    this.ask = ask;
    this.listen();
  }

  show(spec, images, view, opacity) {
    const image = images[spec.picture];
    this.spec = spec;
    this.grid = view.grid || spec.grid;
    this.title.textContent = spec.title;
    this.note.textContent = spec.note || "";
    this.scale.hidden = !spec.scale;
    if (spec.scale) {
      const tint = bytesOf(view.ramp);
      this.ramp.getContext("2d").putImageData(new ImageData(tint, 256, 1), 0, 0);
      [this.low.textContent, this.high.textContent] = spec.scale;
    }
    this.stage.className = `wejepa-stage${spec.acts ? " wejepa-acts" : ""}${spec.acts === "paint" ? " wejepa-paints" : ""}`;
    if (spec.acts) {
      this.stage.setAttribute("tabindex", "0");
      this.stage.setAttribute("role", "application");
      this.stage.setAttribute("aria-roledescription", spec.acts === "paint" ? "mask to paint" : "picture in patches");
      this.stage.setAttribute("aria-label", spec.label);
    } else {
      this.stage.removeAttribute("tabindex");
      this.stage.setAttribute("role", "img");
      this.stage.setAttribute("aria-label", spec.label || spec.title);
    }
    this.image = image;
    this.overlay = null;
    if (spec.overlay) {
      this.overlay = make("canvas", { width: spec.size[1], height: spec.size[0] });
      this.overlay.getContext("2d").putImageData(new ImageData(bytesOf(spec.overlay), spec.size[1], spec.size[0]), 0, 0);
    }
    this.crops.replaceChildren(...(spec.crops || []).map((crop) => this.crop(crop, images)));
    this.draw(opacity);
  }

  draw(opacity) {
    const { canvas, image, spec } = this;
    if (!spec) return;
    this.opacity = opacity;
    const dense = window.devicePixelRatio || 1;
    const height = Math.round((WIDTH * image.naturalHeight) / image.naturalWidth);
    const [wide, high] = [Math.round(WIDTH * dense), Math.round(height * dense)];
    if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = image.naturalWidth * 2 > WIDTH;
    pen.imageSmoothingQuality = "high";
    pen.globalAlpha = 1;
    pen.drawImage(image, 0, 0, wide, high);
    pen.imageSmoothingEnabled = false;
    if (spec.acts === "paint") this.tint(pen, wide, high);
    if (this.overlay && spec.acts !== "paint") {
      pen.globalAlpha = spec.whole ? 1 : opacity;
      pen.drawImage(this.overlay, 0, 0, wide, high);
      pen.globalAlpha = 1;
    }
    const [rows, cols] = spec.grid;
    const box = (row, col, down, across, inset) => [
      (col / cols) * wide + inset * dense, (row / rows) * high + inset * dense,
      (across / cols) * wide - 2 * inset * dense, (down / rows) * high - 2 * inset * dense,
    ];
    if (spec.lines && wide / cols >= 6 * dense) {
      pen.strokeStyle = "rgba(255, 255, 255, 0.8)";
      pen.lineWidth = dense;
      pen.beginPath();
      for (let k = 1; k < cols; k++) { pen.moveTo((k * wide) / cols, 0); pen.lineTo((k * wide) / cols, high); }
      for (let k = 1; k < rows; k++) { pen.moveTo(0, (k * high) / rows); pen.lineTo(wide, (k * high) / rows); }
      pen.stroke();
    }
    for (const [row, col, down, across, colour, inset] of spec.frames || []) {
      pen.lineWidth = 4.5 * dense;
      pen.strokeStyle = "rgba(255, 255, 255, 0.9)";
      pen.strokeRect(...box(row, col, down, across, inset + 1));
      pen.lineWidth = 2.5 * dense;
      pen.strokeStyle = colour;
      pen.strokeRect(...box(row, col, down, across, inset + 1));
    }
    pen.font = `600 ${12 * dense}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (const [row, col, text, colour] of spec.marks || []) {
      const [x, y] = [((col + 0.5) * wide) / cols, ((row + 0.5) * high) / rows];
      pen.beginPath();
      pen.arc(x, y, 9 * dense, 0, 2 * Math.PI);
      pen.fillStyle = colour;
      pen.fill();
      pen.lineWidth = 1.5 * dense;
      pen.strokeStyle = "white";
      pen.stroke();
      pen.fillStyle = "white";
      pen.fillText(text, x, y + 0.5 * dense);
    }
    const here = this.hovered;
    if (here) { // at once, while the kernel still computes
      const [down, across] = this.grid;
      const edge = [(here[1] / across) * wide, (here[0] / down) * high, wide / across, high / down];
      pen.lineWidth = 3 * dense;
      pen.strokeStyle = "rgba(0, 0, 0, 0.7)";
      pen.strokeRect(...edge);
      pen.lineWidth = 1.5 * dense;
      pen.strokeStyle = "rgba(255, 255, 255, 0.95)";
      pen.strokeRect(...edge);
    }
  }

  tint(pen, wide, high) { // what is hidden now, whether the kernel has answered or not
    const [rows, cols] = this.spec.grid;
    const seen = new Set(this.ask.seen());
    pen.fillStyle = this.spec.tint;
    for (let k = 0; k < rows * cols; k++) {
      if (!seen.has(k)) {
        const [left, top] = [Math.round(((k % cols) / cols) * wide), Math.round((Math.floor(k / cols) / rows) * high)];
        const [right, bottom] = [Math.round((((k % cols) + 1) / cols) * wide), Math.round(((Math.floor(k / cols) + 1) / rows) * high)];
        pen.fillRect(left, top, right - left, bottom - top);
      }
    }
  }

  crop([picture, grid, row, col, margin, text, side], images) {
    const image = images[picture];
    const [across, down] = [image.naturalWidth / grid[1], image.naturalHeight / grid[0]];
    const dense = window.devicePixelRatio || 1;
    const canvas = make("canvas", { width: side * dense, height: side * dense, style: `width: ${side}px; height: ${side}px`, "aria-hidden": "true" });
    const pen = canvas.getContext("2d");
    const whole = 2 * margin + 1;
    pen.imageSmoothingEnabled = across * whole * 2 > side * dense;
    pen.drawImage(image, (col - margin) * across, (row - margin) * down, whole * across, whole * down, 0, 0, canvas.width, canvas.height);
    if (margin) {
      pen.lineWidth = 2 * dense;
      pen.strokeStyle = this.spec.colour;
      const [w, h] = [canvas.width / whole, canvas.height / whole];
      pen.strokeRect(margin * w, margin * h, w, h);
    }
    return make("div", { role: "listitem" }, canvas, make("span", {}, text));
  }

  at(event) { // the patch below the pointer
    const box = this.canvas.getBoundingClientRect();
    const [rows, cols] = this.grid;
    return [
      clamp(Math.floor(((event.clientY - box.top) / box.height) * rows), 0, rows - 1),
      clamp(Math.floor(((event.clientX - box.left) / box.width) * cols), 0, cols - 1),
    ];
  }

  hover(place) {
    if (String(place) === String(this.hovered)) return false;
    this.hovered = place;
    this.draw(this.opacity);
    return true;
  }

  listen() {
    const { stage, ask } = this;
    let stroke = null; // the last patch of the line that is being painted

    stage.addEventListener("pointermove", (event) => {
      if (!this.spec.acts) return;
      const place = this.at(event);
      if (this.spec.acts === "paint") {
        this.hover(place);
        if (stroke) {
          ask.paint(between(stroke, place));
          stroke = place;
        }
      } else if (event.pointerType !== "touch") {
        this.hover(place);
        ask.look(place, this.spec.which);
      }
    });
    stage.addEventListener("pointerleave", () => { if (!stroke) this.hover(null); });
    stage.addEventListener("pointerdown", (event) => {
      if (event.button || !this.spec.acts) return;
      stage.focus({ preventScroll: true });
      if (this.spec.acts !== "paint") return;
      event.preventDefault();
      stage.setPointerCapture(event.pointerId);
      stroke = this.at(event);
      ask.begin(stroke);
    });
    for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { stroke = null; });
    stage.addEventListener("click", (event) => { if (this.spec.acts === "look") ask.pin(this.at(event), this.spec.which); });
    stage.addEventListener("focus", () => { if (this.spec.acts === "paint" && stage.matches(":focus-visible")) this.hover(this.hovered || [0, 0]); });
    stage.addEventListener("blur", () => this.hover(null));
    stage.addEventListener("keydown", (event) => {
      if (!this.spec.acts || event.ctrlKey || event.altKey || event.metaKey) return;
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      const press = event.key === "Enter" || event.key === " ";
      if (!step && !press) return;
      event.preventDefault();
      const paints = this.spec.acts === "paint";
      const from = paints ? this.hovered || [0, 0] : ask.place();
      const to = step ? [clamp(from[0] + step[0], 0, this.grid[0] - 1), clamp(from[1] + step[1], 0, this.grid[1] - 1)] : from;
      if (paints) {
        this.hover(to);
        if (press) ask.begin(to);
        else if (event.shiftKey) ask.paint([to]);
        else ask.say(to);
      } else if (press) {
        ask.pin(to, this.spec.which);
      } else {
        this.hover(null);
        ask.move(to, this.spec.which);
      }
    });
  }
}

function between([row, col], [toRow, toCol]) { // the patches on the line between two, so that a quick stroke has no gaps
  const steps = Math.max(Math.abs(toRow - row), Math.abs(toCol - col));
  return Array.from({ length: steps }, (_, k) => [
    Math.round(row + ((k + 1) / steps) * (toRow - row)),
    Math.round(col + ((k + 1) / steps) * (toCol - col)),
  ]);
}

// ---------------------------------------------------------------- the whole

async function render({ model, el }) {
  const urls = model.get("pictures").map((bytes) => URL.createObjectURL(new Blob([bytes])));
  const images = await Promise.all(urls.map(async (url) => {
    const image = new Image();
    image.src = url;
    await image.decode();
    return image;
  }));
  const panels = [];
  const handlers = [];
  const on = (name, handler) => { model.on(`change:${name}`, handler); handlers.push([`change:${name}`, handler]); };
  const send = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };
  const opacity = () => model.get("opacity") ?? 1;

  const caption = make("p", { class: "wejepa-caption", role: "status" });
  const problem = make("p", { class: "wejepa-problem", role: "alert" });
  const pictures = make("div", { class: "wejepa-panels" });
  const above = make("div", { class: "wejepa-above" });
  const beside = make("div", { class: "wejepa-beside" });
  const spoken = make("p", { class: "wejepa-spoken", "aria-live": "polite" });
  const root = make("div", { class: "wejepa", role: "group", "aria-label": model.get("named") });
  // A notebook's own shortcuts would take the arrow keys, Enter and Space; those with Ctrl, Alt or Cmd are left to it.
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.altKey && !event.metaKey && event.key !== "Escape") event.stopPropagation();
  });
  root.append(above, make("div", { class: "wejepa-body" }, beside, make("div", { class: "wejepa-right" }, pictures, caption, problem, spoken)));

  const controls = model.get("controls").map((given) => {
    const spec = { ...given, id: unique() };
    const choose = (value) => send({ [spec.name]: value });
    const control = CONTROLS[spec.kind](spec, choose, urls, model);
    control.spec = spec;
    control.follow(model.get(spec.name));
    on(spec.name, () => control.follow(model.get(spec.name)));
    (spec.place === "above" ? above : beside).append(control.node);
    return control;
  });
  const offer = () => {
    for (const { node, spec } of controls) node.hidden = Boolean(spec.when) && !spec.when.includes(model.get("mode"));
  };
  on("mode", offer);
  offer();
  beside.hidden = !beside.children.length;
  above.hidden = !above.children.length;

  let value = true; // what a stroke paints: seen, or hidden
  const ask = {
    place: () => model.get("patch"),
    move(place, which) { // by a key: a pinned patch moves too
      if (String(place) !== String(model.get("patch")) || which !== model.get("asked")) send({ patch: place, asked: which });
    },
    look(place, which) { if (!model.get("pinned")) ask.move(place, which); },
    pin(place, which) {
      const again = model.get("pinned") && String(place) === String(model.get("patch")) && which === model.get("asked");
      send({ patch: place, asked: which, pinned: !again });
    },
    seen: () => model.get("context"),
    columns: () => model.get("view").panels[0].grid[1],
    begin(place) {
      value = !ask.seen().includes(place[0] * ask.columns() + place[1]);
      ask.paint([place]);
    },
    paint(places) {
      const seen = new Set(ask.seen());
      for (const [row, col] of places) {
        const patch = row * ask.columns() + col;
        if (value) seen.add(patch);
        else seen.delete(patch);
      }
      if (seen.size !== ask.seen().length) send({ context: [...seen].sort((a, b) => a - b) });
      places.slice(-1).forEach(ask.say);
    },
    say([row, col]) {
      const state = ask.seen().includes(row * ask.columns() + col) ? "seen" : "hidden";
      spoken.textContent = `row ${row}, column ${col}: ${state}`;
    },
  };

  const draw = () => {
    const view = model.get("view");
    while (panels.length < view.panels.length) {
      panels.push(new Panel(ask));
      pictures.append(panels.at(-1).node);
    }
    pictures.dataset.count = view.panels.length;
    while (panels.length > view.panels.length) panels.pop().node.remove();
    view.panels.forEach((spec, k) => panels[k].show(spec, images, view, opacity()));
    caption.textContent = view.caption;
    problem.textContent = view.problem;
    problem.hidden = !view.problem;
    root.dataset.drawn = Number(root.dataset.drawn || 0) + 1;
  };
  const again = () => panels.forEach((panel) => panel.draw(opacity()));
  const pins = () => root.classList.toggle("wejepa-pinned", Boolean(model.get("pinned")));
  on("view", draw);
  on("opacity", again);
  on("context", again);
  on("pinned", pins);
  on("busy", () => {
    root.classList.toggle("wejepa-busy", model.get("busy"));
    root.setAttribute("aria-busy", model.get("busy"));
  });
  pins();
  draw();
  el.replaceChildren(root);

  return () => {
    handlers.forEach(([name, handler]) => model.off(name, handler));
    urls.forEach((url) => URL.revokeObjectURL(url));
  };
}

export default { render };
