// Makes and changes elements. All text comes in as text nodes: nothing is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function drawn(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Sets an element's text, unless it has that text already: a change costs layout. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export function mark(target, name, value) {
  if (target.getAttribute(name) !== value) target.setAttribute(name, value);
}

/** Makes the options of a select those of `pairs` of value and text, and keeps what is chosen. */
export function offer(select, pairs) {
  const same =
    select.options.length === pairs.length &&
    pairs.every(([value, text], i) => {
      const option = select.options[i];
      return option.value === value && option.text === text;
    });
  if (same) return;
  const chosen = select.value;
  select.replaceChildren(
    ...pairs.map(([value, text]) => {
      const option = element("option", {}, text);
      option.value = value;
      return option;
    }),
  );
  if (pairs.some(([value]) => value === chosen)) select.value = chosen;
}

/** Colours of models by number, the same as the order of `crosspool top`'s: modulo how many there are. */
export const COLOURS = 8;
export const colour = (number) => `c${number % COLOURS}`;
