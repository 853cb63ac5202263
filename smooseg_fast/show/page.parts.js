// The second part of the script of the page, after page.js: groups, names, the tree, figures and labels, and the start.

// the list of groups

const PATCH = 28;
function patchOf(atom) {
  const { columns } = tree.patches;
  return h("span", { className: "patch", style: { backgroundPosition: `${-(atom % columns) * PATCH}px ${-Math.floor(atom / columns) * PATCH}px` } });
}
function patchesOf(test, count) {
  const atoms = (tree?.patches ? [...tree.finest.keys()] : []).filter(test).sort((a, b) => tree.shares[b] - tree.shares[a]).slice(0, count);
  return h("span", { className: "patches", "aria-hidden": "true" }, ...atoms.map(patchOf));
}
/** Black or white, whichever is easier to read on a colour: WCAG's contrast is at least 4.5. */
function inkOn(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => (parseInt(hex.slice(at, at + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}
/** Put new nodes into a list; the keyboard stays where it was. */
function renew(list, nodes) {
  const key = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  list.replaceChildren(...nodes);
  if (key) (list.querySelector(`[data-key="${key}"]`) ?? list.querySelector(`[data-key="${state.focus}"]`))?.focus({ preventScroll: true });
}
function keyed(node, key, label) {
  node.dataset.key = key;
  node.setAttribute("aria-label", label);
  return node;
}
function listGroups() {
  const table = lookup(), shares = areaShares() ?? meanShares(table), finest = tree ? lookup(false) : null;
  const groups = [...cut().units.keys()].sort((a, b) => shares[b] - shares[a]);
  const choice = h("select", {}, h("option", { value: "" }, "merge with…"), ...groups.map((group) => h("option", { value: group }, nameOf(group))));
  renew($("group-list"), groups.map((group, place) => {
    const colour = colourOf(group), title = nameOf(group), parts = (cut().merges.find((list) => list[0] === group) ?? []).slice(1);
    const swatch = keyed(h("button", { type: "button", className: "swatch", style: { background: colour, borderColor: colour, color: inkOn(colour) }, onclick: () => toggle(group) }, String(group)), `show-${group}`, `Show ${title}`);
    swatch.setAttribute("aria-pressed", String(!state.off.has(group)));
    const name = keyed(h("input", { type: "text", dir: "auto", value: state.names.get(keyOf(group)) ?? "", placeholder: `group ${group}`, title: state.names.get(keyOf(group)) ?? "", maxLength: 60, onchange: (event) => rename(group, event.target.value) }), `name-${group}`, `Name of group ${group}`);
    const into = keyed(choice.cloneNode(true), `merge-${group}`, `Merge ${title} with`);
    into.remove(place + 1);
    into.addEventListener("change", () => merge(group, Number(into.value)));
    const find = keyed(h("button", { type: "button", onclick: () => sortBy(group) }, "find images"), `find-${group}`, `Images with most of ${title} first`);
    const apart = parts.length ? keyed(h("button", { type: "button", onclick: () => unmerge(group) }, `with ${parts.join(", ")} ✕`), `apart-${group}`, `Take ${parts.join(", ")} out of ${title}`) : null;
    const under = h("span", { className: "under" }, tree?.patches ? patchesOf((atom) => finest[atom] === group, 8) : null, groups.length > 1 ? into : null, find, apart);
    return h("li", {}, swatch, name, h("span", { className: "share" }, percent(shares[group])), under);
  }));
  $("unmerge").hidden = !cut().merges.length;
  const option = $("sort").querySelector("[value=group]");
  option.textContent = `most of ${nameOf(state.group)} first`;
}
function sortBy(group) {
  state.group = group;
  $("sort").value = state.sort = "group";
  arrange();
  const { top } = $("count").getBoundingClientRect();
  if (top < 0 || top > 0.8 * innerHeight) $("count").scrollIntoView();
  repaint();
}
function toggle(group) {
  if (!state.off.delete(group)) state.off.add(group);
  repaint();
}
/** A name as the command takes it: one line of printable text; the joiners of emoji and of Persian stay. */
const cleaned = (text) => text.replace(/\s+/g, " ").replace(/(?![ \u200c\u200d])[\p{C}\p{Z}]/gu, "").trim();
function rename(group, text) {
  const name = cleaned(text), other = [...cut().units.keys()].find((k) => k !== group && state.names.get(keyOf(k)) === name);
  if (name && other !== undefined) { notice(`Group ${other} is called ${name} already: merge the two, or give them different names.`); repaint(); return; }
  if (name) state.names.set(keyOf(group), name);
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
  state.focus = `name-${root}`;
  changed();
}
/** Take a merge apart, or all that show. */
function unmerge(group) {
  const visible = new Set(cut().merges.filter((list) => group === undefined || list[0] === group).map((list) => keyOf(list[0])));
  state.merges = state.merges.filter((list) => !visible.has(key(list)));
  state.focus = `name-${group}`;
  changed();
  if (group === undefined) $("all-on").focus();
}
function changed() {
  state.version++;
  state.dirty = true;
  state.stamp = stamp();
  $("notice").hidden = true;
  repaint();
}

// names.json

function namesFile() {
  const of = (map) => Object.fromEntries([...cut().units.keys()].sort((a, b) => a - b).filter((group) => map.has(keyOf(group))).map((group) => [String(group), map.get(keyOf(group))]));
  return { groups: state.n, ...(page.least_share ? { least_share: page.least_share } : {}), names: of(state.names), colours: of(state.colours), merge: cut().merges };
}
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
/** A file of its own for every change, so that the command never takes an older one. */
const stamp = () => new Date().toLocaleString("sv").replace(/\D+/g, "");
const fileName = () => `names_${page.title.replace(/[^\w.-]+/g, "_").slice(0, 40)}_${state.stamp}.json`;
function commands() {
  const run = page.run === null ? "RUN" : quoted(page.run.replace(/^-/, "./-")), lines = [];
  if (state.n !== page.groups) lines.push(`smooseg choose --run ${run} --groups ${state.n}` + (page.least_share ? ` --share ${page.least_share}` : ""));
  lines.push(`smooseg name --run ${run} --file ~/Downloads/${fileName()}`);
  return lines.join("\n");
}
function download() {
  const text = JSON.stringify(namesFile(), null, 2) + "\n";
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: fileName() }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  state.dirty = false;
  $("unsaved").hidden = true;
}
async function copy() {
  try { await navigator.clipboard.writeText(commands()); $("copy").textContent = "copied"; } catch (error) { getSelection().selectAllChildren($("command")); }
  setTimeout(() => { $("copy").textContent = "copy command"; }, 1500);
}

// the tree

const SVG = "http://www.w3.org/2000/svg", ROW = 36;
function svg(tag, props, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(props)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function drawTree() {
  if (!tree || $("tree").hidden) return;
  const room = $("tree").clientWidth, wide = Math.round(Math.min(420, Math.max(110, 0.3 * room))); // of the branches
  const count = Math.min(most, Math.max(state.n, Math.min(32, 2 * state.n + 6)));
  const splits = tree.parents.slice(0, count - 1).map(([parent, height], k) => ({ number: k + 1, parent, height }));
  const rows = [0];
  for (const { parent, number } of splits) rows.splice(rows.indexOf(parent) + 1, 0, number);
  const heights = splits.map((split) => split.height), low = Math.min(...heights), high = Math.max(...heights);
  const x = (height) => 20 + ((height - low) / Math.max(high - low, 1e-9)) * (wide - 50);
  const at = new Map(rows.map((number, row) => [number, (row + 0.5) * ROW])), end = new Map(rows.map((number) => [number, wide]));
  const shape = svg("svg", { width: wide, height: rows.length * ROW, role: "img", "aria-label": `Tree of ${count} groups, cut at ${state.n}` });
  const mixed = new Set(), group = (number) => merged(climb(number, state.n)), dots = [];
  const branch = (number) => (mixed.has(number) ? "var(--quiet)" : colourOf(group(number)));
  const stroke = (x1, y1, x2, y2, colour) => shape.append(svg("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": 3, "stroke-linecap": "round" }));
  for (const { number, parent, height } of [...splits].reverse()) {
    const here = x(height), above = number < state.n;
    for (const side of [parent, number]) stroke(here, at.get(side), end.get(side), at.get(side), branch(side));
    stroke(here, at.get(parent), here, at.get(number), above ? "var(--quiet)" : colourOf(group(parent)));
    const place = { cx: here, cy: (at.get(parent) + at.get(number)) / 2 }, around = svg("circle", { ...place, r: 14, fill: "transparent", stroke: "none" }); // for fingers
    const dot = svg("circle", { ...place, r: 6, fill: above ? "var(--ink)" : "var(--paper)", stroke: "var(--ink)", "stroke-width": 1.5 }, svg("title", {}, document.createTextNode(`${above ? "merge to" : "split into"} ${above ? number : number + 1} groups`)));
    const node = svg("g", {}, around, dot);
    node.addEventListener("click", () => setGroups(above ? number : number + 1));
    dots.push(node);
    at.set(parent, (at.get(parent) + at.get(number)) / 2);
    end.set(parent, here);
    if (above || mixed.has(number)) mixed.add(parent);
  }
  stroke(2, at.get(0), end.get(0), at.get(0), branch(0));
  const edges = [low, ...heights, high], cut = state.n === 1 ? 10 : (x(edges[state.n - 1]) + x(edges[Math.min(state.n, edges.length - 1)])) / 2;
  shape.append(svg("line", { x1: cut, y1: 0, x2: cut, y2: rows.length * ROW, stroke: "var(--ink)", "stroke-dasharray": "5 5" }), ...dots);
  const finest = tree.finest.map((k) => climb(k, count)), seen = new Set();
  const shareOf = (test) => percent(tree.shares.reduce((sum, share, atom) => sum + (test(atom) ? share : 0), 0));
  const list = rows.map((number) => {
    const unit = group(number), first = !seen.has(unit), name = nameOf(unit);
    seen.add(unit);
    return h("div", { className: "tree-row", style: { paddingLeft: `${wide}px` } },
      h("span", { className: "tag", style: { background: colourOf(unit) } }),
      h("b", { title: first ? name : "" }, ...(first ? [bdi(name), h("span", { className: "share" }, shareOf((atom) => group(finest[atom]) === unit))] : [])),
      h("span", { className: "share" }, shareOf((atom) => finest[atom] === number)), patchesOf((atom) => finest[atom] === number, 8));
  });
  $("tree-shares").textContent = `Shares are of the training images${page.planes === 2 ? ", before training moved the borders of the groups" : ""}.`;
  $("tree-drawing").replaceChildren(shape, ...list);
}

// other parts

function rowsTable(head, rows, numeric = []) {
  const cell = (tag) => (value, k) => h(tag, numeric.includes(k) ? { className: "number" } : {}, value instanceof Node ? value : String(value));
  return scrolling(h("table", {}, h("thead", {}, h("tr", {}, ...head.map(cell("th")))), h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map(cell("td")))))), head.join(", "));
}
/** A box that a wide table scrolls in, also by the keyboard. */
function scrolling(table, label) {
  const box = h("div", { className: "scroll", tabIndex: 0 }, table);
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  return box;
}
function meter(value) {
  return h("span", { className: "meter", "aria-hidden": "true" }, h("span", { style: { width: `${100 * Math.min(1, Math.max(0, value ?? 0))}%` } }));
}
function drawFigures() {
  const rows = page.figures.map(([name, value, good]) => [name, value.toFixed(3), good]);
  const figures = rows.length ? [h("h2", {}, "Without labels"), h("p", { className: "quiet" }, "Measured by the run on its own images, at the number of groups that it ended with."), rowsTable(["figure", "value", "what is good"], rows, [1])] : [];
  const times = page.times.length ? [h("h2", {}, "Times"), rowsTable(["part", "seconds"], page.times.map(([name, seconds]) => [name, seconds.toFixed(1)]), [1])] : [];
  const skipped = page.skipped.length ? [h("h2", {}, `${plural(page.skipped.length, "image")} that could not be used`), rowsTable(["image", "reason"], page.skipped.slice(0, 500))] : [];
  $("figures").replaceChildren(...figures, ...times, ...skipped);
}
const score = (value) => (value === null ? "–" : percent(value));
function drawScores() {
  const scores = page.scores, part = $("labels");
  if (!scores) return;
  const where = scores.held_out ? "held-out images" : "the training images";
  part.append(h("p", {}, `On ${where}, at ${scores.groups} groups, each matched to one class by the labels (Hungarian): accuracy ${score(scores.accuracy)}, mIoU ${score(scores.miou)}` + (scores.kmeans == null ? "." : `; k-means on the same features has mIoU ${score(scores.kmeans)}.`)));
  part.append(h("h2", {}, "Each class"), rowsTable(["class", "IoU", "", "labelled pixels"], scores.classes.map(([name, pixels, iou]) => [name, score(iou), meter(iou), pixels.toLocaleString("en")]), [1, 3]));
  part.append(h("div", { id: "confusion" }));
}
/** The table of groups by classes at the number of groups in use, as far as its rows are sums of those that were measured. */
function drawConfusion() {
  const scores = page.scores;
  if (!scores?.confusion || $("labels").hidden) return;
  const n = tree && !page.least_share ? Math.min(state.n, scores.groups) : scores.groups, at = cut(n), rows = new Map();
  scores.confusion.forEach((counts, k) => {
    const unit = at.into[n < scores.groups ? climb(k, n) : k], row = rows.get(unit) ?? { counts: counts.map(() => 0), matched: [] };
    counts.forEach((count, c) => { row.counts[c] += count; });
    if (scores.matched[k] !== null) row.matched.push(scores.matched[k]);
    rows.set(unit, row);
  });
  const body = [...rows].sort((a, b) => a[0] - b[0]).map(([unit, { counts, matched }]) => {
    const sum = counts.reduce((a, b) => a + b, 0), name = nameOf(unit, at);
    return h("tr", {}, h("th", { scope: "row", title: name }, bdi(name)), ...counts.map((count, c) => {
      const share = sum ? count / sum : 0, cell = h("td", { title: `${plural(count, "pixel")} of ${scores.classes[c][0]}` }, share >= 0.005 ? `${Math.round(100 * share)} %` : "");
      cell.style.setProperty("--share", share);
      if (matched.includes(scores.classes[c][0])) cell.style.fontWeight = "700";
      return cell;
    }), h("td", {}, matched.join(", ") || "–"));
  });
  const head = h("tr", {}, h("th", {}, "group"), ...scores.classes.map(([name]) => h("th", { scope: "col", title: name }, bdi(name))), h("th", { scope: "col" }, "matched to"));
  const stays = state.n > n ? ` It stays at ${plural(n, "group")}, the number that was measured.` : "";
  const table = h("table", { className: scores.classes.length > 8 ? "confusion many" : "confusion" }, h("thead", {}, head), h("tbody", {}, ...body));
  $("confusion").replaceChildren(h("h2", {}, "Where the pixels of each group lie"), h("p", { className: "quiet" }, `A row adds up to 100 %; bold is the class that the group is matched to.${stays}`), scrolling(table, "Groups by classes"));
}

