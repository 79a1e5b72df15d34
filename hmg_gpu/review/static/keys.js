// Keys: what they are called, what they do, and the help made from the same table.

const KEYS = [
  { keys: ["Enter"], help: "add a point at the cursor, or choose the one there", action: "place" },
  { keys: ["Delete", "Backspace"], shown: "Delete", help: "remove the chosen point", action: "remove" },
  { keys: ["["], help: "shorter extent of the chosen point", action: "shorter" },
  { keys: ["]"], help: "longer extent of the chosen point", action: "longer" },
  { keys: ["s"], shown: "S", help: "choose the next point of the image", action: "choose" },
  { keys: ["n", "PageDown"], shown: "N, Page down", help: "next image", action: "next" },
  { keys: ["p", "PageUp"], shown: "P, Page up", help: "previous image", action: "previous" },
  { keys: ["d"], shown: "D", help: "next doubtful image", action: "doubtful" },
  { keys: ["Ctrl+z", "u"], shown: "Ctrl+Z, U", help: "undo", action: "undo" },
  { keys: ["Ctrl+y", "Ctrl+Z", "r"], shown: "Ctrl+Y, R", help: "redo", action: "redo" },
  { keys: ["+", "="], shown: "+", help: "zoom in", action: "zoomIn" },
  { keys: ["-"], shown: "−", help: "zoom out", action: "zoomOut" },
  { keys: ["0"], help: "the whole image", action: "fit" },
  { keys: ["m"], shown: "M", help: "masks: outline, filled, off", action: "masks" },
  { keys: ["t"], shown: "T", help: "ground truth", action: "truth" },
  { keys: ["a"], shown: "A", help: "contrast by the next percentile", action: "stretch" },
  { keys: ["l"], shown: "L", help: "logarithmic contrast", action: "log" },
  { keys: ["e"], shown: "E", help: "export", action: "exportMasks" },
  { keys: ["?", "h"], shown: "?", help: "this help", action: "help" },
];

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

const MORE = [
  ["Click, or tap", "add a point; its mask is there at once"],
  ["Drag", "move a point"],
  ["Right click, long press", "remove a point"],
  ["Shift + wheel", "extent of the point under the mouse"],
  ["Wheel, pinch", "zoom"],
  ["Space or middle button + drag", "move the image"],
  ["Right drag", "contrast: level and window"],
  ["Arrows", "move the cursor by a pixel, with Shift by ten, with Alt the chosen point"],
];

// Caps Lock changes event.key as Shift does, so with Ctrl a letter's case is that of Shift alone.
function nameOf({ key, ctrlKey, metaKey, altKey, shiftKey }) {
  const control = (ctrlKey || metaKey) && !altKey; // both together are AltGr on some systems
  const letter = key.length !== 1 ? key : shiftKey && control ? key.toUpperCase() : shiftKey ? key : key.toLowerCase();
  return control ? `Ctrl+${letter}` : letter;
}

// `actions` by name, and arrow(down, right, event).
export function listenToKeys(actions, listElement) {
  const known = new Map(KEYS.flatMap(({ keys, action }) => keys.map((key) => [key, action])));
  window.addEventListener("keydown", (event) => {
    const { target } = event;
    if (document.querySelector("dialog[open]") || target.matches("input[type=search], select")) return;
    if (event.key === "Enter" && target.matches("button, input")) return;
    const arrow = ARROWS[event.key];
    if (arrow && target === listElement) {
      event.preventDefault();
      if (arrow[0]) actions[arrow[0] > 0 ? "next" : "previous"]();
      return;
    }
    if (arrow) {
      event.preventDefault();
      actions.arrow(...arrow, event);
      return;
    }
    if (event.altKey && !["[", "]"].includes(event.key)) return; // many keyboards type brackets with Alt or AltGr
    const action = known.get(nameOf(event));
    if (!action) return;
    event.preventDefault();
    actions[action](event.timeStamp);
  });
}

export function helpRows() {
  const rows = [...MORE, ...KEYS.map(({ keys, shown, help }) => [shown ?? keys[0], help])];
  return rows.map(([key, text]) => {
    const row = document.createElement("div");
    for (const [tag, words] of [["kbd", key], ["span", text]]) {
      const cell = document.createElement(tag);
      cell.textContent = words;
      row.append(cell);
    }
    return row;
  });
}
