/* The page on which the reader moves a threshold over heat maps. Two parts: the core, pure functions that give the
   numbers of cxr_book.localization (tests/test_explorer.py compares them), and the page, which draws.
   The data stand in window.CXR_EXPLORER, set by a script that is loaded before this one. */
"use strict";

// ---- the core ----

const CXR = (() => {
  const SIZE = 128; // cells along each side of the grid on which boxes are found
  const LEVELS = Array.from({ length: 101 }, (_, i) => i / 100); // thresholds that the curves try

  /** The bytes of a base64 text. */
  function decode(text) {
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  }

  /** Heat 0..1 of a square map of bytes on a grid of size x size cells, by bilinear interpolation between the centres
      of cells; the border's value holds up to the edge. `nearest` repeats cells instead. */
  function upsample(bytes, size = SIZE, nearest = false) {
    const side = Math.round(Math.sqrt(bytes.length));
    const last = side - 1;
    const along = Array.from({ length: size }, (_, i) => {
      const at = ((i + 0.5) * side) / size - 0.5;
      const low = Math.floor(at);
      const near = Math.min(last, Math.max(0, Math.floor(at + 0.5)));
      if (nearest) return [near, near, 0];
      return [Math.max(low, 0), Math.min(low + 1, last), at - low];
    });
    const heat = new Float32Array(size * size);
    for (let y = 0; y < size; y++) {
      const [top, bottom, v] = along[y];
      for (let x = 0; x < size; x++) {
        const [left, right, u] = along[x];
        const above = bytes[top * side + left] * (1 - u) + bytes[top * side + right] * u;
        const below = bytes[bottom * side + left] * (1 - u) + bytes[bottom * side + right] * u;
        heat[y * size + x] = (above * (1 - v) + below * v) / 255;
      }
    }
    return heat;
  }

  /** Otsu's threshold of a map on 256 levels: cells of at least that heat are hot. */
  function otsu(heat) {
    const round = heat instanceof Float32Array ? Math.fround : (x) => x;
    const counts = new Float64Array(256);
    for (const value of heat) counts[Math.floor(round(round(value * 255) + 0.5))]++;
    const p = counts.map((n) => n * (1 / heat.length));
    const mean = counts.reduce((sum, n, i) => sum + i * n, 0) * (1 / heat.length);
    const tiny = 2 ** -23;
    let [below, share, best, cut] = [0, 0, 0, 0];
    for (let i = 0; i < 256; i++) {
      below *= share;
      share += p[i];
      const rest = 1 - share;
      if (Math.min(share, rest) < tiny || Math.max(share, rest) > 1 - tiny) continue;
      below = (below + i * p[i]) / share;
      const above = (mean - share * below) / rest;
      const spread = share * rest * (below - above) * (below - above);
      if (spread > best) [best, cut] = [spread, i];
    }
    return (cut + 0.5) / 255;
  }

  /** Cells of at least the threshold; a cell without any heat is never hot. */
  function hotCells(heat, threshold) {
    const level = heat instanceof Float32Array ? Math.fround(threshold) : threshold;
    const hot = new Uint8Array(heat.length);
    for (let i = 0; i < heat.length; i++) hot[i] = heat[i] >= level && heat[i] > 0 ? 1 : 0;
    return hot;
  }

  /** Pieces of hot cells that touch at an edge or a corner: the label of each cell (0: cold), and of each piece its
      area, its box in cells and `first`, by which equals are ordered (OpenCV meets blocks of 2 x 2 cells). */
  function piecesOf(hot, size) {
    const labels = new Int32Array(hot.length);
    const pieces = [];
    const stack = [];
    for (let start = 0; start < hot.length; start++) {
      if (!hot[start] || labels[start]) continue;
      const piece = { area: 0, box: [size, size, 0, 0], first: Infinity };
      pieces.push(piece);
      labels[start] = pieces.length;
      stack.push(start);
      while (stack.length) {
        const cell = stack.pop();
        const [x, y] = [cell % size, (cell / size) | 0];
        const box = piece.box;
        piece.area++;
        piece.first = Math.min(piece.first, (y >> 1) * size + (x >> 1));
        if (x < box[0]) box[0] = x;
        if (y < box[1]) box[1] = y;
        if (x >= box[2]) box[2] = x + 1;
        if (y >= box[3]) box[3] = y + 1;
        for (let j = Math.max(y - 1, 0); j <= Math.min(y + 1, size - 1); j++) {
          for (let i = Math.max(x - 1, 0); i <= Math.min(x + 1, size - 1); i++) {
            const next = j * size + i;
            if (!hot[next] || labels[next]) continue;
            labels[next] = pieces.length;
            stack.push(next);
          }
        }
      }
    }
    return { labels, pieces };
  }

  /** Cold cells that reach the edge of the image over other cold cells (edges count, corners do not). */
  function outside(hot, size) {
    const reach = new Uint8Array(hot.length);
    const stack = [];
    const visit = (x, y) => {
      const cell = y * size + x;
      if (x < 0 || y < 0 || x >= size || y >= size || hot[cell] || reach[cell]) return;
      reach[cell] = 1;
      stack.push(cell);
    };
    for (let i = 0; i < size; i++) [[i, 0], [i, size - 1], [0, i], [size - 1, i]].forEach(([x, y]) => visit(x, y));
    while (stack.length) {
      const cell = stack.pop();
      const [x, y] = [cell % size, (cell / size) | 0];
      visit(x - 1, y), visit(x + 1, y), visit(x, y - 1), visit(x, y + 1);
    }
    return reach;
  }

  /** The cell with the most heat, of equals the first. */
  function hottest(heat) {
    let best = 0;
    for (let i = 1; i < heat.length; i++) if (heat[i] > heat[best]) best = i;
    return best;
  }

  /** Pieces that lie in no hole of another; the one that holds the hottest cell comes first. */
  function outerPieces(heat, hot, size) {
    const { labels, pieces } = piecesOf(hot, size);
    if (pieces.length < 2) return pieces;
    const reach = outside(hot, size);
    const outer = new Set();
    for (let cell = 0; cell < hot.length; cell++) {
      if (!hot[cell] || outer.has(labels[cell])) continue;
      const [x, y] = [cell % size, (cell / size) | 0];
      const edge = x === 0 || y === 0 || x === size - 1 || y === size - 1;
      if (edge || [-1, 1, -size, size].some((step) => reach[cell + step])) outer.add(labels[cell]);
    }
    let cell = hottest(heat);
    let main = labels[cell];
    for (; !reach[cell]; cell--) { // to the left, up to where the piece around the hottest cell ends
      main = labels[cell] || main;
      if (cell % size === 0) break;
    }
    return [main, ...[...outer].filter((label) => label !== main)].map((label) => pieces[label - 1]);
  }

  /** Boxes (fractions of the image) and the cells that the rule kept. */
  function detect(heat, size, rule, threshold) {
    const hot = hotCells(heat, threshold);
    const fractions = (piece) => piece.box.map((edge) => edge / size);
    if (rule === "patches" || !hot.includes(1)) return { boxes: [], region: hot, hot };
    if (rule === "contours") return { boxes: outerPieces(heat, hot, size).map(fractions), region: hot, hot };
    const { labels, pieces } = piecesOf(hot, size);
    if (rule === "union") {
      const [x0, y0] = [0, 1].map((i) => Math.min(...pieces.map((piece) => piece.box[i])));
      const [x1, y1] = [2, 3].map((i) => Math.max(...pieces.map((piece) => piece.box[i])));
      return { boxes: [fractions({ box: [x0, y0, x1, y1] })], region: hot, hot };
    }
    if (rule !== "largest") throw new Error(`rule = ${rule}: known: contours, largest, union, patches`);
    const before = (a, b) => b.area - a.area || a.first - b.first;
    const best = pieces.reduce((a, b) => (before(a, b) <= 0 ? a : b));
    const kept = pieces.indexOf(best) + 1;
    const region = pieces.length > 1 ? hot.map((_, i) => (labels[i] === kept ? 1 : 0)) : hot;
    return { boxes: [fractions(best)], region, hot };
  }

  const area = (b) => Math.max(b[2] - b[0], 0) * Math.max(b[3] - b[1], 0);
  const ratio = (part, whole) => (whole > 0 ? part / whole : 0);

  function intersection(a, b) {
    const low = [0, 1].map((i) => Math.max(a[i], b[i]));
    const high = [2, 3].map((i) => Math.min(a[i], b[i]));
    return area([...low, ...high]);
  }

  /** Intersection over union of two boxes. */
  function iou(a, b) {
    const both = intersection(a, b);
    return ratio(both, area(a) + area(b) - both);
  }

  /** Intersection over the predicted box. */
  function iobb(predicted, truth) {
    return ratio(intersection(predicted, truth), area(predicted));
  }

  /** For each cell along one side, its share between two fractions. */
  function coverAlong(low, high, size) {
    const share = (_, i) => Math.max(0, Math.min(high * size, i + 1) - Math.max(low * size, i));
    return Array.from({ length: size }, share);
  }

  /** Sum of a map over the box, cells counted by the share that lies in it. */
  function within(map, box, size) {
    const [columns, rows] = [coverAlong(box[0], box[2], size), coverAlong(box[1], box[3], size)];
    let sum = 0;
    for (let y = 0; y < size; y++) {
      if (rows[y]) for (let x = 0; x < size; x++) sum += map[y * size + x] * rows[y] * columns[x];
    }
    return sum;
  }

  /** Share of the heat that lies in the box; 0 for a map without heat. */
  function energy(heat, box, size) {
    return ratio(within(heat, box, size), heat.reduce((sum, value) => sum + value, 0));
  }

  /** Does the centre of the hottest cell lie in the box? */
  function pointing(heat, box, size) {
    const cell = hottest(heat);
    const [x, y] = [((cell % size) + 0.5) / size, (Math.floor(cell / size) + 0.5) / size];
    return heat[cell] > 0 && x >= box[0] && x <= box[2] && y >= box[1] && y <= box[3];
  }

  /** IoU and IoBB of the first box; of a region, where the rule gives no boxes. 0 without a detection. */
  function overlap(found, box, size) {
    if (found.boxes.length) return { IoU: iou(found.boxes[0], box), IoBB: iobb(found.boxes[0], box) };
    const cells = found.region.reduce((sum, kept) => sum + kept, 0);
    const [both, truth] = [within(found.region, box, size), area(box) * size * size];
    return { IoU: ratio(both, cells + truth - both), IoBB: ratio(both, cells) };
  }

  /** All that the page shows of one map against one true box. */
  function score(heat, size, found, box) {
    const { IoU, IoBB } = overlap(found, box, size);
    return { IoU, IoBB, hit: IoU >= 0.3, pointing: pointing(heat, box, size), energy: energy(heat, box, size) };
  }

  /** IoU at each of LEVELS. */
  function curve(heat, size, rule, box) {
    return LEVELS.map((level) => overlap(detect(heat, size, rule, level), box, size).IoU);
  }

  /** Index of the best value, of equals the middle one, as `evaluation.best_thresholds` chooses. */
  function bestOf(values) {
    const top = Math.max(...values) - 1e-12;
    const ties = values.map((value, i) => (value >= top ? i : -1)).filter((i) => i >= 0);
    return ties[ties.length >> 1];
  }

  return {
    SIZE, LEVELS, decode, upsample, otsu, hottest, detect, iou, iobb, energy, pointing, overlap, score, curve, bestOf,
  };
})();

