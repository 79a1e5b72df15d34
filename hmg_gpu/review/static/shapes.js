// Masks as runs (row, first column, last column + 1) to paths in image coordinates.

function rowsOf(runs) {
  const rows = new Map();
  for (const [y, x0, x1] of runs) {
    if (!rows.has(y)) rows.set(y, []);
    rows.get(y).push([x0, x1]);
  }
  return rows;
}

// The parts of an interval that no other interval (sorted) covers.
function uncovered([x0, x1], others = []) {
  const parts = [];
  let at = x0;
  for (const [start, end] of others) {
    if (end <= at) continue;
    if (start >= x1) break;
    if (start > at) parts.push([at, start]);
    at = Math.max(at, end);
  }
  if (at < x1) parts.push([at, x1]);
  return parts;
}

// The edges between pixels of the mask and others.
export function outlineOf(runs) {
  const path = new Path2D();
  const rows = rowsOf(runs);
  const line = (x0, y0, x1, y1) => {
    path.moveTo(x0, y0);
    path.lineTo(x1, y1);
  };
  for (const [y, intervals] of rows) {
    for (const [x0, x1] of intervals) {
      line(x0, y, x0, y + 1);
      line(x1, y, x1, y + 1);
      for (const [start, end] of uncovered([x0, x1], rows.get(y - 1))) line(start, y, end, y);
      for (const [start, end] of uncovered([x0, x1], rows.get(y + 1))) line(start, y + 1, end, y + 1);
    }
  }
  return path;
}

export function areaOf(runs) {
  const path = new Path2D();
  for (const [y, x0, x1] of runs) path.rect(x0, y, x1 - x0, 1);
  return path;
}
