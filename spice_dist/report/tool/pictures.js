// Thumbnails out of sprite sheets, grids that build what is in sight, the panel of one image, the selection.

const CHUNK = 240; // images that a grid builds at a time
const SHEET = DATA.sheets;
const RULES = document.head.appendChild(document.createElement("style")).sheet;
const loaded = new Map(); // sheet -> address

/** The address of a sheet, made on first use: from the page, or of a file beside it. */
function address(sheet) {
  if (!loaded.has(sheet)) {
    const text = sheet < SHEET.inside ? $("sheet-" + sheet).textContent : null;
    const url = text === null ? `${encodeURIComponent(SHEET.folder)}/sheet-${sheet}.${SHEET.kind.split("/")[1]}`
      : URL.createObjectURL(new Blob([bytesOf(text)], { type: SHEET.kind }));
    loaded.set(sheet, url);
    RULES.insertRule(`.s${sheet}{background-image:url("${url}")}`);
  }
  return loaded.get(sheet);
}

const COLUMNS = SHEET.columns;
const cellOf = (image) => {
  const at = A.place[image];
  const sheet = Math.floor(at / (COLUMNS * COLUMNS));
  const cell = at % (COLUMNS * COLUMNS);
  return [sheet, cell % COLUMNS, Math.floor(cell / COLUMNS)];
};

function paint(node, image) {
  node.classList.add("sprite");
  if (SHEET.count === 0) return;
  const [sheet, column, row] = cellOf(image);
  address(sheet);
  node.classList.add("s" + sheet);
  if (SHEET.pixelated) node.classList.add("px");
  node.style.backgroundPosition = `${(100 * column) / (COLUMNS - 1)}% ${(100 * row) / (COLUMNS - 1)}%`;
}

function describe(image) {
  const index = A.index[image];
  const text = `${DATA.paths[image]} · confidence ${A.confidence[image].toFixed(3)}`;
  if (changes.moved.has(index)) return `${text} · moves to ${nameOf(changes.moved.get(index), "cluster")}`;
  return changes.outside.has(index) ? text + " · belongs to no group" : text;
}

/** Give a thumbnail its name and its marks. */
function mark(node) {
  const image = +node.dataset.image;
  const index = A.index[image];
  const text = describe(image);
  node.title = text;
  if (node.tagName === "IMG") node.alt = text;
  else node.setAttribute("aria-label", text);
  node.setAttribute("aria-pressed", selected.has(image));
  node.classList.toggle("edited", changes.moved.has(index) || changes.outside.has(index));
}

function tile(image) {
  const node = el("button", { type: "button", class: "t", tabindex: -1, "data-image": image });
  paint(node, image);
  if (SHEET.count === 0) node.textContent = DATA.paths[image].split("/").pop();
  mark(node);
  return node;
}

const waiting = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) fill(entry.target);
}, { rootMargin: "800px" });

function fill(chunk) {
  waiting.unobserve(chunk);
  if (!chunk.images) return;
  chunk.append(...chunk.images.map(tile));
  chunk.images = null;
  firstStop(chunk.parentElement);
}

/** A grid of thumbnails; of many images only those near the screen are built, and all of them only then if `later`. */
function grid(images, label, later = false) {
  const node = el("div", { class: "grid", role: "group", "aria-label": label });
  for (let start = 0; start < images.length; start += CHUNK) {
    const chunk = el("div", { class: "thumbs live" });
    chunk.images = images.slice(start, start + CHUNK);
    chunk.style.setProperty("--rows", Math.ceil(chunk.images.length / 12));
    node.append(chunk);
    if (start === 0 && !later) fill(chunk);
    else waiting.observe(chunk);
  }
  if (images.length === 0) node.append(el("p", { class: "muted" }, "No image."));
  return node;
}

// ---------------------------------------------------------------- keyboard: one stop of Tab a grid, arrows inside

const gridOf = (node) => node.closest(".grid") || node.closest(".thumbs");
const tilesOf = (node) => [...gridOf(node).querySelectorAll("[data-image]")];

function firstStop(node) {
  if (node && !node.querySelector('[data-image][tabindex="0"]')) node.querySelector("[data-image]")?.setAttribute("tabindex", 0);
}

function stop(node) {
  for (const other of gridOf(node).querySelectorAll('[data-image][tabindex="0"]')) other.tabIndex = -1;
  node.tabIndex = 0;
}

function go(node, key) {
  const all = tilesOf(node);
  const at = all.indexOf(node);
  const wide = all.filter((other) => other.offsetTop === node.offsetTop && other.parentElement === node.parentElement).length;
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - wide, ArrowDown: at + wide, Home: 0, End: all.length - 1 }[key];
  if (all[to]) stop(all[to]), all[to].focus();
}

document.addEventListener("keydown", (event) => {
  const node = event.target.closest?.("[data-image]");
  if (!node) return;
  if (/^(Arrow|Home|End)/.test(event.key)) event.preventDefault(), go(node, event.key);
  else if (event.key === "x") toggle([+node.dataset.image]);
  else if (node.tagName === "IMG" && (event.key === "Enter" || event.key === " ")) event.preventDefault(), node.click();
});

document.addEventListener("click", (event) => {
  const node = event.target.closest("[data-image]");
  if (!node) return;
  stop(node);
  if (event.ctrlKey || event.metaKey || event.shiftKey || $("picking").checked) toggle([+node.dataset.image]);
  else show(+node.dataset.image, node);
});

