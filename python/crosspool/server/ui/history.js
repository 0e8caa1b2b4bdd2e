// What the page has seen over the last minutes, in the numbers that charts show.

export const SECONDS = 300;
const IN_MEMORY = new Set(["waking", "resident", "falling_asleep", "leaving"]);

export const isInMemory = (model) => IN_MEMORY.has(model.residency.state);
export const weightBytes = (model) => model.residency.attention_bytes + model.residency.ffn_bytes;

export class History {
  samples = [];

  add(now, status) {
    const before = this.samples.at(-1);
    this.samples.push({
      at: now,
      kv: status.ranks.map((rank) => kvOf(rank)),
      weights: new Map(
        status.models.filter(isInMemory).map((model) => [model.model, weightBytes(model)]),
      ),
      held: status.weights.map((use) => use.bytes),
      busySeconds: status.ranks.map((rank) => rank.busy_seconds),
      busy: status.ranks.map((rank, i) => busy(rank, before?.busySeconds[i], now - before?.at)),
    });
    while (now - this.samples[0].at > SECONDS) this.samples.shift();
  }

  get last() {
    return this.samples.at(-1);
  }
}

/** Bytes that each model has mapped on one attention rank, by the model's number. */
function kvOf(rank) {
  const chunk = rank.budget_chunks ? rank.budget_bytes / rank.budget_chunks : 0;
  const mapped = rank.models.filter((model) => model.mapped_chunks > 0);
  return new Map(mapped.map((model) => [model.model, model.mapped_chunks * chunk]));
}

/** Share of the lanes' time with a step in flight since the look before; 0 where there was none. */
function busy(rank, before, seconds) {
  if (before === undefined || !rank.lanes || !(seconds > 0)) return 0;
  return Math.min(Math.max((rank.busy_seconds - before) / seconds / rank.lanes, 0), 1);
}