// ---- the page ----

function cxrExplorer(root, data) {
  const TRUE = "#00e676", PREDICTED = "#ff1744"; // the colours of every figure of the book
  const INFERNO = ["000004", "0b0724", "210c4a", "3d0965", "57106e", "71196e", "8a226a", "a32c61", "bc3754", "d24644",
    "e45a31", "f1731d", "f98e09", "fcac11", "f9cb35", "f2ea69", "fcffa4"];
  const size = CXR.SIZE;
  const readable = (name) => name.replace(/_/g, " ");
  const number = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits) : "—");

  const byName = Object.fromEntries(data.methods.map((method) => [method.name, method]));
  const wide = root.clientWidth >= 640;
  const state = {
    image: 0, finding: 0, box: 0, opacity: 0.65, linked: true,
    show: { truth: true, boxes: true, outline: true, point: true },
    panels: [0, 1].map((i) => {
      const method = data.methods[i] && (i === 0 || wide) ? data.methods[i].name : "";
      return { method, rule: "", cut: 0.5, preset: "validated" };
    }),
  };

  // -- helpers for elements

  function element(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "line", "text", "circle", "g", "title"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key in node && !svg && typeof value !== "string") node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function choices(name, legend, items, chosen, choose) {
    return element("fieldset", { class: `cxr-${name}` }, element("legend", {}, legend),
      element("div", { class: "cxr-items" }, ...items.map(({ content, label, kind }, i) => {
        const input = element("input", { type: "radio", name: `cxr-${name}`, checked: i === chosen,
          onchange: () => choose(i) });
        if (label) input.setAttribute("aria-label", label);
        return element("label", { class: kind || "", title: label || "" }, input, content);
      })));
  }

  function select(label, options, value, change) {
    const list = element("select", { onchange: (event) => change(event.target.value) },
      ...options.map(([key, text]) => element("option", { value: key, selected: key === value }, text)));
    return element("label", { class: "cxr-field" }, element("span", {}, label), list);
  }

  function tick(text, checked, change) {
    const input = element("input", { type: "checkbox", checked, onchange: (event) => change(event.target.checked) });
    return element("label", { class: "cxr-tick" }, input, text);
  }

  // -- what the data say

  const maps = new Map(); // decoded and enlarged, by image, finding and method
  const curves = new Map(); // IoU over the thresholds, by map, rule and box

  const boxesOf = (image, k) => image.boxes.filter((b) => b.finding === k).map((b) => b.box);
  const has = (image, method, k) => Boolean(image.maps[method] && image.maps[method][k]);
  const ruleOf = (panel) => panel.rule || byName[panel.method].rule;

  function findingsOf(image) {
    const keys = new Set(Object.values(image.maps).flatMap((byFinding) => Object.keys(byFinding).map(Number)));
    const present = (k) => boxesOf(image, k).length > 0;
    return [...keys].sort((a, b) => present(b) - present(a) || a - b);
  }

  function heatOf(i, k, method) {
    const key = `${i} ${k} ${method}`;
    if (!maps.has(key)) {
      const bytes = CXR.decode(data.images[i].maps[method][k]);
      const heat = CXR.upsample(bytes, size, byName[method].rule === "patches");
      maps.set(key, { heat, otsu: CXR.otsu(heat) });
    }
    return maps.get(key);
  }

  function curveOf(i, k, b, method, rule) {
    const key = `${i} ${k} ${b} ${method} ${rule}`;
    if (!curves.has(key)) {
      const box = boxesOf(data.images[i], k)[b];
      curves.set(key, CXR.curve(heatOf(i, k, method).heat, size, rule, box));
    }
    return curves.get(key);
  }

  /** Every true box of a finding among the images for which the method has a map: [image, box]. */
  function pairsOf(k, method) {
    return data.images.flatMap((image, i) =>
      has(image, method, k) ? boxesOf(image, k).map((_, b) => [i, b]) : []);
  }

  /** The mean curve over all boxes of the finding, or null while some are still to be computed. */
  function meanCurve(k, method, rule) {
    const pairs = pairsOf(k, method);
    const known = pairs.map(([i, b]) => curves.get(`${i} ${k} ${b} ${method} ${rule}`));
    if (!pairs.length || known.includes(undefined)) return null;
    return CXR.LEVELS.map((_, t) => known.reduce((sum, values) => sum + values[t], 0) / known.length);
  }

  let working = 0;
  function computeMeans() { // one map at a time, so that the page answers meanwhile
    clearTimeout(working);
    const k = current();
    for (const panel of state.panels.filter((p) => p.method)) {
      const [method, rule] = [panel.method, ruleOf(panel)];
      const next = pairsOf(k, method).find(([i, b]) => !curves.has(`${i} ${k} ${b} ${method} ${rule}`));
      if (next) {
        curveOf(next[0], k, next[1], method, rule);
        working = setTimeout(computeMeans, 0);
        if (meanCurve(k, method, rule)) drawPanels();
        return;
      }
    }
  }

  const image = () => data.images[state.image];
  const current = () => findingsOf(image())[state.finding];
  const truth = () => boxesOf(image(), current())[state.box];

  function presets(panel) {
    const [k, { method }] = [current(), panel];
    const chosen = byName[method].thresholds[k];
    const list = [];
    if (typeof chosen === "number" && Number.isFinite(chosen)) list.push(["validated", "validated", chosen]);
    list.push(["otsu", "Otsu", heatOf(state.image, k, method).otsu]);
    if (truth()) {
      const own = curveOf(state.image, k, state.box, method, ruleOf(panel));
      list.push(["here", "best here", CXR.LEVELS[CXR.bestOf(own)]]);
      const mean = meanCurve(k, method, ruleOf(panel));
      if (pairsOf(k, method).length > 1) list.push(["mean", "best mean", mean ? CXR.LEVELS[CXR.bestOf(mean)] : NaN]);
    }
    return list;
  }

  /** A panel that stands on a preset follows it to another map. */
  function settle(panel) {
    if (!panel.method || !panel.preset || !has(image(), panel.method, current())) return;
    const list = presets(panel);
    const found = list.find(([key]) => key === panel.preset) || list[0];
    if (Number.isFinite(found[2])) panel.cut = found[2];
  }

  // -- the parts that stay

  const strip = element("div"), chips = element("div"), boxChips = element("div");
  const stage = element("div", { class: "cxr-panels" });
  const status = element("p", { class: "cxr-hidden", role: "status", "aria-live": "polite" });
  const linkBox = tick("one threshold for both", state.linked, (on) => { state.linked = on; drawPanels(); });
  const opacity = element("input", { type: "range", min: "0", max: "100", value: String(100 * state.opacity),
    oninput: (event) => { state.opacity = event.target.value / 100; drawPanels(); } });
  const toggles = element("div", { class: "cxr-toggles" },
    element("label", { class: "cxr-field cxr-opacity" }, element("span", {}, "heat map"), opacity),
    ...Object.entries({ truth: "true box", boxes: "predicted box", outline: "hot region", point: "hottest point" })
      .map(([key, text]) => tick(text, true, (on) => { state.show[key] = on; drawPanels(); })), linkBox);
  const views = state.panels.map((panel, i) => makePanel(panel, i));

  root.classList.add("cxr-ready");
  root.replaceChildren(strip, element("div", { class: "cxr-choose" }, chips, boxChips), toggles, stage, status);
  stage.append(...views.map((view) => view.node));
  strip.append(choices("strip", "Radiograph", data.images.map((im, i) => ({
    content: element("img", { src: source(im), alt: "", width: 256, height: 256, loading: "lazy" }),
    label: `${i + 1} of ${data.images.length}: ${im.labels.map(readable).join(", ") || "no finding"}`,
  })), state.image, (i) => {
    const k = current(), there = boxesOf(data.images[i], k).length; // the same finding again, where it is there
    state.image = i;
    Object.assign(state, { finding: there ? findingsOf(image()).indexOf(k) : 0, box: 0 });
    chooseFinding();
  }));

  function source(im) {
    return im.jpeg.startsWith("data:") ? im.jpeg : `data:image/jpeg;base64,${im.jpeg}`;
  }

  const pictures = new Map();
  function picture(i) { // the image once it is decoded; the panels are drawn again then
    if (!pictures.has(i)) {
      const img = new Image();
      img.onload = () => drawPanels();
      img.src = source(data.images[i]);
      pictures.set(i, img);
    }
    return pictures.get(i);
  }

  function chooseFinding() {
    const items = findingsOf(image()).map((k) => {
      const absent = !boxesOf(image(), k).length;
      const name = readable(data.findings[k]);
      return { content: absent ? `${name} (absent)` : name, kind: absent ? "cxr-absent" : "" };
    });
    chips.replaceChildren(choices("finding", "Finding", items, state.finding, (i) => {
      Object.assign(state, { finding: i, box: 0 });
      changed();
      drawBoxChoice();
    }));
    drawBoxChoice();
    changed();
  }

  function drawBoxChoice() {
    const n = boxesOf(image(), current()).length;
    const items = Array.from({ length: n }, (_, i) => ({ content: `${i + 1}` }));
    boxChips.replaceChildren(...(n > 1 ? [choices("box", "True box", items, state.box, (i) => {
      state.box = i;
      changed();
    })] : []));
  }

  /** Another image, finding, method or rule. */
  function changed() {
    strip.querySelectorAll("label").forEach((label, i) =>
      label.classList.toggle("cxr-same", boxesOf(data.images[i], current()).length > 0));
    state.panels.forEach(settle);
    drawPanels();
    computeMeans();
  }

  // -- a panel

  function makePanel(panel, i) {
    const view = {
      panel,
      canvas: element("canvas", { role: "img" }),
      layer: element("canvas", { width: size, height: size }), // the heat alone, one pixel a cell
      scores: element("dl", { class: "cxr-scores" }),
      value: element("output", {}),
      chart: element("svg", { class: "cxr-chart", "aria-hidden": "true" }),
      buttons: element("div", { class: "cxr-presets", role: "group", "aria-label": "Thresholds to jump to" }),
      said: element("p", { class: "cxr-said" }),
      missing: element("p", {}, "This method has no map of this finding here."),
    };
    const methods = data.methods.map((method) => [method.name, method.title]);
    const none = i ? [["", "none"]] : [];
    view.method = select(i ? "Second method" : "Method", [...none, ...methods], panel.method, (value) => {
      Object.assign(panel, { method: value, preset: panel.preset || "validated" });
      changed();
    });
    view.rule = select("Boxes", [], "", (value) => { panel.rule = value; changed(); });
    view.slider = element("input", { type: "range", min: "0", max: "1", step: "0.01", id: `cxr-threshold-${i}`,
      oninput: (event) => moveTo(panel, Number(event.target.value)) });
    view.slider.style.setProperty("--cxr-inferno", `linear-gradient(to right, ${INFERNO.map((c) => `#${c}`).join()})`);
    const name = element("label", { class: "cxr-name", for: view.slider.id }, "Threshold ", view.value);
    view.body = element("div", {}, view.canvas, view.scores, element("div", { class: "cxr-head" }, name, view.rule),
      element("div", { class: "cxr-slider" }, view.chart, view.slider), view.buttons, view.said);
    view.node = element("section", { class: "cxr-panel", "aria-label": i ? "Second method" : "First method" },
      view.method, view.body, view.missing);
    const drag = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      if (event.type === "pointerdown") view.chart.setPointerCapture(event.pointerId);
      const { left, width } = view.chart.getBoundingClientRect();
      moveTo(panel, Math.min(1, Math.max(0, (event.clientX - left - PAD) / (width - 2 * PAD))));
    };
    view.chart.addEventListener("pointerdown", drag);
    view.chart.addEventListener("pointermove", drag);
    return view;
  }

  function moveTo(panel, value, preset = "") {
    for (const other of state.linked ? state.panels : [panel]) {
      other.preset = preset;
      if (preset && other !== panel) settle(other);
      else other.cut = preset ? value : Math.round(value * 100) / 100;
    }
    drawPanels();
  }

  let waiting = 0;
  function drawPanels() { // at most once a frame
    if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; views.forEach(drawPanel); say(); });
  }

  function drawPanel(view, i) {
    const { panel } = view, k = current();
    const there = Boolean(panel.method) && has(image(), panel.method, k);
    view.body.hidden = !there;
    view.missing.hidden = there || !panel.method;
    linkBox.hidden = !state.panels.every((p) => p.method);
    if (!there) { view.summary = ""; return; }
    if (panel.preset === "mean") settle(panel);
    const { heat } = heatOf(state.image, k, panel.method);
    const found = CXR.detect(heat, size, ruleOf(panel), panel.cut);
    view.value.textContent = number(panel.cut);
    view.slider.value = panel.cut;
    drawRules(view);
    drawPicture(view, heat, found);
    drawScores(view, heat, found);
    drawPresets(view);
    drawChart(view, found);
    const name = readable(data.findings[k]);
    const text = `${byName[panel.method].title}, ${name}, threshold ${number(panel.cut)}: ${view.summary}`;
    view.canvas.setAttribute("aria-label", `Radiograph with heat map and boxes. ${text}`);
    view.slider.setAttribute("aria-valuetext", `${number(panel.cut)}, ${view.summary}`);
    view.text = text;
  }

  let saying = 0;
  function say() { // for a screen reader, once the slider rests
    clearTimeout(saying);
    saying = setTimeout(() => {
      status.textContent = views.filter((view) => view.summary).map((view) => view.text).join(". ");
    }, 700);
  }

  function drawRules(view) {
    const { panel } = view, own = byName[panel.method].rule;
    const names = own === "patches" ? ["largest", "contours", "union", "patches"] : ["largest", "contours", "union"];
    const chosen = ruleOf(panel);
    const list = view.rule.querySelector("select");
    const options = names.map((rule) => element("option", { value: rule, selected: rule === chosen },
      rule === own ? `${rule} (own)` : rule));
    if (list.dataset.of !== `${panel.method} ${chosen}`) list.replaceChildren(...options);
    list.dataset.of = `${panel.method} ${chosen}`;
  }

  // -- the picture

  const table = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (INFERNO.length - 1), low = Math.min(Math.floor(at), INFERNO.length - 2);
    for (let c = 0; c < 3; c++) {
      const [a, b] = [low, low + 1].map((j) => parseInt(INFERNO[j].slice(2 * c, 2 * c + 2), 16));
      table[3 * i + c] = Math.round(a + (b - a) * (at - low));
    }
  }

  function paintHeat(view, heat) { // as in the book's figures: the hotter, the brighter and the less transparent
    const key = `${state.image} ${current()} ${view.panel.method} ${state.opacity}`;
    if (view.painted === key) return view.layer;
    const context = view.layer.getContext("2d"), pixels = context.createImageData(size, size);
    for (let i = 0; i < heat.length; i++) {
      const level = Math.round(255 * Math.min(heat[i], 1));
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = table[3 * level + c];
      pixels.data[4 * i + 3] = level * state.opacity;
    }
    context.putImageData(pixels, 0, 0);
    view.painted = key;
    return view.layer;
  }

  function edges(region, scale) { // the border of the cells that are set
    const path = new Path2D();
    const at = (x, y) => x >= 0 && y >= 0 && x < size && y < size && region[y * size + x];
    const line = (...p) => { path.moveTo(p[0] * scale, p[1] * scale); path.lineTo(p[2] * scale, p[3] * scale); };
    for (let y = 0; y < size; y++) {
      for (let x = 0; x < size; x++) {
        if (!at(x, y)) continue;
        if (!at(x - 1, y)) line(x, y, x, y + 1);
        if (!at(x + 1, y)) line(x + 1, y, x + 1, y + 1);
        if (!at(x, y - 1)) line(x, y, x + 1, y);
        if (!at(x, y + 1)) line(x, y + 1, x + 1, y + 1);
      }
    }
    return path;
  }

  function drawPicture(view, heat, found) {
    const { canvas } = view;
    const unit = Math.max(1, window.devicePixelRatio || 1), side = Math.round(canvas.clientWidth * unit) || 256;
    if (canvas.width !== side) canvas.width = canvas.height = side;
    const context = canvas.getContext("2d"), scale = side / size;
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#000";
    context.fillRect(0, 0, side, side);
    const img = picture(state.image);
    if (img.complete && img.naturalWidth) context.drawImage(img, 0, 0, side, side);
    context.drawImage(paintHeat(view, heat), 0, 0, side, side);
    const stroke = (path, colour, width, dash = []) => {
      context.setLineDash(dash.map((d) => d * unit));
      context.strokeStyle = "rgba(0, 0, 0, 0.4)";
      context.lineWidth = (width + 1.5) * unit;
      if (!dash.length) context.stroke(path);
      context.strokeStyle = colour;
      context.lineWidth = width * unit;
      context.stroke(path);
    };
    if (state.show.outline) {
      const dropped = found.hot.map((hot, i) => hot && !found.region[i]);
      if (dropped.includes(1)) stroke(edges(dropped, scale), "rgba(255, 255, 255, 0.6)", 1, [2, 2]);
      stroke(edges(found.region, scale), "#fff", 1.25);
    }
    const rectangle = ([x0, y0, x1, y1]) => {
      const path = new Path2D();
      path.rect(x0 * side, y0 * side, (x1 - x0) * side, (y1 - y0) * side);
      return path;
    };
    if (state.show.truth) {
      boxesOf(image(), current()).forEach((box, i) => {
        stroke(rectangle(box), TRUE, i === state.box ? 2.5 : 1.25);
        if (i === state.box) tag(context, unit, side, "true", box[0], box[1], TRUE, true);
      });
    }
    if (state.show.point) drawPoint(context, heat, side, unit);
    if (state.show.boxes) {
      found.boxes.forEach((box, i) => stroke(rectangle(box), PREDICTED, i ? 1.25 : 2.5, i ? [4, 3] : []));
      if (found.boxes.length) {
        const [, , x1, y1] = found.boxes[0];
        tag(context, unit, side, "predicted", x1, y1, PREDICTED, false);
      }
    }
  }

  /** A ring around the hottest cell, which the pointing game asks for. */
  function drawPoint(context, heat, side, unit) {
    const cell = CXR.hottest(heat);
    if (!heat[cell]) return;
    const centre = [cell % size, Math.floor(cell / size)].map((at) => ((at + 0.5) / size) * side);
    for (const [colour, width] of [["rgba(0, 0, 0, 0.7)", 4], ["#fff", 2]]) {
      context.beginPath();
      context.arc(...centre, 5 * unit, 0, 2 * Math.PI);
      context.setLineDash([]);
      context.strokeStyle = colour;
      context.lineWidth = width * unit;
      context.stroke();
    }
  }

  /** A word at a corner of a box, outside it where there is room. */
  function tag(context, unit, side, text, x, y, colour, above) {
    context.font = `600 ${11 * unit}px system-ui, sans-serif`;
    const [w, h] = [context.measureText(text).width + 8 * unit, 16 * unit];
    const left = Math.min(Math.max(above ? x * side : x * side - w, 0), side - w);
    const top = Math.min(Math.max(above ? y * side - h - unit : y * side + unit, 0), side - h);
    context.fillStyle = colour;
    context.fillRect(left, top, w, h);
    context.fillStyle = above ? "#002b12" : "#fff";
    context.textBaseline = "middle";
    context.fillText(text, left + 4 * unit, top + h / 2 + unit / 2);
  }

  // -- scores, presets, curve

  function drawScores(view, heat, found) {
    const box = truth(), n = found.boxes.length;
    const some = found.region.includes(1);
    const count = n ? `${n} ${n > 1 ? "boxes" : "box"}` : some ? "a region" : "nothing";
    if (!box) {
      view.summary = `found ${count}; the finding is absent`;
      const cells = [["boxes", n], ["hot share", `${number((100 * sum(found.region)) / heat.length, 0)} %`]];
      view.scores.replaceChildren(...cells.flatMap(([name, value]) => score(name, String(value))),
        element("div", { class: "cxr-wide" }, "Nothing is there: every box is a false alarm."));
      return;
    }
    const s = CXR.score(heat, size, found, box);
    view.summary = `found ${count}; IoU ${number(s.IoU)}, IoBB ${number(s.IoBB)}, ` +
      `hottest point ${s.pointing ? "in" : "outside"} the true box, ${number(100 * s.energy, 0)} % of the heat in it`;
    view.scores.replaceChildren(...[
      ["IoU", number(s.IoU)], ["IoBB", number(s.IoBB)], ["IoU ≥ 0.3", s.hit ? "yes" : "no", s.hit],
      ["pointing", s.pointing ? "hit" : "miss", s.pointing], ["energy", `${number(100 * s.energy, 0)} %`],
    ].flatMap(([name, value, good]) => score(name, value, good)));
  }

  function score(name, value, good) {
    const kind = good === undefined ? "" : good ? "cxr-good" : "cxr-bad";
    return [element("div", { class: kind }, element("dt", {}, name), element("dd", {}, value))];
  }

  const sum = (values) => values.reduce((total, value) => total + value, 0);

  function drawPresets(view) {
    const { panel } = view, list = presets(panel);
    const focused = [...view.buttons.children].indexOf(document.activeElement);
    view.buttons.replaceChildren(...list.map(([key, name, value]) => element("button", {
      type: "button", disabled: !Number.isFinite(value), "aria-pressed": String(panel.preset === key),
      onclick: () => moveTo(panel, value, key),
    }, `${name} `, element("b", {}, Number.isFinite(value) ? number(value) : "…"))));
    if (focused >= 0 && view.buttons.children[focused]) view.buttons.children[focused].focus();
  }

  const PAD = 10; // half the slider's thumb: chart and slider have one scale

  /** The top of the charts, one for both panels: the next quarter above all curves. */
  function highest() {
    const k = current();
    const shown = state.panels.filter(({ method }) => truth() && method && has(image(), method, k));
    const values = shown.flatMap((panel) => [
      ...curveOf(state.image, k, state.box, panel.method, ruleOf(panel)),
      ...(meanCurve(k, panel.method, ruleOf(panel)) || []),
    ]);
    return Math.min(1, Math.max(0.5, Math.ceil(4 * Math.max(0, ...values)) / 4));
  }

  function drawChart(view, found) {
    const { panel, chart } = view, k = current();
    const width = chart.clientWidth || 320, height = 160, top = 34, bottom = 6, most = highest();
    const x = (t) => PAD + t * (width - 2 * PAD), y = (v) => height - bottom - (v / most) * (height - top - bottom);
    const path = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(CXR.LEVELS[i]).toFixed(1)} ${y(v).toFixed(1)}`);
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const lines = truth() ? [0, 0.25, 0.5, 0.75, 1].filter((v) => v <= most) : [];
    const named = (v) => (v === most ? `IoU ${v}` : v === most / 2 ? String(v) : "");
    const parts = lines.flatMap((v) => [
      element("line", { class: "cxr-grid", x1: x(0), x2: x(1), y1: y(v), y2: y(v) }),
      element("text", { x: x(0) + 3, y: y(v) - 3 }, named(v))]);
    const marks = presets(panel).filter(([key]) => key === "validated" || key === "otsu");
    marks.forEach(([key, name, value], row) => {
      const crowded = marks.some(([, , other]) => other > value && x(other) - x(value) < 70);
      const right = value > 0.8 || (crowded && value > 0.2);
      const at = { x1: x(value), x2: x(value), y1: 6 + 14 * row, y2: height };
      const beside = { x: x(value) + (right ? -4 : 4), y: 11 + 14 * row, "text-anchor": right ? "end" : "start" };
      parts.push(element("line", { class: `cxr-mark cxr-${key}`, ...at }),
        element("text", { class: "cxr-label", ...beside }, name));
    });
    view.said.textContent = "";
    if (truth()) {
      const own = curveOf(state.image, k, state.box, panel.method, ruleOf(panel));
      const mean = meanCurve(k, panel.method, ruleOf(panel)), n = pairsOf(k, panel.method).length;
      if (mean && n > 1) parts.push(element("path", { class: "cxr-mean", d: path(mean).join("") }));
      parts.push(element("path", { class: "cxr-own", d: path(own).join("") }));
      const value = CXR.overlap(found, truth(), size).IoU;
      parts.push(element("line", { class: "cxr-now", x1: x(panel.cut), x2: x(panel.cut), y1: top, y2: height }),
        element("circle", { class: "cxr-dot", cx: x(panel.cut), cy: y(value), r: 4.5 }));
      view.said.append(...sentence(own, mean, n, readable(data.findings[k])));
    } else {
      parts.push(element("line", { class: "cxr-now", x1: x(panel.cut), x2: x(panel.cut), y1: top, y2: height }));
    }
    chart.replaceChildren(...parts);
  }

  function sentence(own, mean, n, name) {
    const key = (kind) => element("i", { class: `cxr-key ${kind}` });
    const here = CXR.bestOf(own);
    const first = ` this map: best at ${number(CXR.LEVELS[here])} with IoU ${number(own[here])}.`;
    if (n < 2 || !mean) return [key("cxr-key-own"), first, n < 2 ? ` The only ${name} among these images.` : ""];
    const on = CXR.bestOf(mean);
    return [key("cxr-key-own"), `${first} `, element("br"), key("cxr-key-mean"),
      ` mean of ${n} boxes of ${name}: best at ${number(CXR.LEVELS[on])} with ${number(mean[on])}; ` +
      `there this map has ${number(own[on])}.`];
  }

  new ResizeObserver(() => drawPanels()).observe(root);
  chooseFinding();
}

if (typeof document !== "undefined") {
  const root = document.getElementById("cxr-explorer");
  if (root && window.CXR_EXPLORER) cxrExplorer(root, window.CXR_EXPLORER);
  else if (root) root.textContent = "The heat maps of this page are not there: the site was built without them.";
}
if (typeof module !== "undefined") module.exports = CXR;
