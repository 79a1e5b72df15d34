// The page: opens images, shows their state, and joins mouse, keys, list and panel to the changes of points.

import { get, PixelCache, post, Unreachable } from "./api.js";
import { Contrast } from "./contrast.js";
import { Edits } from "./edits.js";
import { drawHistogram, showPoints, showReasons } from "./inspector.js";
import { helpRows, listenToKeys } from "./keys.js";
import { ImageList } from "./list.js";
import { MASK_MODES, Picture } from "./picture.js";
import { Pointer } from "./pointer.js";

const PAUSE = 250; // milliseconds without a turn of the wheel before an extent is saved
const POLL = 1500;

const find = (id) => document.getElementById(id);
const pixels = new PixelCache();
const contrast = new Contrast();
const picture = new Picture(find("picture"), find("marks"));
const list = new ImageList(
  { list: find("list"), rows: find("rows"), filter: find("filter"), sort: find("sort"), progress: find("progress") },
  (row) => open(row),
);
const edits = new Edits({ state: () => state, show, count, refresh, said, fail });

let about = null;
let state = { row: null };
let opening = 0;
let doubtsRead = 0;

// ---- one image

async function open(row) {
  if (row === null || row === undefined) return;
  const turn = (opening += 1);
  saveExtent();
  list.select(row);
  location.replace(`#${row}`);
  document.body.classList.remove("list-open");
  const slow = setTimeout(() => message("reading the image"), 150);
  try {
    const [image, found, truth] = await Promise.all([
      pixels.get(row),
      get(`/api/images/${row}`),
      get(`/api/images/${row}/truth`),
    ]);
    if (turn !== opening) return;
    contrast.load(image);
    picture.chosen = null;
    picture.cursor = null;
    picture.setPreview(null, null);
    picture.setTruth(truth.runs);
    find("truth-mode").disabled = !truth.runs.length;
    state = found;
    picture.setPoints(found.points);
    picture.show(image, contrast);
    message("");
    if (truth.error) said(truth.error, true);
    showState();
    showContrast();
    explain(null);
    ahead(list.step(1));
  } catch (error) {
    if (turn === opening) showNothing(row, error);
  } finally {
    clearTimeout(slow);
  }
}

// An image that cannot be shown takes no clicks.
function showNothing(row, error) {
  state = { row: null, points: [] };
  picture.clear();
  find("name").textContent = about.names[row];
  find("facts").textContent = `${row + 1} of ${about.names.length}`;
  showPoints(find("points"), [], null, about.extent, {});
  find("why").hidden = true;
  message(error.message, true);
}

// Read the next image while this one is looked at.
function ahead(row) {
  if (row !== null && row !== state.row) pixels.get(row).catch(() => null); // told when it is opened
}

// Show an answer of the server; one about another image opens it.
async function show(found) {
  if (found.row === null) await refresh(); // it was done to an image of another folder
  else if (found.row !== state.row) await open(found.row);
  else {
    state = found;
    picture.setPoints(found.points);
    picture.setPreview(null, null);
    if (!found.points.some((point) => point.id === picture.chosen)) picture.chosen = null;
    picture.drawMarks();
    message("");
    showState();
  }
}

// Note an answer about an image that is not shown any more.
function count({ row, points }) {
  if (row !== null) list.setCount(row, points.length);
}

async function refresh() {
  const { row } = state;
  if (row === null) return;
  try {
    const found = await get(`/api/images/${row}`);
    if (state.row === row) await show(found);
  } catch (error) {
    fail(error);
  }
}

function showState() {
  const { row, height, width, points, iou } = state;
  find("name").textContent = about.names[row];
  document.title = `${about.names[row]} - hmg-gpu review`;
  find("facts").textContent = `${row + 1} of ${about.names.length}, ${height} x ${width}`;
  find("iou").textContent = iou === null ? "" : `IoU ${(100 * iou).toFixed(1)} %`;
  find("saved").textContent = state.saving || `saved in ${about.saved}`;
  find("saved").classList.toggle("bad", Boolean(state.saving));
  for (const way of ["undo", "redo"]) document.querySelector(`[data-do=${way}]`).disabled = !state[way];
  list.setCount(row, points.length);
  showPoints(find("points"), points, picture.chosen, about.extent, { choose, resize, resizeBy, remove: removePoint });
  if (picture.chosen !== null) explain(points.find((point) => point.id === picture.chosen));
}

