// The map of all images on a canvas: zoom, pan, names by hovering, selection by lasso.

const canvas = $("map-canvas");
const ink = canvas?.getContext("2d");
const view = { x: 0, y: 0, scale: 1 }; // the middle of the map in units of its width, and how much of it is in sight
const touching = new Map(); // pointers that are down: id -> place
const MANY = 400; // up to so many images in sight are drawn as thumbnails
const decoded = new Map(); // sheet -> Image
let lasso = null;
let drawing = 0;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const side = () => Math.min(canvas.clientWidth, canvas.clientHeight) - 24;
const [AT_X, AT_Y] = [new Float32Array(N), new Float32Array(N)]; // where each image was drawn last
const toScreen = (image) => [AT_X[image], AT_Y[image]];

/** Where a place of the map is on the canvas: the canvas is measured once for many places. */
function projection() {
  const [middle, height, unit] = [canvas.clientWidth / 2, canvas.clientHeight / 2, side() * view.scale];
  return (x, y) => [middle + (x / 65535 - 0.5 - view.x) * unit, height - (y / 65535 - 0.5 - view.y) * unit];
}

function drawSoon() {
  if (canvas && !drawing) drawing = requestAnimationFrame(draw);
}

/** Colour numbers of all images, and the colours of these numbers. */
function colours() {
  const by = $("map-colour").value;
  const ramp = range(10).map((c) => `hsl(${(c * 210) / 9} 70% 50%)`);
  if (by === "confidence") return [(i) => Math.min(9, Math.floor(10 * A.confidence[i])), ramp];
  const palette = range(8).map((c) => css("--c" + c));
  if (by === "edited") return [(i) => (changes.moved.has(A.index[i]) || changes.outside.has(A.index[i]) ? 1 : 7), palette];
  const values = by === "class" ? A.truth : A[level];
  return [(i) => (values[i] < 0 ? 7 : values[i] % 8), palette];
}

function draw() {
  drawing = 0;
  const [width, height, sharp] = [canvas.clientWidth, canvas.clientHeight, Math.min(devicePixelRatio, 2)];
  if (width === 0) return;
  if (canvas.width !== width * sharp) canvas.width = width * sharp;
  if (canvas.height !== height * sharp) canvas.height = height * sharp;
  ink.setTransform(sharp, 0, 0, sharp, 0, 0);
  ink.clearRect(0, 0, width, height);
  const [colourOf, palette] = colours();
  const buckets = palette.map(() => []);
  const place = projection();
  for (let image = 0; image < N; image++) [AT_X[image], AT_Y[image]] = place(A.x[image], A.y[image]);
  const seen = inSight();
  for (const image of seen) buckets[colourOf(image)].push(image);
  const dot = Math.min(9, Math.max(2.2, Math.min(6, 200 / Math.sqrt(N))) * Math.sqrt(view.scale));
  const pictures = seen.length <= MANY && SHEET.count > 0;
  ink.globalAlpha = selected.size ? 0.35 : 0.8;
  buckets.forEach((bucket, c) => {
    ink.fillStyle = palette[c];
    for (const image of bucket) {
      const [x, y] = toScreen(image);
      if (!pictures || !drawPicture(image, x, y)) ink.fillRect(x - dot / 2, y - dot / 2, dot, dot);
    }
  });
  ink.globalAlpha = 1;
  ink.fillStyle = css("--ink");
  for (const image of selected) ink.fillRect(AT_X[image] - dot / 2, AT_Y[image] - dot / 2, dot, dot);
  drawNames(place);
  if (lasso) drawLasso();
  canvas.dataset.drawn = seen.length;
}

function inSight() {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const shown = (image) => AT_X[image] > -20 && AT_Y[image] > -20 && AT_X[image] < width + 20 && AT_Y[image] < height + 20;
  return range(N).filter(shown);
}

function drawPicture(image, x, y) {
  const [sheet, column, row] = cellOf(image);
  if (!decoded.has(sheet)) {
    const picture = new Image();
    picture.onload = drawSoon;
    picture.src = address(sheet);
    decoded.set(sheet, picture);
  }
  const picture = decoded.get(sheet);
  if (!picture.complete || !picture.naturalWidth) return false;
  const edge = Math.max(26, Math.min(56, 5 * view.scale));
  ink.fillRect(x - edge / 2 - 2, y - edge / 2 - 2, edge + 4, edge + 4);
  ink.drawImage(picture, column * SHEET.tile, row * SHEET.tile, SHEET.tile, SHEET.tile, x - edge / 2, y - edge / 2, edge, edge);
  return true;
}

let middles = {};
/** The median place of every group, written on it. */
function drawNames(place) {
  if (LEVELS[level] > 40 || $("map-colour").value !== "group") return;
  const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  const middle = (members) => [A.x, A.y].map((axis) => median(members.map((i) => axis[i])));
  middles[level] ??= range(LEVELS[level]).map((k) => middle(membersOf(k)));
  ink.font = "600 13px system-ui, sans-serif";
  ink.textAlign = "center";
  ink.lineWidth = 4;
  ink.strokeStyle = css("--card");
  ink.fillStyle = css("--ink");
  middles[level].forEach(([mx, my], group) => {
    if (mx === undefined) return;
    const [x, y] = place(mx, my);
    const text = nameOf(group).replace(/^(Cluster|Coarse group|Fine group) /, "");
    ink.strokeText(text, x, y + 5);
    ink.fillText(text, x, y + 5);
  });
}

