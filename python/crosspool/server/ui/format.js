// Figures as text.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${unit === 0 || bytes >= 100 ? Math.round(bytes) : bytes.toFixed(1)} ${UNITS[unit]}`;
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 60) return `${Math.floor(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86400) return `${Math.floor(value / 3600)} h`;
  return `${Math.floor(value / 86400)} d`;
}

/** How long ago, in steps that do not change a table every second. */
export function ago(value) {
  if (value === null) return "never";
  if (value === 0) return "now";
  if (value < 60) return `${10 * Math.floor(value / 10) || "< 10"} s ago`;
  return `${seconds(value)} ago`;
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(value);
export const rate = (value) => (value === 0 ? "0" : value < 10 ? value.toFixed(1) : count(Math.round(value)));
export const many = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;
export const share = (value) => `${Math.round(100 * value)} %`;
export const clock = (date) => date.toTimeString().slice(0, 8);
