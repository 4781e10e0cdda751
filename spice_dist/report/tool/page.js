// What the sections of the page gain by the script: search, groups, comparison, corrections.

const staticGroups = range(DATA.clusters).map((k) => $("cluster-" + k));

// ---------------------------------------------------------------- search and filters

const FILTERS = {
  all: ["all", (images) => images],
  doubtful: ["least certain", (images) => images.sort(byConfidence)],
  border: ["on a border", (images) => images.sort(byMargin)],
  outliers: ["fit nowhere", (images) => kept(images, DATA.outliers)],
  copies: ["copies", (images) => kept(images, DATA.duplicates.flat())],
  unreliable: ["not reliable", (images) => images.filter((i) => !A.reliable[i])],
  selected: ["selected", (images) => kept(images, [...selected])],
  edited: ["corrected", (images) => images.filter((i) => changes.moved.has(A.index[i]) || changes.outside.has(A.index[i]))],
};
function kept(images, wanted) {
  const among = new Set(images);
  return wanted.filter((image) => among.has(image));
}
const lowered = DATA.paths.map((path) => path.toLowerCase());

function find() {
  const text = $("find-text").value.trim().toLowerCase();
  const group = $("find-group").value;
  const kind = $("find-kind").value;
  const idle = !text && group === "" && kind === "all";
  $("results").hidden = idle;
  if (idle) return $("results").replaceChildren();
  const images = range(N).filter((i) => (group === "" || groupOf(i) === +group) && lowered[i].includes(text));
  const shown = FILTERS[kind][1](images);
  const heading = `${plural(shown.length, "image")}: ${FILTERS[kind][0]}`;
  $("results").replaceChildren(
    el("div", { class: "row" }, el("h2", {}, heading), button("Select them", () => select(shown)), button("Close", clearFind)),
    grid(shown, heading),
  );
  say(heading);
}

function clearFind() {
  $("find-text").value = "";
  $("find-group").value = "";
  $("find-kind").value = "all";
  find();
}

/** Open the results of one filter, by a link of the words above. */
function lookAt(kind) {
  clearFind();
  $("find-kind").value = kind;
  find();
  $("results").scrollIntoView();
}

let typing = 0;
function buildFind() {
  const later = () => { clearTimeout(typing); typing = setTimeout(find, 120); };
  const kinds = Object.entries(FILTERS).map(([value, [text]]) => el("option", { value }, text));
  const levels = Object.entries({ coarse: "coarse", cluster: "(the result)", fine: "fine" }).filter(([at]) => LEVELS[at]);
  $("find").append(
    el("label", { class: "grow" }, el("span", { class: "hidden" }, "Search by file name"),
      el("input", { type: "search", id: "find-text", placeholder: "Search names", oninput: later, maxlength: 200 })),
    el("label", {}, "In ", el("select", { id: "find-group", onchange: find })),
    el("label", {}, "Show ", el("select", { id: "find-kind", onchange: find }, ...kinds)),
    el("label", {}, el("input", { type: "checkbox", id: "picking" }), " Click selects"),
    button("Undo", () => undo(), { id: "undo" }), button("Redo", redo, { id: "redo" }),
    el("a", { href: "#corrections", id: "count-link" }),
  );
  if (levels.length > 1) {
    const menu = el("select", { id: "level", onchange: () => setLevel(menu.value) }, ...levels.map(([at, text]) =>
      el("option", { value: at }, `${LEVELS[at]} ${text}`)));
    menu.value = "cluster";
    $("find").prepend(el("label", {}, "Groups ", menu));
  }
}

function setLevel(at) {
  level = at;
  $("level-groups").hidden = at === "cluster";
  $("static-groups").hidden = at !== "cluster";
  $("level-groups").replaceChildren(...(at === "cluster" ? [] : range(LEVELS[at]).map((k) => {
    const members = membersOf(k);
    const size = el("p", { class: "muted" }, plural(members.length, "image"));
    return el("section", { class: "card cluster" }, el("h3", {}, nameOf(k)), size,
      grid(members.slice(0, 24), nameOf(k)), showAll(members.slice(24), nameOf(k)));
  })));
  fillGroupMenus();
  find();
  drawSoon();
}

function fillGroupMenus() {
  for (const menu of [$("find-group"), $("pair-a"), $("pair-b")]) {
    const before = menu.value;
    menu.replaceChildren(...(menu.id === "find-group" ? [el("option", { value: "" }, "all groups")] : []),
      ...range(LEVELS[level]).map((k) => el("option", { value: k }, nameOf(k))));
    menu.value = [...menu.options].some((o) => o.value === before) ? before : menu.options[0].value;
  }
}

// ---------------------------------------------------------------- groups

function showAll(images, label) {
  if (images.length === 0) return "";
  const box = el("details", {}, el("summary", {}, `All others (${images.length.toLocaleString("en")})`));
  box.addEventListener("toggle", () => {
    if (box.open && box.childElementCount === 1) box.append(grid(images, `All of ${label}`));
  });
  return box;
}

function groupTools(k) {
  const name = el("input", { type: "text", maxlength: 80, "aria-label": `Name of cluster ${k}`, placeholder: "Name",
    value: changes.names.get(k) ?? "" });
  const rename = () => {
    const text = cleanName(name.value);
    if (text && text !== changes.names.get(k)) change({ kind: "name", cluster: k, name: text });
  };
  name.addEventListener("change", rename);
  const next = DATA.next[k] ?? (k ? 0 : Math.min(1, DATA.clusters - 1));
  const other = clusterMenu(`Cluster to merge with cluster ${k}`, next);
  const parts = el("input", { type: "number", min: 2, max: 100, value: 2, "aria-label": `Number of parts of cluster ${k}` });
  const merge = () => {
    if (+other.value === k) say("Choose another cluster to merge with.");
    else change({ kind: "merge", clusters: [k, +other.value] });
  };
  return el("div", { class: "tools row" }, name,
    button("Name it", rename),
    el("span", { class: "row" }, button("Merge with", merge), other),
    el("span", { class: "row" }, button("Split into", () => change({ kind: "split", cluster: k, parts: +parts.value })), parts),
    button("Compare", () => comparePair(k, +other.value)),
    el("span", { class: "note", "data-pending": k }),
  );
}