// ---------------------------------------------------------------- the selection

const selected = new Set(); // images, in the order in which they were chosen

function toggle(images) {
  for (const image of images) selected.has(image) ? selected.delete(image) : selected.add(image);
  selectionChanged();
}

function select(images) {
  selected.clear();
  for (const image of images) selected.add(image);
  selectionChanged();
}

function selectionChanged() {
  for (const node of document.querySelectorAll("[data-image]")) node.setAttribute("aria-pressed", selected.has(+node.dataset.image));
  $("selection").hidden = selected.size === 0;
  $("selection-count").textContent = plural(selected.size, "image") + " selected";
  $("pair-same").disabled = $("pair-different").disabled = selected.size !== 2;
  drawSoon();
}

const indicesOf = (images) => [...images].map((image) => A.index[image]);
const finish = (operation) => change(operation) && select([]);

/** A menu of all clusters. Its other options are made when it is first used: every one of many groups has a menu. */
function clusterMenu(label, chosen = 0) {
  const option = (k) => el("option", { value: k }, nameOf(k, "cluster"));
  const menu = el("select", { "aria-label": label, class: "clusters-menu" }, option(chosen));
  const complete = () => {
    if (menu.options.length > 1 || DATA.clusters === 1) return;
    menu.replaceChildren(...range(DATA.clusters).map(option));
    menu.value = chosen;
  };
  menu.addEventListener("pointerdown", complete);
  menu.addEventListener("focus", complete);
  return menu;
}

function buildSelection() {
  const menu = clusterMenu("Cluster to move the selected images to");
  $("selection").append(
    el("strong", { id: "selection-count" }), menu,
    button("Move", () => finish({ kind: "move", images: indicesOf(selected), cluster: +menu.value })),
    button("Belong to no group", () => finish({ kind: "outside", images: indicesOf(selected) })),
    button("Same group", () => finish({ kind: "same", images: indicesOf(selected) }), { id: "pair-same" }),
    button("Different groups", () => finish({ kind: "different", images: indicesOf(selected) }), { id: "pair-different" }),
    button("Clear", () => select([])),
  );
}

// ---------------------------------------------------------------- one image

let opener = null;

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // refused or absent: the old way
    const field = $("panel-copy").parentElement.appendChild(el("textarea", { "aria-hidden": "true" }));
    field.value = text;
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say("Copied: " + text);
}

function chances(image) {
  const list = el("ol", { class: "chances" });
  for (let j = 0; j < DATA.top; j++) {
    const weight = A.weights[image * DATA.top + j];
    const bar = el("span", { class: "meter", "aria-hidden": "true" }, el("i"));
    bar.firstChild.style.width = 100 * weight + "%";
    const name = nameOf(A.candidates[image * DATA.top + j], "cluster");
    list.append(el("li", {}, el("span", {}, name), bar, el("span", {}, weight.toFixed(3))));
  }
  return list;
}

function neighborsOf(image) {
  if (!A.neighbors) return [];
  return [...A.neighbors.subarray(image * DATA.reach, (image + 1) * DATA.reach)].filter((other) => other >= 0);
}

/** The sharpest picture of an image that the page has. */
function largest(image) {
  const sharp = $("preview-" + A.index[image]);
  if (sharp) return el("img", { class: "large", alt: DATA.paths[image], src: "data:image/webp;base64," + sharp.textContent });
  const picture = el("div", { class: "large", role: "img", "aria-label": DATA.paths[image] });
  paint(picture, image);
  return picture;
}

function show(image, from = null) {
  const panel = $("panel");
  if (!panel.open) opener = from;
  const picture = largest(image);
  const menu = clusterMenu("Cluster to move this image to", A.candidates[image * DATA.top + Math.min(1, DATA.top - 1)]);
  const copies = DATA.duplicates.find((group) => group.includes(image))?.filter((other) => other !== image) ?? [];
  const facts = el("p", {}, `${nameOf(A.cluster[image], "cluster")} · confidence ${percent(A.confidence[image])}`);
  if (A.truth && A.truth[image] >= 0) facts.append(` · true class ${DATA.classes[A.truth[image]]}`);
  const closing = (operation) => () => change(operation()) && panel.close();
  panel.replaceChildren(
    el("div", { class: "row" }, el("h2", { id: "panel-title", tabindex: -1 }, DATA.paths[image]),
      button("Close", () => panel.close())),
    el("div", { class: "panel-body" }, picture, el("div", {}, facts,
      el("p", { class: "row", id: "panel-copy" }, button("Copy path", () => copy(DATA.paths[image])),
        button(selected.has(image) ? "Take out of selection" : "Select", () => { toggle([image]); panel.close(); })),
      el("h3", {}, DATA.weights_are), chances(image),
      el("p", { class: "row" }, menu, button("Move", closing(() => ({ kind: "move", images: [A.index[image]], cluster: +menu.value }))),
        button("Belongs to no group", closing(() => ({ kind: "outside", images: [A.index[image]] })))))),
    el("h3", {}, "Nearest neighbours"), grid(neighborsOf(image), "Nearest neighbours"),
  );
  if (copies.length) panel.append(el("h3", {}, "Copies"), grid(copies, "Copies"));
  if (!panel.open) panel.showModal();
  $("panel-title").focus();
}
