"use strict";
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
  n: Math.min(page.groups, most), mode: "both", off: new Set(), search: "", sort: "order", group: 0, version: 0, dirty: false,
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
let cached = { n: 0, version: -1 };
/** The cut in use: the group of every atom before merging, the group that each group is merged into, and the atoms of
 *  every group after merging. */
function cut() {
  if (cached.n === state.n && cached.version === state.version) return cached;
  const finest = tree ? tree.finest : Array.from({ length: page.groups }, (_, k) => k);
  const base = finest.map((group) => (tree ? climb(group, state.n) : group)), atoms = new Map();
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
  cached = { n: state.n, version: state.version, base, into, merges: merges.sort((a, b) => a[0] - b[0]), units };
  return cached;
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
/** [group, share] of an image, largest first. */
function sharesOf(tile, table) {
  const parts = usesOwn() && tile.own ? tile.own : tile.parts;
  const shares = new Map();
  for (let i = 0; i + 1 < parts.length; i += 2) {
    const group = table[parts[i]];
    shares.set(group, (shares.get(group) ?? 0) + parts[i + 1] / 1e4);
  }
  return [...shares].sort((a, b) => b[1] - a[1]);
}
function meanShares(table) {
  const mean = new Map();
  for (const tile of tiles) for (const [group, share] of sharesOf(tile, table)) mean.set(group, (mean.get(group) ?? 0) + share);
  for (const [group, share] of mean) mean.set(group, share / tiles.length);
  for (const group of cut().units.keys()) if (!mean.has(group)) mean.set(group, 0);
  return mean;
}
const keyOf = (group) => key(cut().units.get(group) ?? []);
const nameOf = (group) => state.names.get(keyOf(group)) || `group ${group}`;
const colourOf = (group) => state.colours.get(keyOf(group)) || page.colours[group % page.colours.length];
const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
/** How far an image's mix of groups lies from that of all images, in nats (Kullback-Leibler). */
function unusual(tile, table, mean) {
  return sharesOf(tile, table).reduce((sum, [group, share]) => sum + (share > 0 ? share * Math.log(share / Math.max(mean.get(group) ?? 0, 1e-6)) : 0), 0);
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
async function paint(canvas, tile) {
  let atoms;
  try { atoms = await plane(tile); } catch (error) { notice(`The labels of ${tile.name} cannot be read.`); return; }
  const [height, width] = tile.shape;
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const table = lookup(), fill = new Uint32Array(256), line = new Uint32Array(256);
  for (let group = 0; group < NO_DATA; group++) {
    if (state.off.has(group)) continue;
    fill[group] = state.mode === "outline" ? 0 : rgba(colourOf(group), state.mode === "both" ? 190 : 255);
    line[group] = state.mode === "fill" ? fill[group] : rgba(colourOf(group), 255);
  }
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
function fillFrame(frame, tile) {
  const image = h("img", { alt: "", decoding: "async" });
  image.src = `data:image/${tile.picture.startsWith("/9j/") ? "jpeg" : "webp"};base64,${tile.picture}`;
  const canvas = h("canvas", { "aria-hidden": "true" });
  frame.replaceChildren(image, canvas);
  return paint(canvas, tile);
}

// tiles

const items = new Map(); // tile -> its list item
const shown = new Set(); // tiles near the window
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const tile = target.tile, frame = target.querySelector(".frame");
    if (isIntersecting && !shown.has(tile)) { shown.add(tile); fillFrame(frame, tile); }
    else if (!isIntersecting && shown.delete(tile)) frame.replaceChildren();
  }
}, { rootMargin: "600px" });
function makeItem(tile) {
  const [width, height] = tile.size;
  const frame = h("span", { className: "frame", style: { aspectRatio: `${width} / ${Math.max(1, height)}` } });
  const open = h("button", { type: "button", onclick: () => view(tile) }, frame, h("span", { className: "caption", title: tile.name }, tile.name));
  open.setAttribute("aria-label", `${tile.name}, open`);
  const item = h("li", {}, open);
  item.tile = tile;
  return item;
}
let order = tiles;
function arrange() {
  const table = lookup(), mean = meanShares(table);
  const values = {
    order: null,
    uncertain: (tile) => tile.certainty ?? 2,
    unusual: (tile) => -unusual(tile, table, mean),
    group: (tile) => -(new Map(sharesOf(tile, table)).get(state.group) ?? 0),
  };
  const value = values[state.sort];
  const found = tiles.filter((tile) => tile.name.toLowerCase().includes(state.search));
  order = value ? found.map((tile) => [value(tile), tile]).sort((a, b) => a[0] - b[0]).map(([, tile]) => tile) : found;
  $("tiles").replaceChildren(...order.map((tile) => items.get(tile)));
  const left = page.tiles_left_out ? `; ${page.tiles_left_out} more images are left out, ${page.left_out}` : "";
  const small = tiles.length > 900 ? "; pictures are small, to bound the size of this page" : "";
  $("count").textContent = `${order.length} of ${page.images} images${left}${small}`;
}
function arrowKeys(event) {
  const buttons = [...$("tiles").querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
  if (at < 0) return;
  const row = buttons[at].getBoundingClientRect().top;
  const columns = Math.max(1, buttons.filter((button) => Math.abs(button.getBoundingClientRect().top - row) < 2).length);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  buttons[Math.min(buttons.length - 1, Math.max(0, at + step))].focus();
}

// one image, large

let viewed = null;
function view(tile) {
  viewed = tile;
  const [width, height] = tile.size, wide = Math.min(innerWidth * 0.93 - 30, (innerHeight * 0.72 * width) / Math.max(1, height));
  const stage = $("stage");
  stage.className = "stage frame";
  Object.assign(stage.style, { width: `${Math.max(120, wide)}px`, aspectRatio: `${width} / ${Math.max(1, height)}` });
  $("viewer-name").textContent = tile.name;
  $("viewer-place").textContent = `${order.indexOf(tile) + 1} of ${order.length} · ${width} × ${height}` + (tile.certainty === null ? "" : ` · certainty ${tile.certainty.toFixed(2)} of 1`);
  $("readout").textContent = "";
  fillFrame(stage, tile);
  viewShares();
  if (!$("viewer").open) $("viewer").showModal();
}
function viewShares() {
  $("viewer-shares").replaceChildren(...sharesOf(viewed, lookup()).map(([group, share]) => h("li", {}, h("i", { style: { background: colourOf(group) } }), `${nameOf(group)} ${percent(share)}`)));
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
  if (tile === viewed) $("readout").textContent = group === NO_DATA ? "no data" : nameOf(group);
}
function viewerKeys(event) {
  const act = { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1), "+": () => setGroups(state.n + 1), "-": () => setGroups(state.n - 1), " ": () => { $("stage").lastElementChild.hidden = !$("stage").lastElementChild.hidden; } }[event.key];
  if (!act || (event.key === " " && document.activeElement.tagName === "BUTTON")) return;
  event.preventDefault();
  act();
}

