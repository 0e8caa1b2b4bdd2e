// Looks at the server once a second, and has every part of the page show what it told.

import * as api from "./api.js";
import { Chart } from "./chart.js";
import { Chat } from "./chat.js";
import { byId, colour, element, mark, offer, say } from "./dom.js";
import { Events } from "./events.js";
import { Fleet } from "./fleet.js";
import * as format from "./format.js";
import { History } from "./history.js";
import "./theme.js";
import * as timeline from "./timeline.js";

const EVERY_MS = 1000;
const NOTICE_MS = 8000;
const RECORDED_MS = 500;
const ALL = "all";

const history = new History();
const events = new Events();
const fleet = new Fleet(act);
const chat = new Chat(refused);
const charts = {
  kv: new Chart(byId("kv-chart"), { stacked: true, format: format.size }),
  weights: new Chart(byId("weights-chart"), { stacked: true, format: format.size }),
  lanes: new Chart(byId("lanes-chart"), { stacked: false, format: format.share, top: 1 }),
};
let last = null; // the latest status
let problem = ""; // why there is none at the moment
let isBarred = false; // whether the server asks for a key that it has not got

// --- looking

async function look() {
  if (!document.hidden && !isBarred) {
    try {
      show(await api.status());
    } catch (error) {
      fail(error);
    }
  }
  setTimeout(look, EVERY_MS);
}

function fail(error) {
  const text = error.message;
  if (!(error instanceof api.ServerError)) console.error(error); // a mistake of this page
  if (text !== problem) events.add(text, "bad");
  problem = text;
  health("bad", text);
  if (error.status === 401) askForKey();
}

function show(status) {
  if (problem) events.add("the server answers again", "good");
  problem = "";
  last = status;
  history.add(performance.now() / 1000, status);
  events.look(status);
  const away = status.devices.filter((device) => device.away_since !== null);
  if (status.failure || !status.ready) health("bad", status.failure ?? status.message);
  else if (away.length) health("bad", `away: ${away.map((device) => device.name).join(", ")}`);
  else health("good", status.message);
  fleet.show(status.models);
  chat.offer(status.models);
  totals(status);
  draw();
}

function health(kind, text) {
  mark(byId("health"), "data-state", kind);
  say(byId("health-text"), text);
}

const sum = (list, of) => list.reduce((total, one) => total + of(one), 0);

function totals(status) {
  const { models, ranks, devices } = status;
  const resident = models.filter((model) => model.residency.state === "resident").length;
  const figures = {
    Running: format.count(sum(models, (model) => model.running)),
    Waiting: format.count(sum(models, (model) => model.waiting)),
    "Tokens/s": format.rate(sum(models, (model) => model.tokens_per_second)),
    Resident: `${resident} of ${models.length}`,
    "KV promised": format.size(sum(ranks, (rank) => rank.promised_bytes)),
    "KV cached": format.size(sum(ranks, (rank) => rank.cached_bytes)),
    Wakes: format.count(sum(models, (model) => model.residency.wakes)),
    Restarts: format.count(sum(devices, (device) => device.restarts)),
  };
  const list = byId("totals");
  if (!list.childElementCount)
    list.append(...Object.keys(figures).map((name) => element("div", {}, element("dt", {}, name), element("dd"))));
  Object.values(figures).forEach((text, i) => say(list.children[i].lastChild, text));
}

// --- charts

const rankName = (rank, i) => `rank ${i}, ${rank.device}`;

