"use strict";
// page.parts.js follows in the same script.
// The labels of a tile are "atoms": fine groups where there is a tree, else groups of the mask. Any number of groups is
// a lookup from atoms to groups, so moving the slider decodes nothing. Text from outside only ever becomes text nodes.
const { page, tiles } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const NO_DATA = 255;
const tree = page.tree;
const most = tree ? tree.parents.length + 1 : page.groups;
const key = (atoms) => atoms.join();
// names, colours and merges belong to sets of fine groups, so they hold at every cut that has such a group
const state = {
  n: Math.min(page.groups, most), mode: "both", off: new Set(), search: "", sort: "order", group: 0, version: 0, dirty: false, focus: "", stamp: "",
  names: new Map(page.naming.names.map(([atoms, name]) => [key(atoms), name])),
  colours: new Map(page.naming.colours.map(([atoms, colour]) => [key(atoms), colour])),
  merges: page.naming.merges,
};

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// groups

function climb(group, n) {
  while (group >= n) group = tree.parents[group - 1][0];
  return group;
}
let cached = { version: -1 };
/** A cut, by default the one in use: the group of every atom before merging, the group that each group is merged into,
 *  and the atoms of every group after merging. */
function cut(n = state.n) {
  if (cached.version !== state.version) cached = { version: state.version };
  if (cached[n]) return cached[n];
  const finest = tree ? tree.finest : Array.from({ length: page.groups }, (_, k) => k);
  const base = finest.map((group) => (tree ? climb(group, n) : group)), atoms = new Map();
  base.forEach((group, atom) => atoms.set(group, [...(atoms.get(group) ?? []), atom]));
  const into = Uint8Array.from({ length: 256 }, (_, k) => k), merges = [];
  for (const whole of state.merges.map((list) => new Set(list))) {
    const inside = [...atoms.keys()].filter((group) => atoms.get(group).every((atom) => whole.has(atom))).sort((a, b) => a - b);
    if (inside.length < 2 || inside.reduce((sum, group) => sum + atoms.get(group).length, 0) !== whole.size) continue;
    merges.push(inside);
    for (const group of inside) into[group] = inside[0];
  }
  const units = new Map();
  for (const [group, list] of atoms) units.set(into[group], [...(units.get(into[group]) ?? []), ...list].sort((a, b) => a - b));
  return (cached[n] = { base, into, merges: merges.sort((a, b) => a[0] - b[0]), units });
}
const merged = (group) => cut().into[group];
/** Whether the labels of the mask itself are shown: those of a trained head, at its own number of groups. */
const usesOwn = () => page.planes === 2 && state.n === page.own_groups && page.own_merge.every((list) => list.every((group) => merged(group) === merged(list[0])));
/** The group of every atom, or of every label of the mask where a trained head made it. */
function lookup(own = usesOwn()) {
  const { base, into } = cut();
  if (!tree || own) return into;
  const table = new Uint8Array(256).fill(NO_DATA);
  base.forEach((group, atom) => { table[atom] = into[group]; });
  return table;
}
const partsOf = (tile) => (usesOwn() && tile.own ? tile.own : tile.parts);
/** [group, share] of an image, largest first. */
function sharesOf(tile, table) {
  const parts = partsOf(tile), shares = new Map();
  for (let i = 0; i + 1 < parts.length; i += 2) {
    const group = table[parts[i]];
    shares.set(group, (shares.get(group) ?? 0) + parts[i + 1] / 1e4);
  }
  return [...shares].sort((a, b) => b[1] - a[1]);
}
/** The mean share of every group over the tiles, by its number. */
function meanShares(table) {
  const sums = new Float64Array(256);
  for (const tile of tiles) {
    const parts = partsOf(tile);
    for (let i = 0; i + 1 < parts.length; i += 2) sums[table[parts[i]]] += parts[i + 1];
  }
  return sums.map((sum) => sum / 1e4 / Math.max(1, tiles.length));
}
/** The share of every group of the area of all training images, by its number; null where nobody measured it. */
function areaShares(own = state.n === page.groups && page.shares) {
  if (page.kind !== "run" || !(own || tree)) return null;
  const sums = new Float64Array(256), { into, base } = cut();
  if (own) own.forEach((share, group) => { sums[into[group]] += share; });
  else base.forEach((group, atom) => { sums[into[group]] += tree.shares[atom]; });
  return sums;
}
const keyOf = (group, at = cut()) => key(at.units.get(group) ?? []);
const nameOf = (group, at = cut()) => state.names.get(keyOf(group, at)) || `group ${group}`;
const colourOf = (group) => state.colours.get(keyOf(group)) || page.colours[group % page.colours.length];
/** A name in a text of another direction. */
const bdi = (text) => h("bdi", {}, text);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1\u00a0%" : `${(100 * share).toFixed(1)}\u00a0%`);
/** How far an image's mix of groups lies from that of all images, in nats (Kullback-Leibler). */
function unusual(tile, table, mean) {
  return sharesOf(tile, table).reduce((sum, [group, share]) => sum + (share > 0 ? share * Math.log(share / Math.max(mean[group], 1e-6)) : 0), 0);
}