// the list of groups

function patchOf(atom) {
  const { side, columns, rows } = tree.patches, shown = 28, node = h("span", { className: "patch" });
  Object.assign(node.style, {
    backgroundImage: `url("data:image/webp;base64,${tree.patches.picture}")`,
    backgroundSize: `${columns * shown}px ${rows * shown}px`,
    backgroundPosition: `${-(atom % columns) * shown}px ${-Math.floor(atom / columns) * shown}px`,
  });
  return side ? node : null;
}
const patchNodes = tree?.patches ? tree.finest.map((_, atom) => atom) : [];
function patchesOf(test, count) {
  const atoms = patchNodes.filter(test).sort((a, b) => tree.shares[b] - tree.shares[a]).slice(0, count);
  return h("span", { className: "patches", "aria-hidden": "true" }, ...atoms.map(patchOf));
}
function listGroups() {
  const mean = [...meanShares(lookup())].filter(([group]) => group !== NO_DATA).sort((a, b) => b[1] - a[1]);
  const finest = tree ? lookup(false) : null;
  $("group-list").replaceChildren(...mean.map(([group, share]) => {
    const on = !state.off.has(group);
    const swatch = h("button", { type: "button", className: "swatch", style: { background: colourOf(group) }, onclick: () => { toggle(group); } }, String(group));
    swatch.setAttribute("aria-pressed", String(on));
    swatch.setAttribute("aria-label", `Show ${nameOf(group)}`);
    const name = h("input", { type: "text", value: state.names.get(keyOf(group)) ?? "", placeholder: `group ${group}`, maxLength: 60, onchange: (event) => rename(group, event.target.value) });
    name.setAttribute("aria-label", `Name of group ${group}`);
    const into = h("select", { onchange: (event) => merge(group, Number(event.target.value)) }, h("option", { value: "" }, "merge with…"), ...mean.filter(([other]) => other !== group).map(([other]) => h("option", { value: other }, nameOf(other))));
    into.setAttribute("aria-label", `Merge ${nameOf(group)} with`);
    const find = h("button", { type: "button", onclick: () => { state.group = group; state.sort = "group"; $("sort").value = "group"; arrange(); } }, "images");
    find.setAttribute("aria-label", `Images with most of ${nameOf(group)} first`);
    const parts = (cut().merges.find((list) => list[0] === group) ?? []).slice(1);
    const under = h("span", { className: "under" }, finest ? patchesOf((atom) => finest[atom] === group, 6) : null, mean.length > 1 ? into : null, find, parts.length ? h("span", { className: "quiet" }, `with ${parts.join(", ")}`) : null);
    return h("li", {}, swatch, name, h("span", { className: "share" }, percent(share)), under);
  }));
  $("unmerge").hidden = !cut().merges.length;
}
function toggle(group) {
  if (!state.off.delete(group)) state.off.add(group);
  repaint();
}
function rename(group, text) {
  const name = text.trim().replace(/\s+/g, " "), other = [...cut().units.keys()].find((k) => k !== group && state.names.get(keyOf(k)) === name);
  if (name && other !== undefined) notice(`Group ${other} is called ${name} already: merge the two, or name them apart.`);
  else if (name) state.names.set(keyOf(group), name);
  else state.names.delete(keyOf(group));
  changed();
}
function merge(...groups) {
  const [root, gone] = groups.sort((a, b) => a - b), { units } = cut();
  const name = state.names.get(keyOf(root)) ?? state.names.get(keyOf(gone)), colour = colourOf(root);
  const whole = [...units.get(root), ...units.get(gone)].sort((a, b) => a - b);
  state.merges = [...state.merges.filter((list) => !list.some((atom) => whole.includes(atom))), whole];
  if (name) state.names.set(key(whole), name);
  if (colour !== page.colours[root]) state.colours.set(key(whole), colour);
  changed();
}
function unmerge() {
  const visible = new Set(cut().merges.map((list) => keyOf(list[0])));
  state.merges = state.merges.filter((list) => !visible.has(key(list)));
  changed();
}
function changed() {
  state.version++;
  state.dirty = true;
  $("names-panel").open = true;
  repaint();
}