// all together

let due = 0, sorting = 0;
function repaint() {
  cancelAnimationFrame(due);
  due = requestAnimationFrame(() => {
    brush = null;
    for (const tile of shown) { const canvas = items.get(tile).querySelector("canvas"); if (canvas) paint(canvas, tile); }
    if (viewed && $("viewer").open) { paint($("stage").lastElementChild, viewed); viewShares(); }
    listGroups();
    drawTree();
    drawConfusion();
    $("unsaved").hidden = !state.dirty;
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
  const slider = most > 1 && tree && (name === "tree" || (name === "labels" && page.scores?.confusion));
  $("bar").hidden = name !== "images" && !slider;
  $("bar").classList.toggle("tree", name !== "images");
  drawTree();
  drawConfusion();
}
function start() {
  if (typeof DecompressionStream === "undefined") notice("This browser is too old to show the labels: it lacks DecompressionStream. Take one of 2023 or later.");
  document.title = `${page.title} · smooseg`;
  $("title").textContent = page.title;
  $("subtitle").textContent = `${plural(page.images, "image")}, ${plural(page.groups, "group")}, found without labels`;
  const of = areaShares() ? "of the area of the training images" : tiles.length === 1 ? "of the image shown" : `means over the ${plural(tiles.length, "image")} shown`;
  $("why").textContent = (page.why ? `${plural(page.groups, "group")}: ${page.why}. ` : "") + `Shares are ${of}.`;
  if (tree?.patches) document.styleSheets[0].insertRule(`.patch { background: url("data:image/webp;base64,${tree.patches.picture}") 0 0 / ${tree.patches.columns * PATCH}px ${tree.patches.rows * PATCH}px no-repeat; }`);
  state.stamp = stamp();
  const parts = [["images", "Images"], tree && ["tree", "Tree"], (page.figures.length || page.times.length || page.skipped.length) && ["figures", "Figures"], page.scores && ["labels", "Labels"], page.settings.length && ["settings", "Settings"]].filter(Boolean);
  for (const [part, text] of parts) $("tabs").append(h("button", { type: "button", id: `tab-${part}`, role: "tab", onclick: () => choose(part) }, text)), Object.assign($("tabs").lastElementChild.dataset, { part }), $("tabs").lastElementChild.setAttribute("aria-controls", part);
  $("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], names = parts.map(([part]) => part);
    if (step) choose(names[(names.indexOf(event.target.dataset.part) + step + names.length) % names.length], true);
  });
  const sorts = [["order", "as given"], tiles.some((tile) => tile.certainty !== null) && ["uncertain", "least certain first"], ["unusual", "most unusual first"], ["group", ""]].filter(Boolean);
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
  $("unmerge").addEventListener("click", () => unmerge());
  $("download").addEventListener("click", download);
  $("copy").addEventListener("click", copy);
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("keydown", viewerKeys);
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("close", () => focusTile(order.indexOf(viewed)));
  for (const event of ["pointermove", "pointerdown"]) $("stage").addEventListener(event, readout);
  $("tiles").addEventListener("keydown", arrowKeys);
  addEventListener("beforeunload", (event) => { if (state.dirty) event.preventDefault(); });
  if (matchMedia("(max-width: 46rem)").matches) $("group-panel").open = false;
  addEventListener("resize", drawTree);
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`)).observe($("bar"));
  $("settings").append(rowsTable(["setting", "value"], page.settings));
  drawFigures();
  drawScores();
  opacity();
  choose("images");
  arrange();
  setGroups(state.n);
}
start();
