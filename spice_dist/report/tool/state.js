// What the page knows and what the user has changed. The four files of this folder are joined into one script.
"use strict";

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("run-data").textContent);
const TYPES = { i2: Int16Array, i4: Int32Array, f4: Float32Array, u2: Uint16Array };
const MAX_OPERATIONS = 100000;
const KEY = "spice-dist:" + DATA.run;

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

const A = {}; // arrays over the images of the page, which are numbered 0 .. N-1 in the order of DATA.paths
for (const [name, { type, data }] of Object.entries(DATA.arrays)) A[name] = new TYPES[type](bytesOf(data).buffer);
const N = DATA.paths.length;
const PLACE_OF = new Map(Array.from(A.index, (index, image) => [index, image]));
const BY_INDEX = new Set(DATA.by_index); // images whose path may not be what assignments.csv holds

/** Make an element; text is only ever added as text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "onchange" || name === "oninput") node[name] = value;
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const button = (text, onclick, attributes = {}) => el("button", { type: "button", onclick, ...attributes }, text);
const percent = (value) => (100 * value).toFixed(1) + " %";
const plural = (count, word) => count.toLocaleString("en") + " " + word + (count === 1 ? "" : "s");
const range = (count) => Array.from({ length: count }, (_, i) => i);

let silence;

/** Show a message for some seconds; a screen reader reads it. */
function say(text) {
  $("live").textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => ($("live").textContent = ""), 8000);
}

// ---------------------------------------------------------------- groups, at three levels

const LEVELS = { cluster: DATA.clusters, coarse: DATA.levels?.coarse, fine: DATA.levels?.fine };
let level = "cluster";

const groupOf = (image) => A[level][image];

function membersOf(group, by = A[level]) {
  const members = [];
  for (let image = 0; image < N; image++) if (by[image] === group) members.push(image);
  return members;
}

function nameOf(group, at = level) {
  if (at !== "cluster") return (at === "coarse" ? "Coarse group " : "Fine group ") + group;
  const name = changes.names.get(group);
  return name ? `${group} · ${name}` : `Cluster ${group}`;
}

const margin = (image) => A.weights[image * DATA.top] - (DATA.top > 1 ? A.weights[image * DATA.top + 1] : 0);
const byConfidence = (a, b) => A.confidence[a] - A.confidence[b];
const byMargin = (a, b) => margin(a) - margin(b);

// ---------------------------------------------------------------- corrections

const whole = (value, below) => Number.isInteger(value) && value >= 0 && value < below;
const isCluster = (value) => whole(value, DATA.clusters);
const isIndex = (value) => whole(value, DATA.total);
const isList = (value, of, least = 1) => Array.isArray(value) && value.length >= least && value.every(of);
const isPair = (value) => isList(value, isIndex, 2) && value.length === 2 && value[0] !== value[1];
// the joiner of emoji stays; wide and unbroken spaces are spaces
const cleanName = (text) => text.replace(/[\p{C}\p{Z}]/gu, (c) => (c === "\u200d" ? c : " ")).trim().slice(0, 80);

// every kind of operation: what a stored one must be like, and how it is told
const KINDS = {
  name: [(o) => isCluster(o.cluster) && typeof o.name === "string" && o.name !== "" && o.name === cleanName(o.name),
    (o) => `Name cluster ${o.cluster} “${o.name}”`],
  merge: [(o) => isList(o.clusters, isCluster, 2) && new Set(o.clusters).size > 1, (o) => `Merge clusters ${o.clusters.join(" and ")}`],
  split: [(o) => isCluster(o.cluster) && Number.isInteger(o.parts) && o.parts > 1 && o.parts <= 100,
    (o) => `Split cluster ${o.cluster} into ${o.parts}`],
  move: [(o) => isList(o.images, isIndex) && isCluster(o.cluster),
    (o) => `Move ${told(o.images)} to ${nameOf(o.cluster, "cluster")}`],
  outside: [(o) => isList(o.images, isIndex), (o) => `${told(o.images)} belong${o.images.length > 1 ? "" : "s"} to no group`],
  same: [(o) => isPair(o.images), (o) => `Of one group: ${told(o.images)}`],
  different: [(o) => isPair(o.images), (o) => `Of two groups: ${told(o.images)}`],
};

const pathOf = (index) => (PLACE_OF.has(index) ? DATA.paths[PLACE_OF.get(index)] : "image " + index);
const told = (images) => (images.length > 2 ? plural(images.length, "image") : images.map(pathOf).join(" and "));
const valid = (o) => o !== null && typeof o === "object" && Object.hasOwn(KINDS, o.kind) && KINDS[o.kind][0](o);

let done = load(); // operations in their order
let undone = [];
let changes = derive();

/** Read the stored operations; what does not fit this run is left out. */
function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(KEY) || "[]");
    return Array.isArray(stored) ? stored.slice(0, MAX_OPERATIONS).filter(valid) : [];
  } catch {
    return [];
  }
}