// names.json

function namesFile() {
  const of = (map) => Object.fromEntries([...cut().units.keys()].sort((a, b) => a - b).filter((group) => map.has(keyOf(group))).map((group) => [String(group), map.get(keyOf(group))]));
  return { groups: state.n, ...(page.least_share ? { least_share: page.least_share } : {}), names: of(state.names), colours: of(state.colours), merge: cut().merges };
}
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
function commands() {
  const run = page.run === null ? "RUN" : quoted(page.run), lines = [];
  if (state.n !== page.groups) lines.push(`smooseg choose --run ${run} --groups ${state.n}` + (page.least_share ? ` --share ${page.least_share}` : ""));
  lines.push(`smooseg name --run ${run} --file names.json`);
  return lines.join("\n");
}
function download() {
  const text = JSON.stringify(namesFile(), null, 2) + "\n";
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: "names.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  state.dirty = false;
}
async function copy() {
  try { await navigator.clipboard.writeText(commands()); $("copy").textContent = "copied"; } catch (error) { getSelection().selectAllChildren($("command")); }
  setTimeout(() => { $("copy").textContent = "copy command"; }, 1500);
}

// the tree

const SVG = "http://www.w3.org/2000/svg", ROW = 36, BRANCHES = 420;
function svg(tag, props, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(props)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function drawTree() {
  if (!tree || $("tree").hidden) return;
  const count = Math.min(most, Math.max(state.n, Math.min(32, 2 * state.n + 6)));
  const splits = tree.parents.slice(0, count - 1).map(([parent, height], k) => ({ number: k + 1, parent, height }));
  const rows = [0];
  for (const { parent, number } of splits) rows.splice(rows.indexOf(parent) + 1, 0, number);
  const heights = splits.map((split) => split.height), low = Math.min(...heights), high = Math.max(...heights);
  const x = (height) => 20 + ((height - low) / Math.max(high - low, 1e-9)) * (BRANCHES - 50);
  const at = new Map(rows.map((number, row) => [number, (row + 0.5) * ROW])), end = new Map(rows.map((number) => [number, BRANCHES]));
  const shape = svg("svg", { width: BRANCHES, height: rows.length * ROW, role: "img", "aria-label": `Tree of ${count} groups, cut at ${state.n}` });
  const mixed = new Set(), group = (number) => merged(climb(number, state.n)), dots = [];
  const branch = (number) => (mixed.has(number) ? "var(--quiet)" : colourOf(group(number)));
  const stroke = (x1, y1, x2, y2, colour) => shape.append(svg("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": 3, "stroke-linecap": "round" }));
  for (const { number, parent, height } of [...splits].reverse()) {
    const here = x(height), above = number < state.n;
    for (const side of [parent, number]) stroke(here, at.get(side), end.get(side), at.get(side), branch(side));
    stroke(here, at.get(parent), here, at.get(number), above ? "var(--quiet)" : colourOf(group(parent)));
    const dot = svg("circle", { cx: here, cy: (at.get(parent) + at.get(number)) / 2, r: 6, fill: above ? "var(--ink)" : "var(--paper)", stroke: "var(--ink)", "stroke-width": 1.5 }, svg("title", {}, document.createTextNode(`${above ? "merge to" : "split into"} ${above ? number : number + 1} groups`)));
    dot.addEventListener("click", () => setGroups(above ? number : number + 1));
    dots.push(dot);
    at.set(parent, (at.get(parent) + at.get(number)) / 2);
    end.set(parent, here);
    if (above || mixed.has(number)) mixed.add(parent);
  }
  stroke(2, at.get(0), end.get(0), at.get(0), branch(0));
  const edges = [low, ...heights, high], cut = state.n === 1 ? 10 : (x(edges[state.n - 1]) + x(edges[Math.min(state.n, edges.length - 1)])) / 2;
  shape.append(svg("line", { x1: cut, y1: 0, x2: cut, y2: rows.length * ROW, stroke: "var(--ink)", "stroke-dasharray": "5 5" }), ...dots);
  const finest = tree.finest.map((k) => climb(k, count)), mean = meanShares(lookup()), seen = new Set();
  const list = rows.map((number) => {
    const first = !seen.has(group(number)), share = tree.finest.reduce((sum, _, atom) => sum + (finest[atom] === number ? tree.shares[atom] : 0), 0);
    seen.add(group(number));
    return h("div", { className: "tree-row", style: { paddingLeft: `${BRANCHES}px` } }, h("span", { className: "tag", style: { background: colourOf(group(number)) } }), patchesOf((atom) => finest[atom] === number, 8), h("span", { className: "share" }, percent(share)), h("b", {}, first ? `${nameOf(group(number))}: ${percent(mean.get(group(number)) ?? 0)}` : ""));
  });
  $("tree-drawing").replaceChildren(shape, ...list);
}

