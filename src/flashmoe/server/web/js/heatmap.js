// Layers x experts on a canvas.  What was used glows and fades within a second.

export const BITS = { resident: 1, hit: 2, miss: 4, flight: 8 };
const FADE_MS = 900;
const LARGEST_CELL = 18; // pixels
const HEIGHT = 380; // pixels that a map may take at most
const GRID_FROM = 5; // pixels of a cell, from which a gap separates it from the next

/** The map; legend holds the colours as swatches, told is where the chosen expert is described. */
export class HeatMap {
  constructor(canvas, legend, told) {
    Object.assign(this, { canvas, legend, told });
    this.context = canvas.getContext("2d");
    this.layers = [];
    this.experts = 0;
    this.cells = new Uint8Array();
    this.chosen = null; // [layer's index, expert]
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.drawing = 0;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#choose(null));
    canvas.addEventListener("blur", () => this.#choose(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#fit()).observe(canvas.parentElement);
    this.recolour();
  }

  /** How many there are. */
  shape(layers, experts) {
    this.layers = layers;
    this.experts = experts;
    this.cells = new Uint8Array(layers.length * experts);
    this.used = new Float64Array(this.cells.length).fill(-Infinity); // when each was asked for last, ms
    this.missed = new Uint8Array(this.cells.length); // whether that was a miss
    this.#fit();
  }

  /** A picture: half a byte an expert, base64.  Returns the bits of each. */
  update(text) {
    const packed = atob(text);
    const now = performance.now();
    for (let i = 0; i < this.cells.length; i++) {
      const bits = (packed.charCodeAt(i >> 1) >> (i & 1 ? 4 : 0)) & 15;
      this.cells[i] = bits;
      if (bits & (BITS.hit | BITS.miss)) {
        this.used[i] = now;
        this.missed[i] = bits & BITS.miss ? 1 : 0;
      }
    }
    this.#tell();
    this.#draw();
    return this.cells;
  }

  /** Take the colours from the legend again. */
  recolour() {
    this.colours = {};
    for (const swatch of this.legend.querySelectorAll("[data-state]")) {
      this.colours[swatch.dataset.state] = rgb(getComputedStyle(swatch).backgroundColor);
    }
    this.#draw();
  }

  /** Layers run to the right, as a token does, unless the cells are larger the other way. */
  #fit() {
    const [n, e] = [this.layers.length, this.experts];
    if (!n || !e) return;
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    const smaller = (across, down) => Math.min(width / across, HEIGHT / down);
    this.flipped = smaller(e, n) > 1.5 * smaller(n, e);
    const [across, down] = this.flipped ? [e, n] : [n, e];
    this.step = [width / across, Math.min(LARGEST_CELL, HEIGHT / down)];
    const height = this.step[1] * down;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * devicePixelRatio);
    this.canvas.height = Math.round(height * devicePixelRatio);
    const axes = [`layers 0–${n - 1} →`, `experts 0–${e - 1} ↓`];
    document.getElementById("axis-x").textContent = this.flipped ? axes[1].replace("↓", "→") : axes[0];
    document.getElementById("axis-y").textContent = this.flipped ? axes[0].replace("→", "↓") : axes[1];
    this.#draw();
  }

  /** On the next frame, and on those after it while something fades. */
  #draw() {
    if (!this.step || this.drawing) return;
    this.drawing = requestAnimationFrame((now) => {
      this.drawing = 0;
      if (this.#paint(now) && !this.still.matches) this.#draw();
    });
  }

  #paint(now) {
    const { context, canvas, cells, experts, step, flipped } = this;
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const gap = Math.min(...step) >= GRID_FROM ? 1.5 : 0;
    let fading = false;
    for (let i = 0; i < cells.length; i++) {
      const [layer, expert] = [Math.floor(i / experts), i % experts];
      const [column, row] = flipped ? [expert, layer] : [layer, expert];
      const glow = Math.max(0, 1 - (now - this.used[i]) / FADE_MS);
      fading ||= glow > 0;
      context.fillStyle = this.#colour(i, glow);
      context.fillRect(column * step[0], row * step[1], step[0] - gap, step[1] - gap);
    }
    if (this.chosen) {
      const [column, row] = flipped ? [this.chosen[1], this.chosen[0]] : this.chosen;
      context.strokeStyle = getComputedStyle(canvas).color;
      context.lineWidth = 2;
      context.strokeRect(column * step[0] - 1, row * step[1] - 1, step[0] + 2 - gap, step[1] + 2 - gap);
    }
    return fading;
  }

  #colour(i, glow) {
    const { colours } = this;
    const bits = this.cells[i];
    if (bits & BITS.flight) return `rgb(${colours.flight})`;
    const base = bits & BITS.resident ? colours.resident : colours.absent;
    if (!glow) return `rgb(${base})`;
    const top = this.missed[i] ? colours.miss : colours.hit;
    const share = this.still.matches ? 1 : glow;
    return `rgb(${base.map((value, j) => Math.round(value + (top[j] - value) * share))})`;
  }

  #point({ offsetX, offsetY }) {
    if (!this.step) return;
    const place = [Math.floor(offsetX / this.step[0]), Math.floor(offsetY / this.step[1])];
    this.#choose(this.flipped ? place.reverse() : place);
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = event.altKey ? undefined : moves[event.key];
    if (!move) return;
    event.preventDefault();
    const [a, b] = this.flipped ? [...move].reverse() : move;
    const [layer, expert] = this.chosen ?? [-a, -b];
    this.#choose([layer + a, expert + b]);
  }

  #choose(place) {
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.chosen = place && this.layers.length ? [clamp(place[0], this.layers.length), clamp(place[1], this.experts)] : null;
    this.#tell();
    this.#draw();
  }

  #tell() {
    let text = "";
    if (this.chosen) {
      const [layer, expert] = this.chosen;
      const i = layer * this.experts + expert;
      const bits = this.cells[i];
      const place = bits & BITS.flight ? "being read" : bits & BITS.resident ? "in memory" : "on the drive";
      const use = this.used[i] === -Infinity ? "not used yet" : this.missed[i] ? "last use: miss" : "last use: hit";
      text = `Layer ${this.layers[layer]}, expert ${expert}: ${place}, ${use}`;
    }
    if (this.told.textContent !== text) this.told.textContent = text;
  }
}

function rgb(text) {
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
}