function enhanceGroup(k) {
  const section = staticGroups[k];
  const members = membersOf(k, A.cluster);
  if (!section || members.length === 0) return;
  section.querySelector("header").after(groupTools(k));
  const border = members.slice().sort(byMargin).slice(0, 12);
  if (DATA.top > 1) section.append(el("h4", {}, "On the border to another group"), grid(border, `Border of cluster ${k}`, true));
  section.append(showAll(members, `cluster ${k}`));
  section.querySelector("summary").textContent = `All on this page (${members.length.toLocaleString("en")})`;
}

/** Make the thumbnails that the page has without a script behave as those of the grids. */
function enhanceThumbnails() {
  for (const image of document.querySelectorAll("img[data-index]")) {
    const at = PLACE_OF.get(+image.dataset.index);
    if (at === undefined) continue;
    image.dataset.image = at;
    image.setAttribute("role", "button");
    image.tabIndex = -1;
    mark(image);
  }
  for (const node of document.querySelectorAll(".thumbs")) firstStop(node);
  for (const row of document.querySelectorAll("li[data-index]")) {
    const at = PLACE_OF.get(+row.dataset.index);
    if (at !== undefined) row.prepend(tile(at));
  }
  for (const list of document.querySelectorAll("ul.grid")) firstStop(list);
}

// ---------------------------------------------------------------- two groups side by side

function comparePair(a, b) {
  $("pair-a").value = a;
  $("pair-b").value = b;
  pair();
  $("pair").scrollIntoView();
}

function pair() {
  const groups = [+$("pair-a").value, +$("pair-b").value];
  const column = (k, other) => {
    const members = membersOf(k);
    const secondIsOther = (i) => level === "cluster" && DATA.top > 1 && A.candidates[i * DATA.top + 1] === other;
    const between = members.filter(secondIsOther).sort(byMargin);
    return el("div", {}, el("h3", {}, nameOf(k)), el("p", { class: "muted" }, plural(members.length, "image")),
      grid(members.slice(0, 24), `Typical of ${nameOf(k)}`),
      el("h4", {}, `Nearest ${nameOf(other)} (${between.length})`),
      grid(between.slice(0, 24), `Of ${nameOf(k)}, nearest ${nameOf(other)}`));
  };
  $("pair-columns").replaceChildren(column(groups[0], groups[1]), column(groups[1], groups[0]));
}

function buildPair() {
  $("pair-menus").append(el("label", {}, "Left ", el("select", { id: "pair-a", onchange: pair })),
    el("label", {}, "Right ", el("select", { id: "pair-b", onchange: pair })), button("Show side by side", pair));
}

// ---------------------------------------------------------------- corrections

function download() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(edits(), null, 1) + "\n"], { type: "application/json" }));
  el("a", { href: url, download: "edits.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function buildCorrections() {
  $("corrections-tools").append(button("Download edits.json", download, { id: "download" }),
    button("Copy the command", () => copy($("apply-command").textContent)), el("span", { id: "kept", class: "note" }));
}

function refresh() {
  $("undo").disabled = done.length === 0;
  $("redo").disabled = undone.length === 0;
  $("count-link").textContent = plural(done.length, "correction");
  $("download").disabled = done.length === 0;
  $("corrections-list").replaceChildren(...(done.length ? done.map((o, at) => {
    const text = KINDS[o.kind][1](o);
    return el("li", {}, el("span", {}, text), button("Undo", () => undo(at), { "aria-label": "Undo: " + text }));
  }) : [el("li", { class: "muted" }, "None yet.")]));
  for (const heading of document.querySelectorAll("[data-name-of]")) heading.textContent = nameOf(+heading.dataset.nameOf, "cluster");
  for (const note of document.querySelectorAll("[data-pending]")) note.textContent = pending(+note.dataset.pending);
  for (const menu of document.querySelectorAll(".clusters-menu")) {
    for (const option of menu.options) option.textContent = nameOf(+option.value, "cluster");
  }
  for (const node of document.querySelectorAll("[data-image]")) mark(node);
  fillGroupMenus();
  drawSoon();
}

/** What becomes of a cluster when the corrections are applied. */
function pending(k) {
  const merged = changes.merge.find((group) => group.includes(k));
  const gains = [...changes.moved.values()].filter((to) => to === k).length;
  return [merged && "becomes one with " + merged.filter((other) => other !== k).join(", "),
    changes.split.has(k) && `is split into ${changes.split.get(k)}`, gains && `gains ${plural(gains, "image")}`].filter(Boolean).join("; ");
}

// ---------------------------------------------------------------- start

function start() {
  document.documentElement.classList.add("tool");
  buildFind();
  buildSelection();
  buildPair();
  buildCorrections();
  buildMap();
  enhanceThumbnails();
  for (const k of range(DATA.clusters)) enhanceGroup(k);
  for (const link of document.querySelectorAll("a[data-look]")) {
    link.onclick = (event) => {
      event.preventDefault();
      lookAt(link.dataset.look);
    };
  }
  $("panel").addEventListener("close", () => opener?.focus());
  document.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z" || event.target.matches("input")) return;
    event.preventDefault();
    event.shiftKey ? redo() : undo();
  });
  selectionChanged();
  refresh();
  document.documentElement.dataset.ready = "yes";
}

start();