// other parts

function rowsTable(head, rows, numeric = []) {
  const cell = (tag) => (value, k) => h(tag, numeric.includes(k) ? { className: "number" } : {}, value instanceof Node ? value : String(value));
  return h("div", { className: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ...head.map(cell("th")))), h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map(cell("td")))))));
}
function meter(value) {
  return h("span", { className: "meter", "aria-hidden": "true" }, h("span", { style: { width: `${100 * Math.min(1, Math.max(0, value ?? 0))}%` } }));
}
function drawFigures() {
  const rows = page.figures.map(([name, value, good]) => [name, value.toFixed(3), good]);
  const figures = rows.length ? [h("h2", {}, "Without labels"), h("p", { className: "quiet" }, "Measured by the run on its own images, at the number of groups that it ended with."), rowsTable(["figure", "value", "what is good"], rows, [1])] : [];
  const times = page.times.length ? [h("h2", {}, "Times"), rowsTable(["part", "seconds"], page.times.map(([name, seconds]) => [name, seconds.toFixed(1)]), [1])] : [];
  const skipped = page.skipped.length ? [h("h2", {}, `${page.skipped.length} images that could not be used`), rowsTable(["image", "reason"], page.skipped.slice(0, 500))] : [];
  $("figures").replaceChildren(...figures, ...times, ...skipped);
}
const score = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
function drawScores() {
  const scores = page.scores, part = $("labels");
  if (!scores) return;
  const where = scores.held_out ? "held-out images" : "the training images";
  part.append(h("p", {}, `On ${where}, at ${scores.groups} groups, each matched to one class by the labels (Hungarian): accuracy ${score(scores.accuracy)}, mIoU ${score(scores.miou)}` + (scores.kmeans == null ? "." : `; k-means on the same features has mIoU ${score(scores.kmeans)}.`)));
  part.append(h("h2", {}, "Each class"), rowsTable(["class", "IoU", "", "labelled pixels"], scores.classes.map(([name, pixels, iou]) => [name, score(iou), meter(iou), pixels.toLocaleString("en")]), [1, 3]));
  if (!scores.confusion) return;
  const sums = scores.confusion.map((row) => row.reduce((a, b) => a + b, 0));
  const rows = scores.confusion.map((row, k) => h("tr", {}, h("th", { scope: "row" }, nameOf(k)), ...row.map((count, c) => {
    const share = sums[k] ? count / sums[k] : 0, cell = h("td", { title: `${count.toLocaleString("en")} pixels` }, share >= 0.005 ? `${Math.round(100 * share)} %` : "");
    cell.style.background = `color-mix(in srgb, var(--accent) ${Math.round(70 * share)}%, transparent)`;
    if (scores.matched[k] === scores.classes[c][0]) cell.style.fontWeight = "700";
    return cell;
  }), h("td", {}, String(scores.matched[k] ?? "–"))));
  const head = h("tr", {}, h("th", {}, "group"), ...scores.classes.map(([name]) => h("th", { scope: "col" }, name)), h("th", { scope: "col" }, "matched to"));
  part.append(h("h2", {}, "Where the pixels of each group lie"), h("p", { className: "quiet" }, "A row adds up to 100 %; bold is the class that the group is matched to."), h("div", { className: "scroll" }, h("table", { className: "confusion" }, h("thead", {}, head), h("tbody", {}, ...rows))));
}

