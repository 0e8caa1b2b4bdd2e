// Which step was on which lane, over a recorded half second: one line for each lane of each rank.

import * as api from "./api.js";
import { colour, drawn, element } from "./dom.js";

const WIDTH = 600;
const LINE = 14;
const MERGED = 0.4; // spans that are nearer than this are drawn as one, in units of the width

export async function record(place, models, ms) {
  const numbers = new Map(models.map((model) => [model.name, model.model]));
  draw(place, await api.record(ms), numbers, ms);
}

function draw(place, events, numbers, ms) {
  place.hidden = false;
  if (!events.length) {
    place.replaceChildren(element("p", { class: "quiet" }, "No step ran in that time."));
    return;
  }
  const begin = events[0].start_ns; // events come in the order of their start
  const scale = WIDTH / Math.max(ms * 1e6, events.at(-1).end_ns - begin);
  const lanes = new Map();
  for (const event of events) {
    const of = event.role === "ffn" ? ` of ${event.attention_rank}` : "";
    const name = `${event.role === "ffn" ? "FFN" : event.role} ${event.rank}, lane ${event.lane}${of}`;
    if (!lanes.has(name)) lanes.set(name, []);
    const spans = lanes.get(name);
    const [from, to] = [(event.start_ns - begin) * scale, (event.end_ns - begin) * scale];
    const last = spans.at(-1);
    if (last && last.model === event.model && from - last.to < MERGED) last.to = Math.max(last.to, to);
    else spans.push({ model: event.model, from, to });
  }
  const lines = [...lanes].sort(([a], [b]) => (a < b ? -1 : 1)).map(([name, spans]) => line(name, spans, numbers));
  const note = element("p", { class: "axis" }, element("span", {}, "0"), element("span", {}, `${ms} ms`));
  place.replaceChildren(...lines, note);
}

const box = (from, to) => `M${from},0H${to}V${LINE}H${from}Z`;

function line(name, spans, numbers) {
  const used = [...new Set(spans.map((span) => span.model ?? "a model that has gone"))];
  const svg = drawn("svg", {
    viewBox: `0 0 ${WIDTH} ${LINE}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `${name}: ${spans.length} spans of ${used.join(", ")}`,
  });
  for (const one of new Set(spans.map((span) => span.model))) {
    const own = spans.filter((span) => span.model === one);
    const path = own.map(({ from, to }) => box(from.toFixed(2), Math.max(to, from + MERGED).toFixed(2)));
    const kind = numbers.has(one) ? colour(numbers.get(one)) : "c-other";
    svg.append(drawn("path", { class: `span ${kind}`, d: path.join("") }));
  }
  return element("div", { class: "lane" }, element("span", { class: "quiet" }, name), svg);
}
