// The conversation on the page: turns the user's actions into requests. Knows no wire format: client.js does.

import { MOST_BYTES, Problem, completion, firstModel, pictureCosts, whenKeyIsWanted } from "./client.js";
import { Pictures } from "./pictures.js";
import { Exchange, figuresOf } from "./exchange.js";

const find = (selector) => document.querySelector(selector);
const [words, send, notice, conversation, settings] = ["#words", "#send", "#notice", "#conversation", "#settings"].map(find);
const pictures = new Pictures(find("#pictures"), { costs, changed, tell });
const count = new Intl.NumberFormat("en");

let exchanges = [];
let running = null; // the AbortController of the answer that is being written
let model = null; // as the server describes it, once it has

async function connect() {
  try {
    await meet();
  } catch (error) {
    tell(sentenceOf(error), reconnect);
  }
}

function reconnect() {
  tell(tooLarge());
  home();
  connect();
}

/** Learn who answers, once. */
async function meet() {
  if (model) return;
  model = await firstModel();
  find("#model").textContent = `${model.id} · ${count.format(Math.round(model.max_model_len / 1024))}k context`;
  find("#model").title = `Questions and answers together take up to ${count.format(model.max_model_len)} tokens`;
  document.title = `${model.id} · pixtral`;
}

async function costs(urls) {
  if (tooLarge()) return [];
  try {
    return await pictureCosts(urls);
  } catch (error) {
    tell(sentenceOf(error));
    return [];
  }
}

async function ask() {
  await pictures.ready();
  const text = words.value.trim();
  if (running || (!text && !pictures.all.length)) return;
  if (tooLarge()) return tell(tooLarge());
  const exchange = new Exchange({ words: text, pictures: pictures.take() }, { retry: () => retry(exchange), edit: () => edit(exchange) });
  words.value = "";
  exchanges.push(exchange);
  conversation.append(exchange.element);
  changed();
  await answer(exchange);
}

async function answer(exchange) {
  if (running) return;
  const run = (running = new AbortController());
  busy(true);
  exchange.begin();
  toEnd();
  const seen = { usage: null, started: performance.now(), first: null, last: null, ending: [], problem: "" };
  try {
    await meet();
    for await (const chunk of completion(requestFor(exchange), run.signal)) take(exchange, chunk, seen);
    if (!exchange.answer) seen.problem = "The answer is empty.";
  } catch (error) {
    if (!run.signal.aborted) seen.problem = sentenceOf(error);
    else if (exchange.answer) seen.ending.push("stopped");
    else seen.problem = "Stopped before the first word.";
  }
  following(() => exchange.end(figuresOf(seen), seen.problem));
  if (running === run) busy(false);
}

function take(exchange, chunk, seen) {
  if (chunk.usage) seen.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (choice?.finish_reason === "length") seen.ending.push("cut off at max tokens");
  const { content, reasoning_content: thought } = choice?.delta ?? {};
  if (!content && !thought) return;
  seen.last = performance.now();
  seen.first ??= seen.last;
  if (thought) exchange.think(thought, following);
  if (content) exchange.add(content, following);
}

// Questions that failed without a word of answer are not history: a model expects each to be answered.
function requestFor(exchange) {
  const before = exchanges.slice(0, exchanges.indexOf(exchange)).filter((earlier) => earlier.answer);
  const messages = [...before, exchange].flatMap((each) => each.messages);
  const system = find("#system").value.trim();
  if (system) messages.unshift({ role: "system", content: system });
  const request = { model: model.id, messages, stream: true, stream_options: { include_usage: true } };
  for (const [field, selector] of [["temperature", "#temperature"], ["max_tokens", "#max-tokens"]]) {
    const value = find(selector).valueAsNumber;
    if (!Number.isNaN(value)) request[field] = value;
  }
  return JSON.stringify(request);
}

function stop() {
  running?.abort();
}

function retry(exchange) {
  home(); // the button is gone, and its focus with it
  answer(exchange);
}

