// What has happened since the page was opened, as far as the server's states tell it. The newest
// event comes first, and only so many are kept.

import { byId, element } from "./dom.js";
import * as format from "./format.js";

const MOST = 200;

export class Events {
  constructor() {
    this.list = byId("events");
    this.before = null;
  }

  /** `kind` is `info`, `good` or `bad`. */
  add(text, kind = "info") {
    const now = new Date();
    const time = element("time", { datetime: now.toISOString() }, format.clock(now));
    this.list.prepend(element("li", { class: kind }, time, element("span", {}, text)));
    while (this.list.childElementCount > MOST) this.list.lastChild.remove();
  }

  /** Adds what differs from the status before. */
  look(status) {
    const before = this.before;
    this.before = status;
    if (before === null) {
      const models = format.many(status.models.length, "model");
      this.add(`watching ${models} on ${format.many(status.devices.length, "device")}`);
      return;
    }
    if (status.incarnation !== before.incarnation) {
      this.add("the scheduler was replaced; its counters begin anew", "bad");
      return;
    }
    if (status.ready !== before.ready) this.add(status.message, status.ready ? "good" : "bad");
    if (status.failure && status.failure !== before.failure) this.add(status.failure, "bad");
    this.devices(before.devices, status.devices);
    this.models(before.models, status.models);
  }

  devices(before, now) {
    const then = new Map(before.map((device) => [device.name, device]));
    for (const device of now) {
      const old = then.get(device.name);
      if (!old) continue;
      if (device.away_since !== null && device.away_since !== old.away_since)
        this.add(`device ${device.name} is away: ${device.away_cause}`, "bad");
      const away = format.seconds(device.seconds_away - old.seconds_away);
      if (device.restarts > old.restarts) this.add(`device ${device.name} is back after ${away}`, "good");
    }
  }

  models(before, now) {
    const then = new Map(before.map((model) => [model.model, model]));
    for (const model of now) {
      const old = then.get(model.model);
      then.delete(model.model);
      if (old) this.model(old, model);
      else this.add(`${model.name} was loaded`, "good");
    }
    for (const model of then.values()) this.add(`${model.name} was unloaded`);
  }

  model(old, model) {
    const [was, is] = [old.residency, model.residency];
    if (is.wakes > was.wakes) this.add(`${model.name} woke in ${format.seconds(is.last_wake_seconds)}`, "good");
    else if (is.state !== was.state) this.add(`${model.name} is ${is.state.replace("_", " ")}`);
    if (is.failed_wakes > was.failed_wakes) this.add(`${model.name} could not be woken: ${is.last_error}`, "bad");
    if (is.keep !== was.keep) this.add(`${model.name}: keep is ${is.keep}`);
    for (const [status, count] of Object.entries(model.aborted)) {
      const more = count - (old.aborted[status] ?? 0);
      if (more > 0) this.add(`${model.name}: ${format.many(more, "request")} ended with ${status}`, "bad");
    }
    const replayed = model.replayed_requests - old.replayed_requests;
    if (replayed > 0) this.add(`${model.name}: ${format.many(replayed, "request was", "requests were")} replayed`);
  }
}
