// Intensities to grey: a window of intensities, straight or logarithmic, as a table of one entry a level.

const BINS = 256;

export class Contrast {
  constructor() {
    this.percent = 0.5;
    this.log = false;
  }

  // Look at an image; float images are cut into 65,536 levels for the eye.
  load({ type, values }) {
    this.base = 0;
    this.step = 1;
    if (type === "float32") {
      let low = Infinity;
      let high = -Infinity;
      for (const value of values) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
      this.base = low;
      this.step = high > low ? (high - low) / 65535 : 1;
      this.levels = Uint16Array.from(values, (value) => (value - low) / this.step);
    } else {
      this.levels = values;
    }
    this.size = type === "uint8" ? 256 : 65536;
    this.counts = new Uint32Array(this.size);
    for (const level of this.levels) this.counts[level] += 1;
    this.first = this.counts.findIndex((count) => count > 0);
    this.last = this.counts.findLastIndex((count) => count > 0);
    if (this.percent !== null || this.loaded !== type) this.stretch(this.percent ?? 0.5);
    this.loaded = type;
  }

  // The window from a percentile to its opposite; the choice stays for the next images.
  stretch(percent) {
    this.percent = percent;
    const total = this.levels.length;
    const at = (share) => {
      let sum = 0;
      for (let level = this.first; level <= this.last; level += 1) {
        sum += this.counts[level];
        if (sum > share * (total - 1)) return level;
      }
      return this.last;
    };
    this.low = at(percent / 100);
    this.high = Math.max(this.low + 1, at(1 - percent / 100));
  }

  // Move the window by shares of the image's range: the level by right, the width by up.
  drag(right, up) {
    const range = Math.max(1, this.last - this.first);
    const width = Math.max(1, (this.high - this.low) * Math.exp(-2 * up));
    const level = (this.low + this.high) / 2 + right * range;
    this.low = level - width / 2;
    this.high = level + width / 2;
    this.percent = null;
  }

  // Uint32 [size], RGBA of each level.
  table() {
    const table = new Uint32Array(this.size);
    const width = this.high - this.low;
    for (let level = 0; level < this.size; level += 1) {
      const share = Math.min(1, Math.max(0, (level - this.low) / width));
      const grey = Math.round(255 * (this.log ? Math.log1p(50 * share) / Math.log1p(50) : share));
      table[level] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
    }
    return table;
  }

  // Counts of up to 256 bins over the image's range.
  histogram() {
    const range = this.last - this.first + 1;
    const bins = new Float64Array(Math.min(BINS, range));
    for (let level = this.first; level <= this.last; level += 1) {
      bins[Math.floor(((level - this.first) * bins.length) / range)] += this.counts[level];
    }
    return bins;
  }

  // Where a level lies in the range of the image, 0 to 1.
  share(level) {
    return (level - this.first) / Math.max(1, this.last - this.first);
  }

  intensity(level) {
    return this.base + level * this.step;
  }
}
