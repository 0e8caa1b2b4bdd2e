// The table of models. A row and its buttons stay the same elements for as long as the model is
// there, so that neither focus nor the screen reader's place is lost; only texts that differ change.

import { byId, colour, element, mark, say } from "./dom.js";
import * as format from "./format.js";
import { isInMemory, weightBytes } from "./history.js";

const memory = (model) => model.mapped_bytes + (isInMemory(model) ? weightBytes(model) : 0);
const idle = (model) => model.residency.idle_seconds ?? Infinity;
const SORTS = {
  name: () => 0,
  state: (model) => Number(model.residency.state !== "resident"),
  "tokens/s": (model) => -model.tokens_per_second,
  memory: (model) => -memory(model),
  requests: (model) => -model.requests,
  "last used": (model) => Math.floor(idle(model) / 10),
  wakes: (model) => -model.residency.wakes,
};

function stateText({ residency }) {
  const text = residency.state.replace("_", " ");
  if (residency.state !== "waking" || !residency.total_bytes) return text;
  return `${text} ${format.share(residency.read_bytes / residency.total_bytes)}`;
}

/** In brackets stands what the weights would take, were they in memory. */
const weightText = (model, size) => (isInMemory(model) ? size : `(${size})`);

const COLUMNS = [
  ["State", stateText],
  ["Keep", (model) => model.residency.keep],
  ["KV", (model) => format.size(model.mapped_bytes)],
  ["Weights", (model) => weightText(model, format.size(weightBytes(model)))],
  ["Running", (model) => format.count(model.running)],
  ["Waiting", (model) => format.count(model.waiting)],
  ["Requests", (model) => format.count(model.requests)],
  ["Tokens/s", (model) => format.rate(model.tokens_per_second)],
  ["Last used", (model) => format.ago(model.residency.idle_seconds)],
  ["Wakes", (model) => format.count(model.residency.wakes)],
];
const FIRST_NUMBER = 2; // columns from here on are numbers

class Row {
  constructor(name, act) {
    this.name = name;
    this.pending = null;
    this.swatch = element("span", { class: "swatch", "aria-hidden": "true" });
    const heading = element("th", { scope: "row", role: "rowheader" }, this.swatch, element("span", {}, name));
    this.cells = COLUMNS.map(([label], i) =>
      element("td", { role: "cell", "data-label": label, class: i < FIRST_NUMBER ? "word" : "number" }),
    );
    this.state = element("span", { class: "state" }, element("span", { class: "dot" }), element("span"));
    this.cells[0].append(this.state);
    this.buttons = ["wake", "pin", "unload"].map((what) => {
      const button = element("button", { type: "button" });
      button.addEventListener("click", () => act(this.orders[what], name));
      return button;
    });
    this.orders = {};
    const actions = element("td", { role: "cell", class: "actions" }, ...this.buttons);
    this.element = element("tr", { role: "row" }, heading, ...this.cells, actions);
  }

  show(model) {
    this.model = model;
    const { state, keep } = model.residency;
    mark(this.swatch, "class", `swatch ${colour(model.model)}`);
    mark(this.state, "data-state", state);
    COLUMNS.forEach(([, text], i) => say(i === 0 ? this.state.lastChild : this.cells[i], text(model)));
    this.orders = {
      wake: state === "asleep" || state === "falling_asleep" ? "wake" : "sleep",
      pin: keep === "pinned" ? "unpin" : "pin",
      unload: "unload",
    };
    Object.values(this.orders).forEach((order, i) => {
      const button = this.buttons[i];
      const text = order[0].toUpperCase() + order.slice(1);
      say(button, text);
      mark(button, "aria-label", `${text} ${model.name}`);
      // Not disabled, or the focus would be lost.
      mark(button, "aria-disabled", String(this.pending !== null || state === "leaving"));
    });
    mark(this.element, "aria-busy", String(this.pending !== null));
  }
}

export class Fleet {
  /** `act` is called with an order and a model's name, and returns when it has been carried out. */
  constructor(act) {
    this.act = act;
    this.rows = new Map();
    this.models = [];
    this.body = byId("models");
    this.filter = byId("filter");
    this.sort = byId("sort");
    const labels = ["Model", ...COLUMNS.map(([label]) => label)];
    byId("headings").append(
      ...labels.map((label, i) =>
        element("th", { scope: "col", role: "columnheader", class: i > FIRST_NUMBER ? "number" : "word" }, label),
      ),
      element("th", { scope: "col", role: "columnheader" }, element("span", { class: "unseen" }, "Orders")),
    );
    this.sort.append(...Object.keys(SORTS).map((name) => element("option", {}, name)));
    this.filter.addEventListener("input", () => this.arrange());
    this.sort.addEventListener("change", () => this.arrange());
  }

  show(models) {
    this.models = models;
    const names = new Set(models.map((model) => model.name));
    for (const [name, row] of this.rows) {
      if (names.has(name)) continue;
      row.element.remove();
      this.rows.delete(name);
    }
    for (const model of models) {
      let row = this.rows.get(model.name);
      if (!row) this.rows.set(model.name, (row = new Row(model.name, (what, name) => this.order(what, name))));
      row.show(model);
    }
    this.arrange();
  }

  /** Puts the rows that fit the filter in order. Rows move only where the order has changed. */
  arrange() {
    const wanted = this.filter.value.trim().toLowerCase();
    const by = SORTS[this.sort.value];
    const shown = this.models
      .filter((model) => model.name.toLowerCase().includes(wanted))
      .sort((a, b) => by(a) - by(b) || (a.name < b.name ? -1 : 1))
      .map((model) => this.rows.get(model.name).element);
    const now = [...this.body.children];
    const isSame = now.length === shown.length && shown.every((row, i) => row === now[i]);
    if (!isSame) {
      const focused = document.activeElement;
      this.body.replaceChildren(...shown);
      if (focused?.isConnected) focused.focus({ preventScroll: true });
    }
    byId("no-models").hidden = shown.length > 0;
    const all = format.count(this.models.length);
    say(byId("fleet-count"), shown.length === this.models.length ? all : `${shown.length} of ${all}`);
  }

  async order(what, name) {
    const row = this.rows.get(name);
    if (row.pending !== null || row.model.residency.state === "leaving") return;
    row.pending = what;
    row.show(row.model);
    try {
      await this.act(what, name);
    } finally {
      row.pending = null;
      if (this.rows.get(name) === row) row.show(row.model);
    }
  }
}
