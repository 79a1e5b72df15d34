// Mouse, pen and fingers on the image.
//
// Mouse and pen: a press adds a point at once and a drag moves it; the right button removes a point or, dragged, changes
// the window; the middle button or the space bar held moves the image; the wheel zooms, with Shift it changes an extent.
// Fingers: a tap adds, a drag that begins on a point moves it, any other drag and two fingers move the image, a long
// press on a point removes it.

const STILL = 5; // screen pixels that a press may move and stay a click
const LONG = 600; // milliseconds
const FINGER = 22; // screen pixels around a point that a finger still hits

export class Pointer {
  // `actions`: press(pixel, point, since), drag(pixel), release(), remove(point), pan, zoom, window, resize, hover, choose
  constructor(canvas, picture, actions) {
    Object.assign(this, { canvas, picture, actions });
    this.fingers = new Map();
    this.held = null;
    this.space = false;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => actions.hover(null, null));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    window.addEventListener("keydown", (event) => this.key(event, true));
    window.addEventListener("keyup", (event) => this.key(event, false));
    window.addEventListener("blur", () => (this.space = false));
  }

  key(event, down) {
    if (event.code === "Space" && document.activeElement === this.canvas) {
      this.space = down;
      event.preventDefault();
    }
  }

  placeOf(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }

  down(event) {
    if (!this.picture.image) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    const place = this.placeOf(event);
    if (this.held?.kind === "point") this.actions.release(); // a second finger ends the first one's drag
    this.held = { start: place, last: place, moved: false, kind: "none" };
    if (event.pointerType === "touch") this.fingerDown(event, place);
    else if (event.button === 1 || (event.button === 0 && this.space)) this.held.kind = "pan";
    else if (event.button === 2) this.held.kind = "window";
    else if (event.button === 0) this.press(place, event.timeStamp);
  }

  press(place, since, near) {
    const point = this.picture.pointAt(place.x, place.y, near);
    const pixel = this.picture.pixelAt(place.x, place.y);
    this.held.kind = pixel || point ? "point" : "pan";
    if (pixel || point) this.actions.press(pixel, point, since);
  }

  fingerDown(event, place) {
    this.fingers.set(event.pointerId, place);
    clearTimeout(this.long);
    if (this.fingers.size > 1) {
      this.held.kind = "pinch";
      return;
    }
    const point = this.picture.pointAt(place.x, place.y, FINGER);
    this.held.kind = "tap";
    if (!point) return;
    this.press(place, event.timeStamp, FINGER);
    this.long = setTimeout(() => {
      if (this.held && !this.held.moved) {
        this.held.kind = "none";
        this.actions.release();
        this.actions.remove(point);
      }
    }, LONG);
  }

  move(event) {
    if (!this.picture.image) return;
    const place = this.placeOf(event);
    const { held } = this;
    if (!held) {
      this.actions.hover(this.picture.pixelAt(place.x, place.y), this.picture.pointAt(place.x, place.y));
      return;
    }
    if (Math.hypot(place.x - held.start.x, place.y - held.start.y) > STILL) held.moved = true;
    if (held.kind === "pinch") {
      this.pinch(event.pointerId, place);
      return;
    }
    if (!held.moved) return;
    if (held.kind === "tap") held.kind = "pan";
    const [right, down] = [place.x - held.last.x, place.y - held.last.y];
    held.last = place;
    if (held.kind === "pan") this.actions.pan(right, down);
    if (held.kind === "window") this.actions.window(right / 400, -down / 400);
    if (held.kind === "point") {
      const pixel = this.picture.pixelAt(place.x, place.y);
      if (pixel) this.actions.drag(pixel);
    }
  }

  pinch(id, place) {
    const [other] = [...this.fingers].filter(([key]) => key !== id).map(([, value]) => value);
    const before = this.fingers.get(id);
    if (other && before) {
      const distance = (one) => Math.hypot(one.x - other.x, one.y - other.y);
      this.actions.pan((place.x - before.x) / 2, (place.y - before.y) / 2);
      this.actions.zoom(distance(place) / Math.max(1, distance(before)), (place.x + other.x) / 2, (place.y + other.y) / 2);
    }
    this.fingers.set(id, place);
  }

  up(event) {
    clearTimeout(this.long);
    this.fingers.delete(event.pointerId);
    const { held } = this;
    if (!held || this.fingers.size) return;
    this.held = null;
    const place = this.placeOf(event);
    const cancelled = event.type === "pointercancel";
    if (held.kind === "point") this.actions.release();
    if (held.kind === "window" && !held.moved && !cancelled) {
      const point = this.picture.pointAt(place.x, place.y);
      if (point) this.actions.remove(point);
    }
    if (held.kind === "tap" && !cancelled) {
      const pixel = this.picture.pixelAt(place.x, place.y);
      if (pixel) {
        this.actions.press(pixel, null, event.timeStamp);
        this.actions.release();
      }
    }
  }

  wheel(event) {
    event.preventDefault();
    if (!this.picture.image) return;
    const place = this.placeOf(event);
    const turn = event.deltaY || event.deltaX; // with Shift some systems turn it sideways
    if (event.shiftKey) this.actions.resize(this.picture.pointAt(place.x, place.y), turn < 0 ? 1 : -1);
    else this.actions.zoom(Math.exp(-Math.max(-200, Math.min(200, turn)) * 0.002), place.x, place.y);
  }
}