function choose(id) {
  picture.chosen = id;
  picture.drawMarks();
  showState();
}

// ---- what PMG did

let explained = "";

async function explain(point) {
  find("why").hidden = !point;
  const key = point && [state.row, state.revision, point.id].join();
  if (!point || key === explained) return;
  explained = key;
  try {
    const reasons = await get(`/api/images/${state.row}/points/${point.id}`);
    if (key !== explained) return;
    const parts = { title: find("why-point"), numbers: find("why-numbers"), across: find("across"), along: find("along") };
    showReasons(parts, reasons);
  } catch (error) {
    if (error instanceof Unreachable) fail(error); // else the point is gone already
  }
}

// ---- changes

let dragged = null; // {id, pixel} of the point that the mouse holds
let previewing = false;

async function press(pixel, point, since) {
  saveExtent();
  picture.cursor = null;
  if (point) {
    dragged = { id: point.id, pixel: null };
    choose(point.id);
    return;
  }
  const mine = (dragged = { id: null, pixel: null });
  const chooseNew = (after) => {
    const known = new Set(state.points.map((one) => one.id));
    mine.id = picture.chosen = after.points.find((one) => !known.has(one.id)).id;
  };
  if (!(await edits.change("add", { ...pixel, extent: null }, chooseNew))) return;
  requestAnimationFrame(() => performance.measure("click to mask", { start: since, end: performance.now() }));
  if (mine.released && mine.pixel) edits.change("move", { id: mine.id, ...mine.pixel });
}

function drag(pixel) {
  if (!dragged) return;
  dragged.pixel = pixel;
  previewDragged();
}

// The mask where the mouse is; one question at a time, the newest place next.
async function previewDragged() {
  if (previewing || !dragged?.pixel || dragged.id === null) return;
  previewing = true;
  const { id, pixel } = dragged;
  const point = state.points.find((one) => one.id === id);
  await preview(id, { ...pixel, extent: point?.extent ?? null });
  previewing = false;
  if (dragged?.pixel && (dragged.pixel.y !== pixel.y || dragged.pixel.x !== pixel.x)) previewDragged();
}

async function preview(id, place) {
  try {
    const shown = await post("/api/preview", { row: state.row, y: place.y, x: place.x, extent: place.extent });
    if (dragged?.id === id || resized?.id === id) {
      picture.setPreview(id, shown);
      picture.drawMarks();
    }
  } catch (error) {
    fail(error);
  }
}

function release() {
  const held = dragged;
  dragged = null;
  if (!held?.pixel) return;
  held.released = true;
  const point = state.points.find((one) => one.id === held.id);
  if (point && (point.y !== held.pixel.y || point.x !== held.pixel.x)) edits.change("move", { id: held.id, ...held.pixel });
  else if (point) refresh();
}

function removePoint(id) {
  edits.change("remove", { id });
}

let resized = null; // {id, extent}, not saved yet
let saving = null;

// Show a point with an extent (null: the set's own) and save it when wheel and keys rest.
function resize(point, extent) {
  if (resized && resized.id !== point.id) saveExtent();
  resized = { id: point.id, extent: extent === null ? null : Math.min(about.max_extent, Math.max(1, extent)) };
  preview(point.id, { ...point, extent: resized.extent });
  said(`extent ${resized.extent ?? about.extent}`);
  clearTimeout(saving);
  saving = setTimeout(saveExtent, PAUSE);
}

function saveExtent() {
  clearTimeout(saving);
  if (!resized) return;
  const { id, extent } = resized;
  resized = null;
  const point = state.points.find((one) => one.id === id);
  if (point && point.extent !== extent) edits.change("extent", { id, extent });
}