function store() {
  try {
    localStorage.setItem(KEY, JSON.stringify(done));
    $("kept").textContent = "Kept in this browser until you clear its data.";
  } catch {
    $("kept").textContent = "This browser keeps nothing for this page: download the corrections before you close it.";
  }
}

/** Sum all operations up; of two about the same thing the later one holds. */
function derive() {
  const sum = { names: new Map(Object.entries(DATA.names).map(([k, name]) => [+k, name])), merge: [], split: new Map() };
  Object.assign(sum, { given: new Map(), moved: new Map(), outside: new Set(), pairs: new Map() });
  for (const o of done) {
    if (o.kind === "name") sum.names.set(o.cluster, o.name), sum.given.set(o.cluster, o.name);
    else if (o.kind === "merge") sum.merge = union(sum.merge, o.clusters);
    else if (o.kind === "split") sum.split.set(o.cluster, o.parts);
    else if (o.kind === "move") for (const i of o.images) sum.moved.set(i, o.cluster), sum.outside.delete(i);
    else if (o.kind === "outside") for (const i of o.images) sum.outside.add(i), sum.moved.delete(i);
    else sum.pairs.set([...o.images].sort((a, b) => a - b).join(), o.kind);
  }
  return sum;
}

function union(groups, clusters) {
  const meeting = groups.filter((group) => group.some((k) => clusters.includes(k)));
  const all = [...new Set([...meeting.flat(), ...clusters])].sort((a, b) => a - b);
  return [...groups.filter((group) => !meeting.includes(group)), all];
}

/** Say why an operation cannot be added, or return an empty text. */
function refusal(o) {
  const divides = o.kind === "split" || o.kind === "merge";
  if (divides && DATA.outside !== null && (o.clusters ?? [o.cluster]).includes(DATA.outside)) {
    return `Cluster ${DATA.outside} holds the images that belong to no group: move them one by one.`;
  }
  const merged = (k) => changes.merge.some((group) => group.includes(k));
  if (o.kind === "split" && merged(o.cluster)) return `Cluster ${o.cluster} is being merged: undo that first.`;
  const split = o.kind === "merge" ? o.clusters.find((k) => changes.split.has(k)) : undefined;
  if (split !== undefined) return `Cluster ${split} is being split: undo that first.`;
  if (o.kind === "split") {
    const size = DATA.sizes[o.cluster];
    if (2 * o.parts > size) return `Cluster ${o.cluster} has ${plural(size, "image")}: give fewer parts, of two or more each.`;
    if (!valid(o)) return "Give a number of parts from 2 to 100.";
  }
  if (o.kind === "name") {
    if (/^\p{Nd}+$/u.test(o.name)) return `“${o.name}” would be taken for a number: add a letter.`;
    if (o.name.toLowerCase() === "outside" && o.cluster !== DATA.outside) return `“${o.name}” is the name of images that belong to no group: give another name.`;
    const together = changes.merge.find((group) => group.includes(o.cluster)) ?? [o.cluster];
    const owner = [...changes.names].find(([k, name]) => name === o.name && !together.includes(k));
    if (owner) return `“${o.name}” is the name of cluster ${owner[0]}: merge the two, or give another name.`;
  }
  return valid(o) ? "" : "This is no correction that can be made here.";
}

function change(operation) {
  const why = refusal(operation);
  if (why) return say(why), false;
  done.push(operation);
  undone = [];
  changed(KINDS[operation.kind][1](operation));
  return true;
}

function undo(at = done.length - 1) {
  if (!done[at]) return;
  const [operation] = done.splice(at, 1);
  undone.push(operation);
  changed("Undone: " + KINDS[operation.kind][1](operation));
}

function redo() {
  const operation = undone.pop();
  if (!operation) return;
  done.push(operation);
  changed(KINDS[operation.kind][1](operation));
}

function changed(text) {
  changes = derive();
  store();
  refresh();
  say(text);
}

/** The new names; of clusters that are merged the last one. */
function namesGiven() {
  const names = new Map(changes.given);
  for (const group of changes.merge) {
    const last = done.findLast((o) => o.kind === "name" && group.includes(o.cluster));
    for (const k of group) if (last && k !== last.cluster) names.delete(k);
  }
  return names;
}

/** The content of edits.json; an image is named by its path where that is surely the one of assignments.csv. */
function edits() {
  const reference = (index) => {
    const image = PLACE_OF.get(index);
    return image === undefined || BY_INDEX.has(image) ? index : DATA.paths[image];
  };
  const named = (key) => key.split(",").map((index) => reference(+index));
  const pairs = (kind) => [...changes.pairs].filter(([, k]) => k === kind).map(([key]) => named(key));
  const all = {
    names: Object.fromEntries(namesGiven()), merge: changes.merge, split: Object.fromEntries(changes.split),
    move: [...changes.moved].map(([index, cluster]) => [reference(index), cluster]),
    outside: [...changes.outside].map(reference), same: pairs("same"), different: pairs("different"),
  };
  const held = Object.entries(all).filter(([, value]) => Object.keys(value).length > 0);
  return { version: 1, run: DATA.run, ...Object.fromEntries(held) };
}
