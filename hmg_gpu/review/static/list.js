// The list of images: of any number only the rows in sight exist, and thumbnails are asked for when they rest there.

const HEIGHT = 64; // of a row, as in panels.css
const REST = 80; // milliseconds

export class ImageList {
  constructor({ list, rows, filter, sort, progress }, open) {
    Object.assign(this, { list, rows, filter, sort, progress, open });
    this.current = null;
    this.seen = new Set();
    this.nodes = new Map();
    list.addEventListener("scroll", () => this.render());
    new ResizeObserver(() => this.render()).observe(list);
    for (const control of [filter, sort]) control.addEventListener("input", () => this.arrange(true));
    rows.addEventListener("click", (event) => {
      const node = event.target.closest("[data-row]");
      if (node) open(Number(node.dataset.row));
    });
  }

  load({ names, counts }) {
    this.names = names;
    this.counts = counts;
    this.doubts = new Array(names.length).fill(null);
    this.arrange();
  }

  setCount(row, count) {
    this.counts[row] = count;
    if (!count) this.doubts[row] = null;
    this.render(true);
  }

  setDoubts(found, waiting) {
    for (const [row, doubt] of found) this.doubts[row] = doubt;
    this.progress.textContent = waiting ? `doubt: ${waiting} images to go` : "";
    if (found.length && this.sort.value === "doubt") this.arrange();
    else this.render(true);
  }

  // Filter and sort.
  arrange(toTop = false) {
    const text = this.filter.value.trim().toLowerCase();
    this.order = this.names.map((_, row) => row).filter((row) => this.names[row].toLowerCase().includes(text));
    const key = { doubt: (row) => this.doubts[row] ?? -1, points: (row) => this.counts[row] }[this.sort.value];
    if (key) this.order.sort((one, other) => key(other) - key(one) || one - other);
    this.rows.style.height = `${this.order.length * HEIGHT}px`;
    if (toTop) this.list.scrollTop = 0;
    this.render(true);
  }

  // The image so many places further on in the list, or the nearest end.
  step(count) {
    if (!this.order.length) return null;
    const at = this.order.indexOf(this.current);
    const next = at < 0 ? 0 : Math.min(this.order.length - 1, Math.max(0, at + count));
    return this.order[next];
  }

  // The most doubtful image that was not looked at since the page was opened.
  nextDoubtful() {
    let best = null;
    this.doubts.forEach((doubt, row) => {
      if (doubt !== null && !this.seen.has(row) && (best === null || doubt > this.doubts[best])) best = row;
    });
    return best;
  }

  select(row) {
    this.current = row;
    this.seen.add(row);
    const at = this.order.indexOf(row);
    if (at >= 0) {
      const top = at * HEIGHT;
      const { scrollTop, clientHeight } = this.list;
      if (top < scrollTop) this.list.scrollTop = top;
      else if (top + HEIGHT > scrollTop + clientHeight) this.list.scrollTop = top + HEIGHT - clientHeight;
    }
    this.render(true);
  }

  render(fresh = false) {
    if (!this.order) return;
    const { scrollTop, clientHeight } = this.list;
    const first = Math.max(0, Math.floor(scrollTop / HEIGHT) - 2);
    const last = Math.min(this.order.length, Math.ceil((scrollTop + clientHeight) / HEIGHT) + 2);
    const wanted = new Set(this.order.slice(first, last));
    for (const [row, node] of this.nodes) {
      if (!wanted.has(row)) {
        node.remove();
        this.nodes.delete(row);
      }
    }
    for (let at = first; at < last; at += 1) {
      const row = this.order[at];
      let node = this.nodes.get(row);
      if (!node) {
        node = this.make(row);
        this.nodes.set(row, node);
        this.rows.append(node);
        this.fill(node, row);
      } else if (fresh) {
        this.fill(node, row);
      }
      node.style.top = `${at * HEIGHT}px`;
    }
    this.list.setAttribute("aria-activedescendant", this.nodes.has(this.current) ? `image-${this.current}` : "");
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.loadThumbnails(), REST);
  }

  make(row) {
    const node = document.createElement("div");
    node.id = `image-${row}`;
    node.className = "row";
    node.dataset.row = row;
    node.setAttribute("role", "option");
    node.innerHTML = '<img alt="" width="48" height="48"><div><b></b><small></small></div><span class="doubt"><i></i></span>';
    node.querySelector("b").textContent = this.names[row];
    node.title = this.names[row];
    return node;
  }

  fill(node, row) {
    const [count, doubt] = [this.counts[row], this.doubts[row]];
    const words = count === 1 ? "1 point" : `${count} points`;
    node.querySelector("small").textContent = doubt === null ? words : `${words}, doubt ${doubt.toFixed(2)}`;
    node.setAttribute("aria-selected", String(row === this.current));
    node.querySelector(".doubt").hidden = doubt === null;
    node.querySelector(".doubt i").style.width = `${100 * (doubt ?? 0)}%`;
  }

  loadThumbnails() {
    for (const [row, node] of this.nodes) {
      const image = node.querySelector("img");
      if (!image.src) image.src = `/api/images/${row}/thumbnail`;
    }
  }
}