function resizeBy(point, step) {
  const target = point ?? chosenPoint();
  if (!target) {
    said("choose a point first");
    return;
  }
  if (picture.chosen !== target.id) choose(target.id);
  const now = (resized?.id === target.id ? resized.extent : target.extent) ?? about.extent;
  resize(target, now + step);
}

// ---- contrast

function showContrast() {
  drawHistogram(find("histogram"), contrast);
  const stretch = find("stretch");
  stretch.value = contrast.percent === null ? "own" : String(contrast.percent);
  find("log").checked = contrast.log;
}

let shading = false;

function changeContrast(change) {
  change();
  if (shading || !picture.image) return;
  shading = true;
  requestAnimationFrame(() => {
    shading = false;
    picture.shade(contrast);
    picture.draw();
    showContrast();
  });
}

// ---- actions by name, for keys and buttons

const chosenPoint = () => state.points?.find((point) => point.id === picture.chosen);

const actions = {
  next: () => open(list.step(1)),
  previous: () => open(list.step(-1)),
  doubtful: () => {
    const row = list.nextDoubtful();
    if (row === null) said("no doubtful image that was not looked at");
    else open(row);
  },
  undo: () => back("undo"),
  redo: () => back("redo"),
  remove: () => (chosenPoint() ? removePoint(picture.chosen) : said("choose a point first")),
  shorter: () => resizeBy(null, -1),
  longer: () => resizeBy(null, 1),
  choose: () => {
    const { points } = state;
    if (!points?.length) return;
    const at = points.findIndex((point) => point.id === picture.chosen);
    const point = points[(at + 1) % points.length];
    picture.cursor = { y: point.y, x: point.x };
    choose(point.id);
    picture.reveal(point);
    tellCursor();
  },
  place: (since) => {
    if (!picture.cursor) return;
    const { cursor } = picture;
    const point = state.points.find((one) => one.y === cursor.y && one.x === cursor.x);
    if (point) choose(point.id);
    else press(cursor, null, since).then(() => (picture.cursor = cursor) && picture.drawMarks());
    release();
  },
  arrow: (down, right, event) => {
    if (!picture.image) return;
    const point = chosenPoint();
    const step = event.shiftKey ? 10 : 1;
    if (event.altKey && point) {
      const moved = within(point.y + down * step, point.x + right * step);
      picture.cursor = moved;
      edits.change("move", { id: point.id, ...moved });
      return;
    }
    const { height, width } = picture.image;
    const from = picture.cursor ?? point ?? { y: Math.floor(height / 2), x: Math.floor(width / 2) };
    picture.cursor = within(from.y + down * step, from.x + right * step);
    picture.draw();
    picture.reveal(picture.cursor);
    tellCursor();
  },
  zoomIn: () => zoomAtCursor(1.5),
  zoomOut: () => zoomAtCursor(1 / 1.5),
  fit: () => picture.image && picture.fit(),
  masks: () => {
    picture.mode = MASK_MODES[(MASK_MODES.indexOf(picture.mode) + 1) % MASK_MODES.length];
    find("masks-mode").textContent = { outline: "Outline", filled: "Filled", off: "No masks" }[picture.mode];
    picture.draw();
  },
  truth: () => {
    picture.showTruth = !picture.showTruth;
    find("truth-mode").setAttribute("aria-pressed", String(picture.showTruth));
    picture.draw();
  },
  stretch: () => {
    const percents = [0, 0.5, 2];
    const next = percents[(percents.indexOf(contrast.percent) + 1) % percents.length];
    changeContrast(() => contrast.stretch(next));
  },
  log: () => changeContrast(() => (contrast.log = !contrast.log)),
  exportMasks,
  help: () => find("help").showModal(),
};

function back(way) {
  saveExtent();
  edits.back(way);
}

function within(y, x) {
  const hold = (at, side) => Math.min(side - 1, Math.max(0, at));
  return { y: hold(y, picture.image.height), x: hold(x, picture.image.width) };
}