// painting

const decoded = new WeakMap();
async function labelsOf(tile) {
  if (!decoded.has(tile)) {
    decoded.set(tile, (async () => {
      const bytes = Uint8Array.from(atob(tile.labels), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      const all = new Uint8Array(await new Response(stream).arrayBuffer());
      const size = tile.shape[0] * tile.shape[1];
      if (all.length !== size * page.planes) throw new Error(`${tile.name}: ${all.length} labels`);
      return Array.from({ length: page.planes }, (_, k) => all.subarray(k * size, (k + 1) * size));
    })());
  }
  return decoded.get(tile);
}
async function plane(tile) {
  const planes = await labelsOf(tile);
  return usesOwn() ? planes[0] : planes[planes.length - 1];
}
function rgba(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return new Uint32Array(new Uint8ClampedArray([r, g, b, alpha]).buffer)[0];
}
/** The group of every label of a tile, and the colours of every group inside and at its border. */
let brush = null;
function mix() {
  const table = lookup(), fill = new Uint32Array(256), line = new Uint32Array(256);
  for (const group of cut().units.keys()) {
    if (state.off.has(group)) continue;
    fill[group] = state.mode === "outline" ? 0 : rgba(colourOf(group), state.mode === "both" ? 190 : 255);
    line[group] = state.mode === "fill" ? fill[group] : rgba(colourOf(group), 255);
  }
  return { table, fill, line };
}
async function paint(canvas, tile) {
  let atoms;
  try { atoms = await plane(tile); } catch (error) { notice(`The labels of ${tile.name} cannot be read.`); return; }
  const [height, width] = tile.shape;
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const { table, fill, line } = (brush ??= mix());
  const image = new ImageData(width, height), out = new Uint32Array(image.data.buffer);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const group = table[atoms[i]];
      const border = (x && table[atoms[i - 1]] !== group) || (y && table[atoms[i - width]] !== group)
        || (x + 1 < width && table[atoms[i + 1]] !== group) || (y + 1 < height && table[atoms[i + width]] !== group);
      out[i] = border ? line[group] : fill[group];
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.dataset.groups = state.n;
}
function fillPicture(picture, tile) {
  const image = h("img", { alt: "", decoding: "async" });
  image.src = `data:image/${tile.picture.startsWith("/9j/") ? "jpeg" : "webp"};base64,${tile.picture}`;
  const canvas = h("canvas", { "aria-hidden": "true" });
  picture.replaceChildren(image, canvas);
  return paint(canvas, tile);
}

// tiles

const BATCH = 300; // tiles that the page adds as one scrolls to its end
const items = new Map(); // tile -> its list item
const shown = new Set(); // tiles near the window
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const tile = target.tile, picture = target.querySelector(".picture");
    if (isIntersecting && tile === order[listed - 1]) extend();
    if (isIntersecting && !shown.has(tile)) { shown.add(tile); fillPicture(picture, tile); }
    else if (!isIntersecting && shown.delete(tile)) picture.replaceChildren();
  }
}, { rootMargin: "600px" });
function itemOf(tile) {
  if (!items.has(tile)) {
    items.set(tile, makeItem(tile));
    watcher.observe(items.get(tile));
  }
  return items.get(tile);
}
function makeItem(tile) {
  const ratio = tile.size[0] / Math.max(1, tile.size[1]), box = Math.min(2, Math.max(0.75, ratio)); // a panorama has a box of 2 to 1
  const picture = h("span", { className: "picture", style: { width: `${100 * Math.min(1, ratio / box)}%`, aspectRatio: ratio } });
  const open = h("button", { type: "button", onclick: () => view(tile) }, h("span", { className: "frame", style: { aspectRatio: box } }, picture), h("span", { className: "caption", title: tile.name }, h("bdi", { dir: "ltr" }, tile.name), h("span", {})));
  open.setAttribute("aria-label", `${tile.name}, open`);
  const item = h("li", {}, open);
  item.tile = tile;
  return item;
}
/** Add tiles up to a number of them to the list. */
function extend(count = listed + BATCH) {
  const more = order.slice(listed, count).map(itemOf);
  if (note) for (const item of more) item.querySelector(".caption").lastElementChild.textContent = note(item.tile);
  listed += more.length;
  $("tiles").append(...more);
}
function focusTile(place) {
  if (place < 0 || place >= order.length) return;
  if (place >= listed) extend(place + BATCH);
  itemOf(order[place]).querySelector("button").focus();
}
let order = tiles, listed = 0, note = null; // what is shown, how many of it are in the list, and a caption's figure
function arrange() {
  const table = lookup(), mean = meanShares(table), shareOf = (tile) => new Map(sharesOf(tile, table)).get(state.group) ?? 0;
  const value = { uncertain: (tile) => tile.certainty ?? 2, unusual: (tile) => -unusual(tile, table, mean), group: (tile) => -shareOf(tile) }[state.sort];
  const found = tiles.filter((tile) => tile.name.toLowerCase().includes(state.search));
  order = value ? found.map((tile) => [value(tile), tile]).sort((a, b) => a[0] - b[0]).map(([, tile]) => tile) : found;
  note = { uncertain: (tile) => tile.certainty?.toFixed(2) ?? "", unusual: () => "", group: (tile) => percent(shareOf(tile)), order: () => "" }[state.sort];
  listed = 0;
  $("tiles").replaceChildren();
  extend();
  const of = page.tiles_left_out ? `${tiles.length} of ${plural(page.images, "image")}; the others are left out ${page.left_out}` : plural(tiles.length, "image");
  const small = tiles.length > 900 ? "; pictures are small, to bound the size of this page" : "";
  $("count").textContent = state.search ? `${order.length} of ${plural(tiles.length, "image")} found` : of + small;
}
function arrowKeys(event) {
  const item = event.target.closest("li");
  const columns = getComputedStyle($("tiles")).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step === undefined || !item) return;
  event.preventDefault();
  focusTile(order.indexOf(item.tile) + step);
}