// all together

let due = 0, sorting = 0;
function repaint() {
  cancelAnimationFrame(due);
  due = requestAnimationFrame(() => {
    for (const tile of shown) { const canvas = items.get(tile).querySelector("canvas"); if (canvas) paint(canvas, tile); }
    if (viewed && $("viewer").open) { paint($("stage").lastElementChild, viewed); viewShares(); }
    listGroups();
    drawTree();
    $("command").textContent = commands();
  });
}
function setGroups(n) {
  state.n = Math.min(most, Math.max(1, n));
  $("groups").value = state.n;
  $("groups-value").textContent = state.n;
  repaint();
  clearTimeout(sorting); // the order of thousands of images follows once the slider rests
  if (state.sort !== "order" && state.sort !== "uncertain") sorting = setTimeout(arrange, 250);
}
function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
}
function choose(name, focus = false) {
  for (const tab of $("tabs").children) {
    const on = tab.dataset.part === name;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    $(tab.dataset.part).hidden = !on;
    if (on && focus) tab.focus();
  }
  $("bar").hidden = name !== "images" && name !== "tree";
  $("bar").classList.toggle("tree", name === "tree");
  drawTree();
}
function start() {
  if (typeof DecompressionStream === "undefined") notice("This browser is too old to show the labels: it lacks DecompressionStream. Take one of 2023 or later.");
  document.title = $("title").textContent = page.title;
  $("subtitle").textContent = `${page.images} images, ${page.groups} groups, found without labels`;
  $("why").textContent = [page.why, `shares are means over the ${tiles.length} images shown`].filter(Boolean).join("; ");
  const parts = [["images", "Images"], tree && ["tree", "Tree"], (page.figures.length || page.times.length) && ["figures", "Figures"], page.scores && ["labels", "With labels"], page.settings.length && ["settings", "Settings"]].filter(Boolean);
  for (const [part, text] of parts) $("tabs").append(h("button", { type: "button", id: `tab-${part}`, role: "tab", onclick: () => choose(part) }, text)), Object.assign($("tabs").lastElementChild.dataset, { part }), $("tabs").lastElementChild.setAttribute("aria-controls", part);
  $("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], names = parts.map(([part]) => part);
    if (step) choose(names[(names.indexOf(event.target.dataset.part) + step + names.length) % names.length], true);
  });
  const sorts = [["order", "as given"], tiles.some((tile) => tile.certainty !== null) && ["uncertain", "least certain first"], ["unusual", "most unusual first"], ["group", "most of one group first"]].filter(Boolean);
  $("sort").append(...sorts.map(([value, text]) => h("option", { value }, text)));
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; arrange(); });
  $("search").addEventListener("input", () => { state.search = $("search").value.toLowerCase(); arrange(); });
  $("groups-control").hidden = most === 1 || !tree;
  $("groups").max = most;
  $("groups").addEventListener("input", () => setGroups(Number($("groups").value)));
  const opacity = () => { document.documentElement.style.setProperty("--overlay", $("opacity").value / 100); $("opacity-value").textContent = `${$("opacity").value} %`; };
  $("opacity").addEventListener("input", opacity);
  $("mode").addEventListener("change", (event) => { state.mode = event.target.value; repaint(); });
  $("all-on").addEventListener("click", () => { state.off.clear(); repaint(); });
  $("all-off").addEventListener("click", () => { for (let k = 0; k < NO_DATA; k++) state.off.add(k); repaint(); });
  $("unmerge").addEventListener("click", unmerge);
  $("download").addEventListener("click", download);
  $("copy").addEventListener("click", copy);
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("keydown", viewerKeys);
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("close", () => items.get(viewed)?.querySelector("button").focus());
  $("stage").addEventListener("pointermove", readout);
  $("tiles").addEventListener("keydown", arrowKeys);
  addEventListener("beforeunload", (event) => { if (state.dirty) event.preventDefault(); });
  if (matchMedia("(max-width: 46rem)").matches) $("group-panel").open = false;
  for (const tile of tiles) { const item = makeItem(tile); items.set(tile, item); watcher.observe(item); }
  $("settings").append(rowsTable(["setting", "value"], page.settings));
  drawFigures();
  drawScores();
  opacity();
  choose("images");
  arrange();
  setGroups(state.n);
}
start();