function drawLasso() {
  ink.beginPath();
  for (const [x, y] of lasso) ink.lineTo(x, y);
  ink.closePath();
  ink.strokeStyle = css("--accent");
  ink.lineWidth = 2;
  ink.stroke();
}

function inside([x, y], polygon) {
  let odd = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[x1, y1], [x2, y2]] = [polygon[i], polygon[j]];
    if (y1 > y !== y2 > y && x < ((x2 - x1) * (y - y1)) / (y2 - y1) + x1) odd = !odd;
  }
  return odd;
}

/** Zoom by a factor; the point (x, y) of the canvas stays where it is. */
function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const scale = Math.max(1, Math.min(80, view.scale * factor));
  const shift = (1 / view.scale - 1 / scale) / side();
  view.x += (x - canvas.clientWidth / 2) * shift;
  view.y -= (y - canvas.clientHeight / 2) * shift;
  view.scale = scale;
  if (scale === 1) view.x = view.y = 0;
  drawSoon();
}

function pan(dx, dy) {
  const limit = (value) => Math.max(-0.6, Math.min(0.6, value));
  view.x = limit(view.x - dx / (side() * view.scale));
  view.y = limit(view.y + dy / (side() * view.scale));
  drawSoon();
}

function nearest(x, y, within = 14) {
  let [best, least] = [-1, within * within];
  for (let image = 0; image < N; image++) {
    const distance = (AT_X[image] - x) ** 2 + (AT_Y[image] - y) ** 2;
    if (distance < least) [best, least] = [image, distance];
  }
  return best;
}

function hover(x, y) {
  const image = nearest(x, y);
  const tip = $("map-tip");
  tip.hidden = image < 0;
  if (image < 0) return;
  const picture = el("div", { class: "tip-picture" });
  paint(picture, image);
  tip.replaceChildren(picture, el("span", {}, DATA.paths[image]), el("span", { class: "muted" }, nameOf(groupOf(image))));
  tip.style.left = Math.min(x + 14, canvas.clientWidth - 150) + "px";
  tip.style.top = Math.min(y + 14, canvas.clientHeight - 150) + "px";
}

function pinch(before, after) {
  const gap = ([[x1, y1], [x2, y2]]) => Math.hypot(x1 - x2, y1 - y2);
  zoom(gap(after) / Math.max(1, gap(before)), (after[0][0] + after[1][0]) / 2, (after[0][1] + after[1][1]) / 2);
}

function mapPointers() {
  let travelled = 0;
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    touching.set(event.pointerId, [event.offsetX, event.offsetY]);
    travelled = 0;
    lasso = touching.size === 1 && (event.shiftKey || $("map-lasso").checked) ? [[event.offsetX, event.offsetY]] : null;
  };
  canvas.onpointermove = (event) => {
    const here = [event.offsetX, event.offsetY];
    const from = touching.get(event.pointerId);
    if (!from) return hover(...here);
    const before = [...touching.values()];
    touching.set(event.pointerId, here);
    travelled += Math.abs(here[0] - from[0]) + Math.abs(here[1] - from[1]);
    if (touching.size === 2) pinch(before, [...touching.values()]);
    else if (lasso) lasso.push(here), drawSoon();
    else pan(here[0] - from[0], here[1] - from[1]);
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    touching.delete(event.pointerId);
    const drawn = lasso;
    lasso = null;
    if (travelled < 5) {
      const image = nearest(event.offsetX, event.offsetY);
      if (image >= 0) drawn ? toggle([image]) : show(image, canvas);
    } else if (drawn) {
      select(inSight().filter((image) => inside(toScreen(image), drawn)));
      say(plural(selected.size, "image") + " selected on the map");
    }
    drawSoon();
  };
  canvas.onpointerleave = () => ($("map-tip").hidden = true);
  canvas.addEventListener("wheel", (event) => {
    if (view.scale === 1 && event.deltaY > 0) return; // nothing to zoom out of: the page scrolls
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
  }, { passive: false });
}

function mapKeys(event) {
  const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  if (moves[event.key]) pan(...moves[event.key]);
  else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "0") zoom(1 / 1000);
  else return;
  event.preventDefault();
}

function buildMap() {
  if (!canvas) return;
  const colour = el("select", { id: "map-colour", onchange: drawSoon }, el("option", { value: "group" }, "group"),
    el("option", { value: "confidence" }, "confidence"), el("option", { value: "edited" }, "corrections"));
  if (A.truth) colour.append(el("option", { value: "class" }, "true class"));
  $("map-controls").append(
    button("+", () => zoom(1.5), { "aria-label": "Zoom in" }), button("−", () => zoom(1 / 1.5), { "aria-label": "Zoom out" }),
    button("Whole map", () => zoom(1 / 1000)),
    el("label", {}, "Colour by ", colour),
    el("label", {}, el("input", { type: "checkbox", id: "map-lasso" }), " Draw a lasso to select"),
    button("Select all in sight", () => select(inSight())),
  );
  canvas.addEventListener("keydown", mapKeys);
  mapPointers();
  new ResizeObserver(drawSoon).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawSoon);
}
