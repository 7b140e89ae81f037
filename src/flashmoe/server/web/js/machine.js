// The machine panel: follows /v1/flashmoe/state and shows it.

import { ApiError, events, request } from "./api.js";
import { byId, el } from "./dom.js";
import { BITS, HeatMap } from "./heatmap.js";
import { Line } from "./line.js";

const RETRY_MS = 3000;
const SMOOTH = 8; // states in a shown speed: 2 s, so that its digits can be read
const TABLE_EVERY = 4; // states: once a second, for whoever reads the table with a screen reader

/** Connects while it is watched, and again when the server comes back. */
export class MachinePanel {
  constructor() {
    this.map = new HeatMap(byId("map"), byId("legend"), byId("cell"));
    this.lines = { speed: new Line(byId("speed-line")), rate: new Line(byId("rate-line")) };
    this.recent = [];
    this.counts = [];
    this.states = 0;
    this.control = null;
  }

  /** Begin or end to watch. */
  watch(wanted) {
    if (wanted === (this.control !== null)) return;
    if (wanted) {
      this.control = new AbortController();
      this.#follow(this.control.signal);
    } else {
      this.control.abort();
      this.control = null;
    }
  }

  /** The theme has changed. */
  recolour() {
    this.map.recolour();
    for (const line of Object.values(this.lines)) line.draw();
  }

  async #follow(signal) {
    while (!signal.aborted) {
      try {
        for await (const { name, data } of events(await request("/v1/flashmoe/state", { signal }))) {
          if (name === "shape") this.#shape(data);
          else if (name === "state") this.#state(data);
        }
      } catch (error) {
        if (error.name === "AbortError" || error.status === 401) return;
        if (!(error instanceof ApiError || error instanceof TypeError)) throw error;
      }
      byId("speed").textContent = byId("rate").textContent = "–";
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  #shape(shape) {
    this.shape = shape;
    this.map.shape(shape.layers, shape.experts);
    this.counts = shape.layers.map(() => [0, 0]);
    this.recent = [];
    byId("slots").textContent = `${shape.slots} of ${shape.layers.length * shape.experts} fit in memory`;
    const words = { process: "Process", resident: "Resident weights", state: "Conversations", workspace: "Workspace", slots: "Expert slots" };
    const rows = Object.entries(words).map(([key, label]) => [el("dt", { text: label }), el("dd", { text: size(shape.memory[key]) })]);
    byId("plan").replaceChildren(...rows.flat());
  }

  #state(state) {
    const cells = this.map.update(state.experts);
    this.recent = [...this.recent, state].slice(-SMOOTH);
    const sum = (key) => this.recent.reduce((total, one) => total + one[key], 0);
    const seconds = sum("seconds");
    const [speed, rate] = [sum("tokens") / seconds, sum("read_bytes") / seconds];
    const asked = sum("hits") + sum("misses");
    this.lines.speed.push(state.tokens / state.seconds);
    this.lines.rate.push(state.read_bytes / state.seconds);
    byId("speed").textContent = speed >= 10 ? speed.toFixed(0) : speed.toFixed(1);
    byId("rate").textContent = rate >= 1e9 ? (rate / 1e9).toFixed(2) : (rate / 1e6).toFixed(0);
    byId("rate-unit").textContent = rate >= 1e9 ? "GB/s read" : "MB/s read";
    byId("hit-rate").textContent = asked ? `${((100 * sum("hits")) / asked).toFixed(1)} %` : "–";
    byId("stall").textContent = `${((100 * sum("stall_seconds")) / seconds).toFixed(0)} % of the time`;
    byId("answers").textContent = state.waiting ? `${state.running} running, ${state.waiting} wait` : `${state.running} running`;
    this.#memory(state);
    this.#table(cells, state);
  }

  #memory({ memory_bytes: now, peak_bytes: peak }) {
    const { budget } = this.shape.memory;
    const share = (value) => `${Math.min(100, (100 * value) / budget)}%`;
    const text = `${size(now)} of at most ${size(budget)}`;
    byId("memory-text").textContent = text;
    byId("meter-now").style.width = share(now);
    byId("meter-peak").style.left = share(peak);
    const meter = byId("meter");
    meter.title = `Largest so far: ${size(peak)}`;
    meter.setAttribute("aria-valuemax", budget);
    meter.setAttribute("aria-valuenow", now);
    meter.setAttribute("aria-valuetext", text);
  }

  #table(cells, state) {
    const { layers, experts } = this.shape;
    const rows = layers.map((layer, i) => {
      const row = cells.subarray(i * experts, (i + 1) * experts);
      const count = (bit) => row.reduce((total, cell) => total + ((cell & bit) !== 0), 0);
      this.counts[i][0] += state.layer_hits[i];
      this.counts[i][1] += state.layer_misses[i];
      return [layer, count(BITS.resident), ...this.counts[i], count(BITS.flight)];
    });
    if (this.states++ % TABLE_EVERY || !byId("layers").open) return;
    const body = byId("layer-rows");
    rows.forEach((values, i) => {
      body.children[i] ?? body.append(el("tr", {}, el("th", { scope: "row" }), values.slice(1).map(() => el("td"))));
      values.forEach((value, j) => (body.children[i].children[j].textContent = value));
    });
    while (body.children.length > rows.length) body.lastElementChild.remove();
  }
}

function size(bytes) {
  return bytes >= 1 << 30 ? `${(bytes / (1 << 30)).toFixed(2)} GiB` : `${(bytes / (1 << 20)).toFixed(0)} MiB`;
}