function draw() {
  if (!last) return;
  const times = history.samples.map((sample) => sample.at);
  const { models, ranks, weights } = last;

  offer(byId("kv-rank"), [[ALL, "all ranks"], ...ranks.map((rank, i) => [String(i), rankName(rank, i)])]);
  const chosen = byId("kv-rank").value;
  const isShown = (_, i) => chosen === ALL || chosen === String(i);
  const shown = ranks.filter(isShown);
  const kv = byModel((sample, number) => sum(sample.kv.filter(isShown), (bytes) => bytes.get(number) ?? 0));
  const mapped = sum(shown, (rank) => rank.mapped_bytes);
  const budget = sum(shown, (rank) => rank.budget_bytes);
  const [inUse, all] = ["mapped_chunks", "budget_chunks"].map((of) => format.count(sum(shown, (rank) => rank[of])));
  const head = `${format.size(mapped)} of ${format.size(budget)}, ${inUse} of ${all} chunks`;
  charts.kv.draw("KV cache", head, times, kv);

  const held = sum(weights, (use) => use.bytes);
  const bounds = weights.map((use) => use.budget_bytes);
  const bound = bounds.includes(null) ? "" : ` of ${format.size(sum(bounds, (bytes) => bytes))}`;
  const series =
    byId("weights-by").value === "model"
      ? byModel((sample, number) => sample.weights.get(number) ?? 0)
      : weights.map((use, i) => ({
          name: `${use.pool === "kv" ? "attention" : "FFN"}, ${use.device}`,
          colour: colour(i),
          values: history.samples.map((sample) => sample.held[i] ?? 0),
        }));
  charts.weights.draw("Weights in memory", format.size(held) + bound, times, series);

  const busy = history.last.busy;
  const lanes = sum(ranks, (rank) => rank.lanes);
  const mean = lanes ? sum(ranks, (rank) => rank.lanes * busy[ranks.indexOf(rank)]) / lanes : 0;
  const perRank = ranks.map((rank, i) => ({
    name: `${rankName(rank, i)}, ${format.many(rank.lanes, "lane")}`,
    colour: colour(i),
    values: history.samples.map((sample) => sample.busy[i] ?? 0),
  }));
  charts.lanes.draw("Lanes", `${format.share(mean)} of their time busy`, times, perRank);

  function byModel(value) {
    return models.map((model) => ({
      name: model.name,
      colour: colour(model.model),
      values: history.samples.map((sample) => value(sample, model.model)),
    }));
  }
}

for (const id of ["kv-rank", "weights-by"]) byId(id).addEventListener("change", draw);

let isRecording = false;

byId("record").addEventListener("click", async () => {
  if (!last || isRecording) return;
  isRecording = true;
  try {
    await timeline.record(byId("timeline"), last.models, RECORDED_MS);
  } catch (error) {
    refused(error);
  } finally {
    isRecording = false;
  }
});

// --- orders

const ORDERS = {
  wake: (name) => api.wake(name),
  sleep: (name) => api.sleep(name),
  pin: (name) => api.pin(name, "pinned"),
  unpin: (name) => api.pin(name, "demand"),
  unload: (name) => api.unload(name),
};

async function act(what, name) {
  if (what === "unload" && !(await isSure(name))) return;
  try {
    await ORDERS[what](name);
  } catch (error) {
    refused(error);
  }
}

function refused(error) {
  events.add(error.message, "bad");
  if (error.status === 401) askForKey();
  else notify(error.message);
}

let noticeEnds;

function notify(text) {
  const notice = byId("notice");
  notice.hidden = false;
  say(notice, text);
  clearTimeout(noticeEnds);
  noticeEnds = setTimeout(() => (notice.hidden = true), NOTICE_MS);
}

// --- dialogs

for (const button of document.querySelectorAll("[data-close]"))
  button.addEventListener("click", () => button.closest("dialog").close());

function askForKey() {
  isBarred = true;
  const dialog = byId("key-dialog");
  say(byId("key-problem"), key401());
  if (!dialog.open) dialog.showModal();
}

const key401 = () => (api.key.get() ? "The server does not take this key." : "The server asks for a key.");

byId("key-button").addEventListener("click", () => {
  say(byId("key-problem"), "");
  byId("key-dialog").showModal();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set(byId("key-input").value);
  byId("key-input").value = "";
  byId("key-dialog").close();
  isBarred = false;
});

byId("load-button").addEventListener("click", () => {
  say(byId("load-problem"), "");
  byId("load-dialog").showModal();
});

byId("load-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const options = { path: byId("load-path").value, keep: byId("load-keep").value };
  if (byId("load-name").value) options.name = byId("load-name").value;
  say(byId("load-problem"), "");
  try {
    await api.load(options);
    byId("load-dialog").close();
  } catch (error) {
    events.add(error.message, "bad");
    if (error.status === 401) askForKey();
    else say(byId("load-problem"), error.message);
  }
});

let answerSure = null;

/** Whether the user wants the model to be unloaded. */
function isSure(name) {
  const dialog = byId("unload-dialog");
  say(byId("unload-title"), `Unload ${name}?`);
  dialog.showModal();
  return new Promise((answer) => (answerSure = answer));
}

byId("unload-form").addEventListener("submit", (event) => {
  event.preventDefault();
  answerSure(true);
  byId("unload-dialog").close();
});
byId("unload-dialog").addEventListener("close", () => answerSure(false));

look();
