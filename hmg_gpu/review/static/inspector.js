// The panel on the right: histogram and window, the points of the image, and what PMG did for one of them.

const COLOURS = { line: "#3a434d", vmax: "#e6edf3", vavg: "#7d8894", threshold: "#ffb454", box: "#8fb8ff", p: "#3ddbc0" };

// A canvas of the size that panels.css gives it, ready to draw in screen pixels.
function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { context, width, height };
}

function polyline(context, places, colour, width = 1.5) {
  context.beginPath();
  places.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke();
}

function format(value) {
  return Number.isInteger(value) ? String(value) : value.toPrecision(4);
}

export function drawHistogram(canvas, contrast) {
  const { context, width, height } = prepare(canvas);
  const bins = contrast.histogram();
  const most = Math.log1p(Math.max(...bins));
  const [low, high] = [contrast.share(contrast.low) * width, contrast.share(contrast.high) * width];
  context.fillStyle = "#ffffff14";
  context.fillRect(low, 0, high - low, height);
  context.fillStyle = "#7d8894";
  bins.forEach((count, index) => {
    const tall = (Math.log1p(count) / most) * (height - 16);
    context.fillRect((index * width) / bins.length, height - tall, Math.max(1, width / bins.length), tall);
  });
  polyline(context, [[low, height], [high, 14]], COLOURS.threshold);
  context.fillStyle = "#c5ced6";
  context.font = "11px system-ui, sans-serif";
  context.fillText(format(contrast.intensity(Math.round(contrast.low))), 4, 11);
  const text = format(contrast.intensity(Math.round(contrast.high)));
  context.fillText(text, width - context.measureText(text).width - 4, 11);
}

// The table of points; `actions` has choose(id), resize(point, extent), resizeBy(point, step), remove(id).
export function showPoints(place, points, chosen, extent, actions) {
  place.replaceChildren();
  if (!points.length) {
    const text = document.createElement("p");
    text.className = "small";
    text.textContent = "No point yet. Click a target.";
    place.append(text);
  }
  for (const point of points) {
    const row = document.createElement("div");
    row.className = point.id === chosen ? "point chosen" : "point";
    const where = button(`${point.y}, ${point.x}`, "Choose this point (row, column)", () => actions.choose(point.id));
    where.className = "where";
    const area = document.createElement("span");
    area.textContent = point.area ? `${point.area} px` : "no mask";
    const own = point.extent !== null;
    const now = point.extent ?? extent;
    const length = button(String(now), own ? "Extent by hand; click for the set's own" : "Extent of all points", () =>
      actions.resize(point, null),
    );
    length.className = own ? "own" : "";
    length.disabled = !own;
    row.append(
      where,
      area,
      button("−", "Shorter extent", () => actions.resizeBy(point, -1)),
      length,
      button("+", "Longer extent", () => actions.resizeBy(point, 1)),
      button("✕", "Remove this point", () => actions.remove(point.id)),
    );
    place.append(row);
  }
}

function button(text, title, run) {
  const node = document.createElement("button");
  node.textContent = text;
  node.title = title;
  node.setAttribute("aria-label", title);
  node.addEventListener("click", run);
  return node;
}

// What the library says that PMG saw at a point.
export function showReasons(parts, reasons) {
  const [y0, x0, y1, x1] = reasons.box;
  parts.title.textContent = `at ${reasons.y}, ${reasons.x}`;
  const numbers = {
    box: `${y1 - y0} x ${x1 - x0} px, rows ${y0} to ${y1 - 1}, columns ${x0} to ${x1 - 1}`,
    extent: `${reasons.extent} px`,
    intensity: `${format(reasons.value)} at the point, threshold of the box ${format(reasons.sigma)}`,
    doubt: `${reasons.doubt.toFixed(2)} when the click moves by a pixel`,
    "mask by": reasons.by === "learned" ? "the student; the box is PMG's" : "PMG",
  };
  parts.numbers.replaceChildren(
    ...Object.entries(numbers).flatMap(([name, text]) => {
      const [term, value] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      value.textContent = text;
      return [term, value];
    }),
  );
  const { left, right, up, down } = reasons.directions;
  drawProfile(parts.across, left, right, reasons.row, reasons.x);
  drawProfile(parts.along, up, down, reasons.column, reasons.y);
}

// Both profiles of one axis through the point, the box, and the probabilities inside it.
function drawProfile(canvas, before, after, [first, probabilities], centre) {
  const { context, width, height } = prepare(canvas);
  const reach = Math.max(before.vmax.length, after.vmax.length);
  const values = [before, after].flatMap((side) => [...side.vmax, ...side.vavg]);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const x = (offset) => width / 2 + (offset / reach) * (width / 2 - 6);
  const y = (value) => height - 6 - ((value - least) / Math.max(1e-9, most - least)) * (height - 12);
  const share = (value) => height - 6 - value * (height - 12);

  context.fillStyle = "#8fb8ff1c";
  context.fillRect(x(-before.boundary - 0.5), 0, x(after.boundary + 0.5) - x(-before.boundary - 0.5), height);
  context.fillStyle = "#3ddbc040";
  probabilities.forEach((value, index) => {
    const offset = first + index - centre;
    const left = x(offset - 0.5);
    context.fillRect(left, share(value), x(offset + 0.5) - left, height - 6 - share(value));
  });
  context.setLineDash([2, 3]);
  polyline(context, [[0, share(0.5)], [width, share(0.5)]], COLOURS.p, 1);
  context.setLineDash([]);
  polyline(context, [[x(0), 0], [x(0), height]], COLOURS.line, 1);
  for (const name of ["vavg", "vmax"]) {
    const places = [...before[name].map((value, k) => [-k, value]).reverse(), ...after[name].map((value, k) => [k, value])];
    polyline(context, places.map(([offset, value]) => [x(offset), y(value)]), COLOURS[name]);
  }
  for (const [side, sign] of [[before, -1], [after, 1]]) {
    const edge = x(sign * (side.boundary + 0.5));
    polyline(context, [[edge, 0], [edge, height]], COLOURS.box);
    polyline(context, [[x(0), y(side.threshold)], [x(sign * side.border), y(side.threshold)]], COLOURS.threshold);
  }
}
