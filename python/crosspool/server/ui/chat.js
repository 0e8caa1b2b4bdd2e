// A conversation with one model, and how fast it answers.

import * as api from "./api.js";
import { byId, element, offer, say } from "./dom.js";
import * as format from "./format.js";

const MOST_TURNS = 40;

export class Chat {
  /** `refused` is called with an error of the server's. */
  constructor(refused) {
    this.refused = refused;
    this.messages = [];
    this.turns = byId("turns");
    this.prompt = byId("prompt");
    this.stopping = null;
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stopping?.abort());
    byId("chat-clear").addEventListener("click", () => this.clear());
  }

  offer(models) {
    const names = models.map((model) => model.name).sort();
    offer(byId("chat-model"), names.map((name) => [name, name]));
  }

  clear() {
    this.stopping?.abort();
    this.messages = [];
    this.turns.replaceChildren();
    say(byId("chat-figures"), "");
  }

  turn(who, kind) {
    const text = element("p", { class: "said" });
    this.turns.append(element("div", { class: `turn ${kind}` }, element("p", { class: "who" }, who), text));
    while (this.turns.childElementCount > MOST_TURNS) this.turns.firstChild.remove();
    this.turns.scrollTop = this.turns.scrollHeight;
    return text;
  }

  async send() {
    const content = this.prompt.value.trim();
    const model = byId("chat-model").value;
    if (!content || !model || this.stopping) return;
    this.prompt.value = "";
    const messages = [...this.messages, { role: "user", content }].slice(-MOST_TURNS);
    this.turn("you", "user").textContent = content;
    const said = this.turn(model, "assistant");
    this.busy(new AbortController());
    const watch = { began: performance.now() };
    try {
      const body = {
        model,
        messages,
        stream: true,
        stream_options: { include_usage: true },
        max_tokens: Math.max(1, Number(byId("chat-tokens").value) || 1),
      };
      for await (const told of api.chat(body, this.stopping.signal)) this.hear(told, said, watch);
    } catch (error) {
      if (error.name !== "AbortError") {
        said.parentElement.classList.add("failed");
        said.append(`${said.textContent ? "\n" : ""}${error.message}`);
        this.refused(error);
      }
    } finally {
      this.busy(null);
    }
    if (watch.answer) this.messages = [...messages, { role: "assistant", content: watch.answer }];
    this.tell(watch);
  }

  hear(told, said, watch) {
    if (told.usage) watch.tokens = told.usage.completion_tokens;
    const delta = told.choices?.[0]?.delta;
    const [thought, text] = [delta?.reasoning_content ?? "", delta?.content ?? ""];
    if (!thought && !text) return;
    watch.last = performance.now();
    watch.first ??= watch.last;
    watch.answer = (watch.answer ?? "") + text;
    said.append(thought ? element("span", { class: "thought" }, thought) : text);
    this.turns.scrollTop = this.turns.scrollHeight;
  }

  tell({ began, first, last, tokens }) {
    const figures = [];
    if (first) figures.push(`TTFT ${format.seconds((first - began) / 1000)}`);
    if (tokens > 1 && last > first) figures.push(`${format.rate((tokens - 1) / ((last - first) / 1000))} tokens/s`);
    if (tokens) figures.push(`${format.count(tokens)} tokens`);
    say(byId("chat-figures"), figures.join(" · "));
  }

  busy(stopping) {
    this.stopping = stopping;
    this.turns.setAttribute("aria-busy", String(stopping !== null));
    byId("send").hidden = stopping !== null;
    byId("stop").hidden = stopping === null;
  }
}
