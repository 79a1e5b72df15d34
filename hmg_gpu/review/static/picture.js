// The large image: where it lies on the screen, its grey pixels, and the marks over them.

import { areaOf, outlineOf } from "./shapes.js";

const COLOURS = { mask: "#3ddbc0", chosen: "#ffd166", truth: "#ff6b9a", box: "#8fb8ff", cursor: "#ffffff" };
const MOST = 64; // screen pixels of an image pixel
const NEAR = 12; // screen pixels from a point that still mean it
export const MASK_MODES = ["outline", "filled", "off"];

function withPaths(point) {
  return { ...point, outline: outlineOf(point.runs), filling: areaOf(point.runs) };
}

export class Picture {
  constructor(pictureCanvas, marksCanvas) {
    this.canvases = [pictureCanvas, marksCanvas];
    this.picture = pictureCanvas.getContext("2d", { alpha: false });
    this.marks = marksCanvas.getContext("2d");
    this.grey = document.createElement("canvas");
    this.view = { scale: 1, left: 0, top: 0 };
    this.points = [];
    this.truth = null;
    this.mode = "outline";
    this.showTruth = false;
    this.chosen = null;
    this.cursor = null;
    new ResizeObserver(() => this.resize()).observe(marksCanvas.parentElement);
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvases[0].parentElement;
    const before = this.size;
    this.size = { width: clientWidth, height: clientHeight };
    this.ratio = window.devicePixelRatio || 1;
    for (const canvas of this.canvases) {
      canvas.width = Math.round(clientWidth * this.ratio);
      canvas.height = Math.round(clientHeight * this.ratio);
    }
    if (!this.image) return;
    if (this.fitted || !before) this.fit();
    else this.draw();
  }

  show(image, contrast) {
    const same = this.image && this.image.width === image.width && this.image.height === image.height;
    this.image = image;
    this.shade(contrast);
    if (!same || this.fitted) this.fit();
  }

  // No image.
  clear() {
    this.image = null;
    this.points = [];
    this.cursor = this.chosen = this.preview = null;
    for (const context of [this.picture, this.marks]) {
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    }
  }

