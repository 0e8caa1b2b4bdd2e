// One chart of the last minutes: areas that stand on each other, or lines. Its legend has the
// numbers, of now or of the moment to which the pointer points.

import { drawn, element, mark, say } from "./dom.js";
import { seconds } from "./format.js";
import { SECONDS } from "./history.js";

const WIDTH = 600;
const HEIGHT = 150;
const SPANS = [30, 60, 120, SECONDS]; // seconds that the width stands for, as the history grows
const NAMED = 6; // series that a chart tells apart; the others are one

export class Chart {
  /** `stacked`: areas and not lines. `format` makes text of a value. `top`: where the scale ends;
   * without it, a little above what is drawn. */
  constructor(place, { stacked, format, top }) {
    this.stacked = stacked;
    this.format = format;
    this.top = top;
    this.svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.paths = drawn("g");
    this.rule = drawn("line", { class: "rule", y1: 0, y2: HEIGHT, visibility: "hidden" });
    const grid = [0.25, 0.5, 0.75].map((part) =>
      drawn("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT * part, y2: HEIGHT * part }),
    );
    this.svg.append(...grid, this.paths, this.rule);
    this.head = element("p", { class: "value" });
    this.scale = element("span", { class: "scale" });
    this.legend = element("ul", { class: "legend" });
    const plot = element("div", { class: "plot" }, this.svg, this.scale);
    this.begin = element("span");
    const axis = element("p", { class: "axis", "aria-hidden": "true" }, this.begin, element("span", {}, "now"));
    place.append(this.head, plot, axis, this.legend);
    plot.addEventListener("pointermove", (event) => this.point(event));
    plot.addEventListener("pointerleave", () => this.point(null));
  }

  /** `series`: objects with `name`, `colour` and `values`, one for each of `times`, in seconds. */
  draw(title, head, times, series) {
    this.times = times;
    this.span = SPANS.find((span) => span >= times.at(-1) - times[0]) ?? SECONDS;
    this.series = this.stacked ? few(series) : series;
    const totals = times.map((_, i) => this.height(i));
    this.most = this.top ?? (1.15 * Math.max(...totals, 0) || 1);
    say(this.head, head);
    say(this.scale, this.format(this.most));
    say(this.begin, `${seconds(this.span)} ago`);
    mark(this.svg, "aria-label", `${title} over the last ${seconds(this.span)}; now ${head}`);
    while (this.paths.childElementCount > this.series.length) this.paths.lastChild.remove();
    while (this.paths.childElementCount < this.series.length) this.paths.append(drawn("path"));
    const floor = times.map(() => 0);
    this.series.forEach((one, index) => {
      const path = this.paths.children[index];
      mark(path, "class", `${this.stacked ? "area" : "line"} ${one.colour}`);
      mark(path, "d", this.outline(one.values, floor));
    });
    this.tell();
  }

  height(i) {
    const values = this.series.map((one) => one.values[i]);
    return this.stacked ? values.reduce((sum, value) => sum + value, 0) : Math.max(0, ...values);
  }

  x(i) {
    return WIDTH * (1 - (this.times.at(-1) - this.times[i]) / this.span);
  }

  y(value) {
    return HEIGHT * (1 - Math.min(value / this.most, 1));
  }

  /** The path of one series; stacked, it stands on `floor`, which it raises. */
  outline(values, floor) {
    const at = (i, value) => `${this.x(i).toFixed(1)},${this.y(value).toFixed(1)}`;
    if (!this.stacked) return values.map((value, i) => `${i ? "L" : "M"}${at(i, value)}`).join("");
    const below = floor.map((value, i) => at(i, value)).reverse();
    values.forEach((value, i) => (floor[i] += value));
    return `M${floor.map((value, i) => at(i, value)).join("L")}L${below.join("L")}Z`;
  }

  point(event) {
    this.pointed = undefined;
    if (event && this.times?.length) {
      const box = this.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      const distances = this.times.map((_, i) => Math.abs(this.x(i) - x));
      this.pointed = this.times.at(-1) - this.times[distances.indexOf(Math.min(...distances))];
    }
    if (this.times) this.tell();
  }

  /** Writes the legend. */
  tell() {
    const last = this.times.length - 1;
    let i = last;
    if (this.pointed !== undefined) {
      while (i > 0 && this.times[last] - this.times[i] < this.pointed) i -= 1;
      mark(this.rule, "x1", this.x(i).toFixed(1));
      mark(this.rule, "x2", this.x(i).toFixed(1));
    }
    mark(this.rule, "visibility", this.pointed === undefined ? "hidden" : "visible");
    const rows = this.legend.children;
    while (rows.length > this.series.length) this.legend.lastChild.remove();
    while (rows.length < this.series.length) {
      const parts = ["swatch", "name", "number"].map((part) => element("span", { class: part }));
      this.legend.append(element("li", {}, ...parts));
    }
    this.series.forEach((one, index) => {
      const [swatch, name, number] = rows[index].children;
      mark(swatch, "class", `swatch ${one.colour}`);
      say(name, one.name);
      say(number, this.format(one.values[i]));
    });
  }
}

/** The largest series in the order in which they came, and the sum of the others. */
function few(series) {
  const used = series.filter((one) => one.values.some((value) => value > 0));
  if (used.length <= NAMED) return used;
  const peak = (one) => Math.max(...one.values);
  const large = new Set([...used].sort((a, b) => peak(b) - peak(a)).slice(0, NAMED - 1));
  const others = used.filter((one) => !large.has(one));
  const values = others[0].values.map((_, i) => others.reduce((sum, one) => sum + one.values[i], 0));
  return [...used.filter((one) => large.has(one)), { name: `${others.length} others`, colour: "c-other", values }];
}
