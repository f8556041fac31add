// What the live pages share: making elements, drawing patches, a board of patches for mouse, touch and keyboard, choosing an image.
"use strict";

wejepa.ui = (() => {
  const {GRID, SIZE, N} = wejepa;
  let names = 0;

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  /** A labelled choice among options [[value, text], ...]. */
  function choice(text, options, value, changed) {
    const id = `live-${names++}`;
    const select = make("select", {id, onchange: () => changed(select.value)}, ...options.map(([v, t]) => make("option", {value: v, selected: v === value}, t)));
    return {element: make("div", {class: "live-field"}, make("label", {for: id}, text), select), select};
  }

  /** A labelled slider; `note` says beside it what it does. */
  function slider(text, {min, max, step, value, note = ""}, changed) {
    const id = `live-${names++}`, output = make("output", {for: id}, String(value));
    const input = make("input", {type: "range", id, min, max, step, value, "aria-describedby": note ? `${id}-note` : null, oninput: () => {
      output.textContent = input.value;
      changed(Number(input.value));
    }});
    const element = make("div", {class: "live-field"}, make("label", {for: id}, text, " ", output), input);
    if (note) element.append(make("span", {class: "live-note", id: `${id}-note`}, note));
    return {element, input, output};
  }

  function tick(text, checked, changed) {
    const input = make("input", {type: "checkbox", checked, onchange: () => changed(input.checked)});
    return {element: make("label", {class: "live-tick"}, input, " ", text), input};
  }

  const button = (text, clicked) => make("button", {type: "button", class: "live-button", onclick: clicked}, text);

  // ---------------------------------------------------------------- colours

  const CIVIDIS = [[0, 34, 78], [24, 55, 109], [59, 73, 108], [87, 92, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];

  function heat(value) {
    const at = Math.min(0.9999, Math.max(0, value || 0)) * (CIVIDIS.length - 1), k = Math.floor(at);
    return `rgb(${CIVIDIS[k].map((c, i) => Math.round(c + (at - k) * (CIVIDIS[k + 1][i] - c))).join()})`;
  }

  const legend = (low, high, unit) =>
    make("div", {class: "live-legend"}, make("span", {}, low), make("span", {class: "live-ramp", "aria-hidden": "true"}), make("span", {}, high), make("span", {class: "live-unit"}, unit));

  /** What colours and frames mean: [[kind, meaning], ...], a kind being a class `live-KIND` or a colour of a frame. */
  const key = (...rows) =>
    make("ul", {class: "live-key"}, ...rows.map(([kind, meaning]) =>
      make("li", {}, make("span", kind.startsWith("#") ? {class: "live-swatch", style: `border: 3px solid ${kind}`, "aria-hidden": "true"}
        : {class: `live-swatch live-${kind}`, "aria-hidden": "true"}), meaning)));

  // ---------------------------------------------------------------- pictures

  /** A 32 x 32 canvas of an image's bytes, grey (1024) or colour (3072). */
  function picture(bytes) {
    const canvas = make("canvas", {width: SIZE, height: SIZE}), data = new ImageData(SIZE, SIZE), plane = SIZE * SIZE;
    for (let i = 0; i < plane; i++) {
      for (let c = 0; c < 3; c++) data.data[i * 4 + c] = bytes[bytes.length === plane ? i : c * plane + i];
      data.data[i * 4 + 3] = 255;
    }
    canvas.getContext("2d").putImageData(data, 0, 0);
    return canvas;
  }

  const SIDE = 384, CELL = SIDE / GRID, HIDDEN = "#8aa4c4", SKIPPED = "#d5d8dc", HATCH = "#878f99"; // as in live.css and make_live_data.py

  /**
   * A square panel of 8 x 8 patches with a title, and a note on what it shows. `draw(paint)` repaints it; `paint` has `image(canvas)`,
   * `patch(canvas, from, to)`, `fill(place, colour)`, `hide(place)` for what is hidden from the student, `skip(place)` for what is not
   * predicted, `frame(place, colour, width)`.
   * With `act(place, phase)` it is a board: press, or arrow keys and space. phase is "start", or "move" while a mouse is dragged.
   * With `painted`, a finger paints as well; else it scrolls the page, and a tap acts.
   */
  function panel(title, {act = null, moved = null, label = title, note = "", painted = false} = {}) {
    const canvas = make("canvas", {width: SIDE, height: SIDE, role: "img", "aria-label": label});
    const kind = `live-board${painted ? " live-painted" : ""}`;
    const holder = act ? make("div", {class: kind, tabindex: "0", role: "application", "aria-label": label}, canvas) : make("div", {class: "live-map"}, canvas);
    if (act) {
      canvas.removeAttribute("role");
      canvas.removeAttribute("aria-label");
      canvas.setAttribute("aria-hidden", "true");
    }
    const caption = make("figcaption", {}, make("b", {}, title)), context = canvas.getContext("2d");
    if (note) caption.append(make("span", {}, note));
    const state = {cursor: (N + GRID) / 2, focused: false, redraw: null};
    const xy = (place) => [(place % GRID) * CELL, Math.floor(place / GRID) * CELL];
    const paint = {
      image: (source) => context.drawImage(source, 0, 0, SIDE, SIDE),
      patch: (source, from, to) => context.drawImage(source, (from % GRID) * 4, Math.floor(from / GRID) * 4, 4, 4, ...xy(to), CELL, CELL),
      fill: (place, colour) => {
        context.fillStyle = colour;
        context.fillRect(...xy(place), CELL, CELL);
      },
      hide: (place) => paint.fill(place, HIDDEN),
      skip: (place, bare = true) => {
        if (bare) paint.fill(place, SKIPPED);
        const [x, y] = xy(place);
        context.strokeStyle = HATCH;
        context.lineWidth = 2;
        context.beginPath();
        for (let k = 12; k < 2 * CELL; k += 12) {
          context.moveTo(x + Math.max(0, k - CELL), y + Math.min(k, CELL));
          context.lineTo(x + Math.min(k, CELL), y + Math.max(0, k - CELL));
        }
        context.stroke();
      },
      frame: (place, colour, width = 5) => {
        const [x, y] = xy(place);
        context.strokeStyle = colour;
        context.lineWidth = width;
        context.strokeRect(x + width / 2, y + width / 2, CELL - width, CELL - width);
      },
      box: (place, high, wide, colour, inset) => {
        const [x, y] = xy(place);
        context.strokeStyle = colour;
        context.lineWidth = 4;
        context.strokeRect(x + inset, y + inset, wide * CELL - 2 * inset, high * CELL - 2 * inset);
      },
    };
    const draw = (how) => {
      state.redraw = how;
      context.imageSmoothingEnabled = false;
      context.clearRect(0, 0, SIDE, SIDE);
      how(paint);
      if (act && state.focused) paint.frame(state.cursor, "#e8590c", 4);
    };
    if (act) {
      const placeOf = (event) => {
        const box = canvas.getBoundingClientRect();
        const at = (v, size) => Math.min(GRID - 1, Math.max(0, Math.floor((v / size) * GRID)));
        return at(event.clientY - box.top, box.height) * GRID + at(event.clientX - box.left, box.width);
      };
      let last = null;
      const taps = (event) => event.pointerType === "touch" && !painted; // else a finger that scrolls would act
      holder.addEventListener("pointerdown", (event) => {
        state.focused = false;
        if (taps(event)) return;
        holder.setPointerCapture(event.pointerId);
        act((last = state.cursor = placeOf(event)), "start");
      });
      holder.addEventListener("click", (event) => taps(event) && act((state.cursor = placeOf(event)), "start"));
      holder.addEventListener("pointermove", (event) => {
        if (last === null) return;
        const place = placeOf(event);
        if (place !== last) act((last = state.cursor = place), "move");
      });
      for (const end of ["pointerup", "pointercancel"]) holder.addEventListener(end, () => (last = null));
      holder.addEventListener("focus", () => {
        state.focused = holder.matches(":focus-visible");
        if (state.redraw) draw(state.redraw);
      });
      holder.addEventListener("blur", () => {
        state.focused = false;
        if (state.redraw) draw(state.redraw);
      });
      holder.addEventListener("keydown", (event) => {
        const [row, col] = [Math.floor(state.cursor / GRID), state.cursor % GRID];
        const steps = {ArrowUp: [row - 1, col], ArrowDown: [row + 1, col], ArrowLeft: [row, col - 1], ArrowRight: [row, col + 1]}[event.key];
        if (steps) {
          state.cursor = Math.min(GRID - 1, Math.max(0, steps[0])) * GRID + Math.min(GRID - 1, Math.max(0, steps[1]));
          state.focused = true;
          moved?.(state.cursor);
          draw(state.redraw);
        } else if (event.key === " " || event.key === "Enter") {
          state.focused = true;
          act(state.cursor, "start");
        } else return;
        event.preventDefault();
      });
    }
    return {element: make("figure", {class: "live-panel"}, caption, holder), draw, caption, holder, canvas};
  }

  // ---------------------------------------------------------------- images to choose from

  /** The images of the images file: [{name, bytes, colour}]. */
  function imagesOf(file) {
    const {grey, colour} = file.tensors, plane = SIZE * SIZE, images = [];
    for (let i = 0; i < grey.shape[0]; i++) images.push({bytes: grey.data.slice(i * plane, (i + 1) * plane)});
    for (let i = 0; i < colour.shape[0]; i++) images.push({bytes: colour.data.slice(i * 3 * plane, (i + 1) * 3 * plane)});
    images.forEach((image, i) => (image.name = file.notes.names[i]));
    return images;
  }

  /** A file of the reader's own as an image of 32 x 32. It is read here, and goes nowhere. */
  async function own(file) {
    const bitmap = await createImageBitmap(file), scale = Math.min(1, 1024 / Math.max(bitmap.width, bitmap.height));
    const width = Math.max(1, Math.round(bitmap.width * scale)), height = Math.max(1, Math.round(bitmap.height * scale));
    const canvas = make("canvas", {width, height}), context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0, width, height);
    return {name: "your image", bytes: wejepa.resample(context.getImageData(0, 0, width, height).data, width, height)};
  }

  /** A strip of thumbnails as a group of radio buttons, with a way to bring an own image by choosing or dropping a file. */
  function chooser(text, images, first, chosen) {
    const group = `live-${names++}`, strip = make("div", {class: "live-strip", role: "radiogroup", "aria-label": text});
    const note = make("span", {class: "live-note", role: "status"});
    const add = (image, checked) => {
      const input = make("input", {type: "radio", name: group, checked, onchange: () => chosen(image), "aria-label": image.name});
      const thumbnail = picture(image.bytes);
      thumbnail.setAttribute("aria-hidden", "true");
      strip.append(make("label", {class: "live-thumb", title: image.name}, input, thumbnail));
      return input;
    };
    images.forEach((image, i) => add(image, i === first));
    const more = make("span", {class: "live-note", hidden: true}, "The row scrolls sideways.");
    new ResizeObserver(() => (more.hidden = strip.scrollWidth <= strip.clientWidth)).observe(strip);
    requestAnimationFrame(() => { // the chosen one is in sight
      const chosen = strip.children[first];
      if (chosen) strip.scrollLeft = chosen.offsetLeft - strip.offsetLeft - strip.clientWidth / 2;
    });
    const take = async (file) => {
      try {
        const image = await own(file), input = add(image, false);
        input.checked = true;
        note.textContent = "Your image: its centre, at 32 × 32. It stays in this page.";
        chosen(image);
        strip.scrollLeft = strip.scrollWidth;
      } catch {
        note.textContent = "This file is not an image that the browser can read.";
      }
    };
    const id = `live-${names++}`, input = make("input", {type: "file", id, accept: "image/*", class: "live-file", onchange: () => input.files[0] && take(input.files[0])});
    const element = make("div", {class: "live-chooser"}, strip, make("div", {class: "live-row"}, input, make("label", {for: id, class: "live-button"}, "Your own image…"), note, more));
    element.addEventListener("dragover", (event) => event.preventDefault());
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
    });
    return element;
  }

  /** Fill every element of the page that asks for `kind` by data-live; say so where it cannot be done. */
  function page(kind, fill) {
    const start = () => {
      for (const root of document.querySelectorAll(`[data-live="${kind}"]`)) {
        fill(root).then(() => root.setAttribute("data-ready", ""), (error) => {
          root.replaceChildren(make("p", {role: "alert"}, `This page could not load its data (${error.message}).`));
        });
      }
    };
    document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
  }

  /** Do something at the next frame, once, however often it is asked for before. */
  function atNextFrame(what) {
    let asked = false;
    return () => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        what();
      });
    };
  }

  return {make, choice, slider, tick, button, heat, legend, key, picture, panel, imagesOf, chooser, page, atNextFrame};
})();
