// Shows one question and its answer while the answer arrives. Knows no server.

import { picturePart } from "./client.js";

const template = document.querySelector("#exchange-template");
const count = new Intl.NumberFormat("en");

/** A question, `{words, pictures}`, and the answer as far as it has come. */
export class Exchange {
  answer = "";
  thoughts = "";
  #frame = 0;

  /** `retry()` and `edit()` are called when the reader wants them. */
  constructor(question, { retry, edit }) {
    this.question = question;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.#find(".question .pictures").append(...question.pictures.map((picture) => picture.element));
    this.#find(".words").textContent = question.words;
    this.#find(".retry").addEventListener("click", retry);
    this.#find(".edit").addEventListener("click", edit);
    this.#find(".copy").addEventListener("click", ({ target }) => this.#copy(target));
  }

  /** The question and, where there is one, the answer, as messages of a chat completion. */
  get messages() {
    const { words, pictures } = this.question;
    const parts = pictures.map((picture) => picturePart(picture.url));
    if (words) parts.push({ type: "text", text: words });
    const asked = { role: "user", content: pictures.length ? parts : words };
    const said = { role: "assistant", content: this.answer };
    if (this.thoughts) said.reasoning_content = this.thoughts;
    return this.answer ? [asked, said] : [asked];
  }

  begin() {
    this.answer = this.thoughts = "";
    this.#draw();
    this.#find(".answer").setAttribute("aria-busy", "true");
    this.#find(".problem").hidden = this.#find(".after").hidden = true;
  }

  /** More of the answer, on the page with the next frame: `around` is given what draws it. */
  add(text, around) {
    this.answer += text;
    this.#drawSoon(around);
  }

  /** More of what is thought before the answer. */
  think(text, around) {
    this.thoughts += text;
    this.#drawSoon(around);
  }

  #drawSoon(around) {
    this.#frame ||= requestAnimationFrame(() => around(() => this.#draw()));
  }

  /** The answer is as whole as it will be; a `problem` is said below it, with a way to try again. */
  end(figures, problem) {
    this.#draw();
    this.#find(".answer").removeAttribute("aria-busy");
    this.#find(".figures").textContent = figures;
    this.#find(".copy").hidden = !this.answer;
    this.#find(".after").hidden = !this.answer && !figures;
    this.#find(".problem span").textContent = problem;
    this.#find(".problem").hidden = !problem;
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    draw(this.#find(".answer"), this.answer);
    this.#find(".thoughts").hidden = !this.thoughts;
    this.#find(".thoughts summary").textContent = this.answer ? "Thoughts" : "Thinking…";
    this.#find(".thoughts p").textContent = this.thoughts.trim();
  }

  async #copy(button) {
    await copy(this.answer);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
}

/** The quiet line below an answer: `usage` as the server counts it or null, times in milliseconds. */
export function figuresOf({ usage, started, first, last, ending }) {
  const said = [];
  if (usage) {
    said.push(`${plural(usage.prompt_tokens, "prompt token")}${details(usage.prompt_tokens_details)}`);
    said.push(plural(usage.completion_tokens, "answer token"));
    const rate = (usage.completion_tokens - 1) / ((last - first) / 1000);
    if (rate > 0 && Number.isFinite(rate)) said.push(`${rate.toPrecision(3)} tokens/s`);
  }
  if (first !== null) said.push(`first token after ${((first - started) / 1000).toFixed(2)} s`);
  return [...said, ...ending].map(unbroken).join("\u00a0· ");
}

/** A line may break before a bracket and after a comma, nowhere else within one figure. */
function unbroken(text) {
  return text.replace(/([^,]) (?!\()/g, "$1\u00a0");
}

function details({ image_tokens: pictures, cached_tokens: cached } = {}) {
  const said = [];
  if (pictures) said.push(`${count.format(pictures)} in pictures`);
  if (cached) said.push(`${count.format(cached)} cached`);
  return said.length ? ` (${said.join(", ")})` : "";
}

function plural(number, noun) {
  return `${count.format(number)} ${noun}${number === 1 ? "" : "s"}`;
}

// Text between ``` fences stands in <pre>, all else in <p>. Only blocks that differ are touched, so that a selection
// in an earlier one survives; everything goes in as text, never as HTML.
function draw(element, answer) {
  const blocks = blocksOf(answer);
  blocks.forEach(({ tag, text }, index) => {
    let block = element.children[index];
    if (block?.localName !== tag) {
      const fresh = document.createElement(tag);
      block ? block.replaceWith(fresh) : element.append(fresh);
      block = fresh;
      if (tag === "pre") block.tabIndex = 0; // a wide one is scrolled with the arrow keys
    }
    if (block.textContent !== text) block.textContent = text;
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

function blocksOf(answer) {
  const blocks = [];
  let inCode = false;
  for (const piece of answer.split(/^ {0,3}```.*(?:\n|$)/m)) {
    const text = inCode ? piece.replace(/\n$/, "") : piece.trim();
    if (text) blocks.push({ tag: inCode ? "pre" : "p", text });
    inCode = !inCode;
  }
  return blocks;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // plain http beyond this machine has no clipboard to write to
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