function zoomAtCursor(factor) {
  if (!picture.image) return;
  const place = picture.cursor && picture.placeOf(picture.cursor);
  picture.zoom(factor, place?.x, place?.y);
}

// ---- words

function describe(pixel) {
  const value = contrast.intensity(contrast.levels[pixel.y * picture.image.width + pixel.x]);
  return `row ${pixel.y}, column ${pixel.x}: ${Number.isInteger(value) ? value : value.toPrecision(6)}`;
}

function tellCursor() {
  find("where").textContent = describe(picture.cursor);
}

function hover(pixel, point) {
  find("where").textContent = pixel ? describe(pixel) : " ";
  explain(point ?? chosenPoint());
}

let fading = null;

function said(text, bad = false) {
  find("said").textContent = text;
  find("said").classList.toggle("bad", bad);
  clearTimeout(fading);
  fading = setTimeout(() => (find("said").textContent = ""), bad ? 12000 : 4000);
}

// Over the image: what keeps it from being shown, or nothing.
function message(text, bad = false) {
  find("message").hidden = !text;
  find("message").textContent = text;
  find("message").classList.toggle("bad", bad);
}

function fail(error) {
  if (error instanceof Unreachable) message(error.message, true);
  else said(error.message, true);
}

// ---- export and doubt

async function exportMasks() {
  const dialog = find("exported");
  find("export-command").hidden = true;
  find("export-said").textContent = "writing masks ...";
  dialog.showModal();
  try {
    let found = await post("/api/export", {});
    while (found.state === "running") {
      await new Promise((resolve) => setTimeout(resolve, 300));
      found = await get("/api/export");
    }
    const done = found.state === "done";
    find("export-said").textContent = done
      ? `Masks, coco.json, points.csv and changes.csv (${found.changes} changes) are in ${found.folder}. The same masks:`
      : found.error;
    find("export-command").hidden = !done;
    find("export-command").textContent = found.command ?? "";
  } catch (error) {
    find("export-said").textContent = error.message;
  }
}

async function pollDoubts() {
  try {
    const { found, count, waiting } = await get(`/api/doubts/${doubtsRead}`);
    doubtsRead = count;
    list.setDoubts(found, waiting);
  } catch {
    // the next change tells that the server is gone
  }
  setTimeout(pollDoubts, POLL);
}

// ---- the beginning

async function begin() {
  history.replaceState(null, "", `/${location.hash}`); // the token leaves the address
  find("help-rows").replaceChildren(...helpRows());
  for (const name of ["help", "export"]) {
    find(`${name}-close`).addEventListener("click", (event) => event.target.closest("dialog").close());
  }
  for (const node of document.querySelectorAll("[data-do]")) {
    node.addEventListener("click", (event) => actions[node.dataset.do](event.timeStamp));
  }
  find("show-list").addEventListener("click", () => document.body.classList.toggle("list-open"));
  find("show-inspector").addEventListener("click", () => document.body.classList.toggle("inspector-open"));
  find("stretch").addEventListener("input", (event) =>
    changeContrast(() => contrast.stretch(Number(event.target.value))),
  );
  find("log").addEventListener("input", () => actions.log());
  find("histogram").addEventListener("pointermove", (event) => {
    const { clientWidth: width } = event.target;
    if (event.buttons) changeContrast(() => contrast.drag(event.movementX / width, -event.movementY / width));
  });
  new Pointer(find("marks"), picture, {
    press,
    drag,
    release,
    hover,
    remove: (point) => removePoint(point.id),
    pan: (right, down) => picture.pan(right, down),
    zoom: (factor, x, y) => picture.zoom(factor, x, y),
    window: (right, up) => changeContrast(() => contrast.drag(right, up)),
    resize: resizeBy,
  });
  listenToKeys(actions, find("list"));
  window.addEventListener("focus", refresh);
  window.addEventListener("pagehide", saveExtent);
  try {
    about = await get("/api/images");
    list.load(about);
    const row = Number(location.hash.slice(1));
    await open(row < about.names.length ? row : 0);
    pollDoubts();
  } catch (error) {
    message(error.message, true);
  }
}

begin();