// one image, large

let viewed = null;
function view(tile) {
  viewed = tile;
  const [width, height] = tile.size, stage = $("stage");
  stage.style.setProperty("--ratio", width / Math.max(1, height));
  stage.setAttribute("aria-label", `${tile.name} and its groups`);
  $("viewer-name").textContent = $("viewer-name").title = tile.name;
  $("viewer-place").textContent = `${order.indexOf(tile) + 1} of ${order.length} · ${width} × ${height}` + (tile.certainty === null ? "" : ` · certainty ${tile.certainty.toFixed(2)} of 1`);
  $("readout").textContent = "Point at the image or tap it: its group shows here.";
  fillPicture(stage, tile);
  viewShares();
  if (!$("viewer").open) $("viewer").showModal();
  $("viewer").scrollTop = 0;
}
function viewShares() {
  renew($("viewer-shares"), sharesOf(viewed, lookup()).filter(([group]) => group !== NO_DATA).map(([group, share]) => {
    const chip = h("button", { type: "button", onclick: () => toggle(group) }, h("i", { style: { background: colourOf(group) } }), bdi(nameOf(group)), ` ${percent(share)}`);
    chip.setAttribute("aria-pressed", String(!state.off.has(group)));
    chip.dataset.key = `chip-${group}`;
    return h("li", {}, chip);
  }));
}
function turn(step) {
  const at = order.indexOf(viewed) + step;
  if (at >= 0 && at < order.length) view(order[at]);
}
async function readout(event) {
  const box = $("stage").getBoundingClientRect(), [height, width] = viewed.shape, tile = viewed;
  const x = Math.floor(((event.clientX - box.left) / box.width) * width), y = Math.floor(((event.clientY - box.top) / box.height) * height);
  if (x < 0 || y < 0 || x >= width || y >= height) return;
  const group = lookup()[(await plane(tile))[y * width + x]];
  if (tile === viewed) $("readout").replaceChildren(group === NO_DATA ? "no data" : bdi(nameOf(group)));
}
function viewerKeys(event) {
  const act = { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1), "+": () => setGroups(state.n + 1), "-": () => setGroups(state.n - 1), " ": () => { $("stage").lastElementChild.hidden = !$("stage").lastElementChild.hidden; } }[event.key];
  if (!act || (event.key === " " && document.activeElement.tagName === "BUTTON")) return;
  event.preventDefault();
  act();
}