  shade(contrast) {
    const { width, height } = this.image;
    const table = contrast.table();
    const grey = new Uint32Array(width * height);
    const levels = contrast.levels;
    for (let index = 0; index < grey.length; index += 1) grey[index] = table[levels[index]];
    this.grey.width = width;
    this.grey.height = height;
    this.grey.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(grey.buffer), width, height), 0, 0);
  }

  setPoints(points) {
    this.points = points.map(withPaths);
  }

  // Show a point as it would be elsewhere; null: as it is.
  setPreview(id, shown) {
    this.preview = shown && withPaths({ ...shown, id });
  }

  setTruth(runs) {
    this.truth = runs.length ? outlineOf(runs) : null;
  }

  // ---- where things are

  fit() {
    this.fitted = true;
    if (!this.size) return; // it is fitted when its size is known
    const { width, height } = this.size;
    const scale = Math.min(MOST, 0.96 * Math.min(width / this.image.width, height / this.image.height));
    this.view = {
      scale,
      left: (width - scale * this.image.width) / 2,
      top: (height - scale * this.image.height) / 2,
    };
    this.draw();
  }

  zoom(factor, x = this.size.width / 2, y = this.size.height / 2) {
    const least = Math.min(1, 0.5 * Math.min(this.size.width / this.image.width, this.size.height / this.image.height));
    const scale = Math.min(MOST, Math.max(least, this.view.scale * factor));
    const ratio = scale / this.view.scale;
    this.view = { scale, left: x - ratio * (x - this.view.left), top: y - ratio * (y - this.view.top) };
    this.fitted = false;
    this.draw();
  }

  pan(right, down) {
    this.view = { ...this.view, left: this.view.left + right, top: this.view.top + down };
    this.fitted = false;
    this.draw();
  }

  // The pixel under a place on the screen; null beside the image.
  pixelAt(x, y) {
    const pixel = {
      y: Math.floor((y - this.view.top) / this.view.scale),
      x: Math.floor((x - this.view.left) / this.view.scale),
    };
    const inside = pixel.y >= 0 && pixel.x >= 0 && pixel.y < this.image.height && pixel.x < this.image.width;
    return inside ? pixel : null;
  }

  placeOf({ y, x }) {
    const { scale, left, top } = this.view;
    return { x: left + (x + 0.5) * scale, y: top + (y + 0.5) * scale };
  }

  // The point next to a place on the screen, if it is near.
  pointAt(x, y, near = NEAR) {
    let best = null;
    let least = Math.max(near, 0.75 * this.view.scale);
    for (const point of this.points) {
      const place = this.placeOf(point);
      const distance = Math.hypot(place.x - x, place.y - y);
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  }

  // Bring a pixel into the window.
  reveal(pixel) {
    const place = this.placeOf(pixel);
    const margin = 24;
    const push = (at, side) => Math.max(0, margin - at) - Math.max(0, at - side + margin);
    const [right, down] = [push(place.x, this.size.width), push(place.y, this.size.height)];
    if (right || down) this.pan(right, down);
  }

  // ---- drawing

  draw() {
    if (!this.image || !this.size) return;
    const { scale, left, top } = this.view;
    const [context, ratio] = [this.picture, this.ratio];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#0b0d10";
    context.fillRect(0, 0, context.canvas.width, context.canvas.height);
    context.setTransform(scale * ratio, 0, 0, scale * ratio, left * ratio, top * ratio);
    context.imageSmoothingEnabled = scale < 1;
    context.drawImage(this.grey, 0, 0);
    this.drawMarks();
  }

  drawMarks() {
    const { scale, left, top } = this.view;
    const [context, ratio] = [this.marks, this.ratio];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    context.setTransform(scale * ratio, 0, 0, scale * ratio, left * ratio, top * ratio);
    const points = this.points.filter((point) => point.id !== this.preview?.id);
    if (this.preview) points.push(this.preview);
    if (this.showTruth && this.truth) this.stroke(this.truth, COLOURS.truth, 1.5, [4, 3]);
    if (this.mode !== "off") for (const point of points) this.drawMask(point);
    const chosen = points.find((point) => point.id === this.chosen);
    if (chosen) this.drawBox(chosen.box);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    for (const point of points) this.drawPoint(point);
    if (this.cursor) this.drawCursor();
  }

  drawMask(point) {
    const colour = point.id === this.chosen ? COLOURS.chosen : COLOURS.mask;
    if (this.mode === "filled") {
      this.marks.fillStyle = `${colour}80`;
      this.marks.fill(point.filling);
    }
    this.stroke(point.outline, colour, 1.5);
  }

  drawBox([y0, x0, y1, x1]) {
    const path = new Path2D();
    path.rect(x0, y0, x1 - x0, y1 - y0);
    this.stroke(path, COLOURS.box, 1, [3, 3]);
  }

  // A path in image coordinates by a line of so many screen pixels.
  stroke(path, colour, width, dash = []) {
    const { scale } = this.view;
    this.marks.strokeStyle = colour;
    this.marks.lineWidth = width / scale;
    this.marks.setLineDash(dash.map((length) => length / scale));
    this.marks.stroke(path);
    this.marks.setLineDash([]);
  }

  // Four strokes around the point that leave its pixel free.
  drawPoint(point) {
    const place = this.placeOf(point);
    const inner = Math.max(4, this.view.scale * 0.75);
    const path = new Path2D();
    for (const [right, down] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      path.moveTo(place.x + right * inner, place.y + down * inner);
      path.lineTo(place.x + right * (inner + 6), place.y + down * (inner + 6));
    }
    this.marks.lineWidth = 3.5;
    this.marks.strokeStyle = "#000000a0";
    this.marks.stroke(path);
    this.marks.lineWidth = 1.5;
    this.marks.strokeStyle = point.id === this.chosen ? COLOURS.chosen : COLOURS.mask;
    this.marks.stroke(path);
  }

  drawCursor() {
    const place = this.placeOf(this.cursor);
    const half = Math.max(3, this.view.scale / 2);
    this.marks.lineWidth = 1.5;
    this.marks.strokeStyle = COLOURS.cursor;
    this.marks.strokeRect(place.x - half, place.y - half, 2 * half, 2 * half);
  }
}