function edit(exchange) {
  if (running) return;
  exchanges = exchanges.filter((kept) => kept !== exchange);
  exchange.element.remove();
  words.value = [exchange.question.words, words.value].filter(Boolean).join("\n");
  pictures.giveBack(exchange.question.pictures);
  home();
}

function clear() {
  stop();
  running = null;
  exchanges = [];
  conversation.replaceChildren();
  busy(false);
  changed();
  home();
}

/** Back to writing; not where that would cover the page with a phone's keyboard. */
function home() {
  if (!matchMedia("(pointer: coarse)").matches) words.focus();
}

function busy(on) {
  if (!on) running = null;
  document.body.classList.toggle("busy", on);
  send.setAttribute("aria-label", on ? "Stop" : "Send");
  send.title = on ? "Stop (Esc)" : "Send (Enter)";
  changed();
}

function changed() {
  words.style.height = "auto";
  words.style.height = `${words.scrollHeight}px`;
  send.disabled = !running && !words.value.trim() && !pictures.all.length;
  find("#clear").hidden = exchanges.length === 0;
  find("#welcome").hidden = exchanges.length > 0;
  tell(tooLarge());
}

/** A sentence when the next request would be more than the server takes, else nothing. */
function tooLarge() {
  const sent = exchanges.filter((exchange) => exchange.answer).flatMap((exchange) => exchange.question.pictures);
  const bytes = [...sent, ...pictures.all].reduce((sum, picture) => sum + picture.url.length, 0);
  if (bytes < MOST_BYTES) return "";
  const all = sent.length ? "The pictures of this conversation" : "These pictures";
  const remedy = sent.length ? "Remove some, or clear the conversation." : "Remove some.";
  return `${all} are ${Math.ceil(bytes / 2 ** 20)} MiB to send; the server takes less than ${MOST_BYTES / 2 ** 20}. ${remedy}`;
}

function tell(sentence, retry = null) {
  notice.hidden = !sentence;
  notice.querySelector("span").textContent = sentence;
  notice.querySelector("button").hidden = !retry;
  notice.querySelector("button").onclick = retry;
}

function sentenceOf(error) {
  if (error instanceof Problem) return error.message;
  console.error(error);
  return "The page did not understand the server’s answer.";
}

/** Who reads at the end stays there when `change` makes the page longer; who has scrolled up is left in peace. */
function following(change) {
  const isAtEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
  change();
  if (isAtEnd) toEnd();
}

function toEnd() {
  scrollTo(0, document.documentElement.scrollHeight);
}

/** The promise of a key, one for all who ask at once. */
function keyAsker() {
  const [dialog, field, reason] = ["#key-dialog", "#key", "#key-reason"].map(find);
  let promised = null;
  let settle;
  const close = (key) => {
    dialog.close();
    promised = null;
    settle(key);
  };
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    close(field.value.trim());
  });
  find("#key-cancel").addEventListener("click", () => close(null));
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    close(null);
  });
  return (why) => {
    reason.textContent = why;
    reason.hidden = !why;
    field.value = "";
    if (!dialog.open) dialog.showModal();
    return (promised ??= new Promise((resolve) => (settle = resolve)));
  };
}

function hasFiles(event) {
  return event.dataTransfer?.types.includes("Files");
}

find("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  running ? stop() : ask();
});
words.addEventListener("input", changed);
words.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || find("#key-dialog").open) return;
  if (settings.open) settings.open = false;
  else stop();
});
document.addEventListener("click", ({ target }) => {
  if (!settings.contains(target)) settings.open = false;
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  pictures.add(event.clipboardData.files);
});
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!hasFiles(event)) return;
  event.preventDefault();
  pictures.add(event.dataTransfer.files);
});
find("#choose").addEventListener("click", () => find("#files").click());
find("#files").addEventListener("change", ({ target }) => {
  pictures.add(target.files);
  target.value = ""; // or the same file could not be chosen twice
  home();
});
find("#pictures").addEventListener("click", home);
find("#clear").addEventListener("click", clear);
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    words.value = example.querySelector("span").textContent;
    changed();
    home();
    if (example.dataset.picture) find("#files").click();
  });
}

whenKeyIsWanted(keyAsker());
changed();
home();
connect();
