"use strict";
// What this page shows is what the API answers; everything goes in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const rates = [];
const SECONDS = 120;
const MOST = 8; // columns
const LEARNED = 5; // seconds between looks at what was learned
const FIRST = 2; // adapters that are asked without being chosen
const templates = new Map(); // model -> whether it has a chat template
let base = null;
let after = null;
let asking = null; // what stops the answers that are on their way
let personal = false; // whether who asks is a user, with a model of their own
let ticks = 0;
let round = 0; // of the key in use: what an earlier key had asked for is dropped

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function trouble(text) {
  $("trouble").hidden = !text;
  $("trouble").textContent = text || "";
}

async function told(answer) {
  const found = await answer.json().catch(() => null);
  return (found && found.error && found.error.message) || `the service answered ${answer.status}`;
}

async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  if (!answer.ok) throw Object.assign(new Error(await told(answer)), { status: answer.status });
  return answer.json();
}

// -- who is asked

const chosen = () => [...$("answers").children].map((one) => one.dataset.model);

function column(model) {
  const made = document.createElement("article");
  made.dataset.model = model;
  for (const [kind, name] of [["h3", ""], ["pre", ""], ["p", "small"]]) {
    const part = document.createElement(kind);
    part.className = name;
    made.append(part);
  }
  made.querySelector("h3").textContent = model === base ? `${model}, the base alone` : model;
  made.querySelector("pre").setAttribute("aria-live", "polite");
  made.append(sayer());
  return made;
}

function add(model) {
  if (!model || chosen().includes(model)) return;
  if (chosen().length >= MOST) { trouble(`${MOST} at once; take one away first`); return; }
  trouble("");
  $("answers").append(column(model));
  mark();
}

function drop(model) {
  for (const one of [...$("answers").children]) if (one.dataset.model === model) one.remove();
  mark();
}

function mark() {
  $("chosen").replaceChildren(...chosen().map((model) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.textContent = model === base ? "the base" : model;
    chip.title = "do not ask it";
    chip.addEventListener("click", () => drop(model));
    return chip;
  }));
  for (const button of document.querySelectorAll("#adapters td button")) {
    button.setAttribute("aria-pressed", String(chosen().includes(button.textContent)));
  }
  $("go").disabled = asking !== null || chosen().length === 0;
}

// -- adapters

function cell(row, text) {
  const made = row.insertCell();
  made.textContent = text;
  return made;
}

function show(model) {
  templates.set(model.id, model.chat_template);
  const row = $("adapters").insertRow();
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = model.id;
  button.title = "ask it, or do not";
  button.addEventListener("click", () => { if (chosen().includes(model.id)) drop(model.id); else add(model.id); });
  row.insertCell().append(button);
  cell(row, model.kilotune.version);
  cell(row, new Date(1000 * model.created).toISOString().slice(0, 16).replace("T", " "));
  cell(row, model.kilotune.tags.join(", "));
  cell(row, model.kilotune.sha256.slice(0, 12));
  const option = document.createElement("option");
  option.value = model.id;
  $("names").append(option);
}

function showPersonal(model) {
  personal = true;
  templates.set(model.id, model.chat_template);
  const option = document.createElement("option");
  option.value = model.id;
  $("names").append(option);
}

function showBase(model) {
  base = model.id;
  templates.set(base, model.chat_template);
}

function offerChats() {
  const some = [...templates.values()].includes(true); // the base, or an adapter that brings a template
  if ($("chat").disabled === some) $("chat").checked = some; // as they were taught to answer
  $("chat").disabled = !some;
  if (some && $("prompt").value === $("prompt").defaultValue) $("prompt").value = "Hello! What can you do?";
}

async function list(fresh) {
  const mine = round;
  const query = fresh || after === null ? "" : `&after=${encodeURIComponent(after)}`;
  const page = await get(`/v1/models?limit=50${query}`);
  if (mine !== round) return;
  if (fresh) {
    $("adapters").replaceChildren();
    $("names").replaceChildren();
    templates.clear();
    $("chat").disabled = true;
    $("chat").checked = false;
  }
  for (const model of page.data) {
    if (model.kilotune !== null) show(model); else if (model.parent === null) showBase(model); else showPersonal(model);
  }
  offerChats();
  if (fresh) for (const model of page.data.slice(0, 1 + FIRST)) add(model.id); // the base, and some to see what they change
  after = page.last_id;
  $("more").hidden = !page.has_more;
  $("none").hidden = $("adapters").rows.length > 0;
  $("list").hidden = false;
  mark();
}

// -- live

const ms = (seconds) => seconds === null ? "-" : seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;

function draw() {
  const most = Math.max(1, ...rates);
  $("line").setAttribute("points", rates.map((rate, i) =>
    `${(600 * (i + SECONDS - rates.length) / (SECONDS - 1)).toFixed(1)},${(85 - 80 * rate / most).toFixed(1)}`).join(" "));
}

async function live() {
  const mine = round;
  try {
    const ready = await fetch("/ready");
    const state = (await ready.json()).status;
    $("state").textContent = { ok: "ready", draining: "about to end", failed: "failed" }[state] || state;
    $("state").className = `tag ${ready.ok ? "ok" : "bad"}`;
    if (base === null) return; // without a key that is let in there is nothing to ask for
    const now = await get("/v1/usage");
    if (mine !== round) return;
    $("who").textContent = `namespace ${now.namespace}`;
    $("rate").textContent = now.tokens_per_second.toFixed(1);
    $("running").textContent = now.running;
    $("requests").textContent = now.requests;
    $("live").hidden = !(now.requests || now.running); // empty meters tell nothing
    $("first").textContent = `${ms(now.first_token_p50)} (${ms(now.first_token_p99)})`;
    $("whole").textContent = `${ms(now.answer_p50)} (${ms(now.answer_p99)})`;
    if (ticks++ % LEARNED === 0) await learned();
    rates.push(now.tokens_per_second);
    if (rates.length > SECONDS) rates.shift();
    draw();
  } catch (error) {
    if (error.status === undefined) { $("state").textContent = "not reached"; $("state").className = "tag bad"; }
  }
}

// -- what is said of an answer, and what became of it

function sayer() {
  const made = $("say").content.firstElementChild.cloneNode(true);
  const form = made.querySelector("form"), text = made.querySelector("textarea"), correct = made.querySelector("[data-correct]");
  for (const button of made.querySelectorAll("[data-rating]")) {
    button.addEventListener("click", () => say(made, { rating: button.dataset.rating }));
  }
  correct.addEventListener("click", () => {
    unfold(made, form.hidden);
    if (!form.hidden) { text.value = made.parentElement.querySelector("pre").textContent; text.focus(); }
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); say(made, { correction: text.value }); });
  return made;
}

function unfold(place, open) {
  place.querySelector("form").hidden = !open;
  place.querySelector("[data-correct]").setAttribute("aria-expanded", String(open));
}

function press(place, rating) {
  for (const button of place.querySelectorAll("[data-rating]")) {
    button.setAttribute("aria-pressed", String(button.dataset.rating === rating));
  }
}

function offer(column, id) { // where an answer is kept, there is something to say of it
  const place = column.querySelector(".say");
  place.dataset.answer = id || "";
  place.hidden = !id;
  place.querySelector("[role=status]").textContent = "";
  unfold(place, false);
  press(place, null);
}

async function say(place, what) {
  const note = place.querySelector("[role=status]"), id = place.dataset.answer;
  try {
    const answer = await fetch("/v1/feedback", {
      method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify({ answer: id, ...what }),
    });
    if (place.dataset.answer !== id) return;
    if (!answer.ok) { note.textContent = await told(answer); return; }
    press(place, what.rating);
    unfold(place, false);
    note.textContent = what.rating ? "noted" : "noted; your own model will learn it";
    await learned();
  } catch (error) {
    note.textContent = `the service was not reached: ${error.message}`;
  }
}

async function learned() {
  if (!personal) return;
  const mine = round;
  const page = await get("/v1/feedback/events?limit=10");
  if (mine !== round) return;
  $("learned").hidden = !(page.taken || page.data.length);
  $("nothing").hidden = page.data.length > 0;
  $("back").hidden = !page.data.some((one) => one.type === "learned");
  $("events").replaceChildren(...page.data.map((one) => {
    const made = document.createElement("li"), when = document.createElement("time");
    when.dateTime = new Date(1000 * one.created_at).toISOString();
    when.textContent = when.dateTime.slice(0, 16).replace("T", " ");
    made.append(when, ` ${one.message}`);
    return made;
  }));
}

$("back").addEventListener("click", async () => {
  $("back").disabled = true;
  try {
    const answer = await fetch("/v1/feedback/rollback", { method: "POST", headers: headers() });
    $("back-state").textContent = answer.ok ? "It is what it was before." : await told(answer);
    await learned();
  } catch (error) {
    $("back-state").textContent = `the service was not reached: ${error.message}`;
  }
  $("back").disabled = false;
});

// -- side by side

async function ask(place, signal) {
  const chat = $("chat").checked && templates.get(place.dataset.model) !== false, text = place.querySelector("pre"), note = place.querySelector("p");
  const body = {
    model: place.dataset.model, stream: true, stream_options: { include_usage: true },
    max_tokens: Number($("tokens").value), temperature: Number($("temperature").value),
    ...(chat ? { messages: [{ role: "user", content: $("prompt").value }] } : { prompt: $("prompt").value }),
  };
  const began = performance.now();
  let first = null, kept = null;
  offer(place, null);
  text.textContent = "";
  note.textContent = "...";
  const answer = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!answer.ok) { note.textContent = await told(answer); return; }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", usage = null, reason = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const part = JSON.parse(data);
      if (part.error) { note.textContent = part.error.message; return; }
      if (part.usage) usage = part.usage;
      for (const choice of part.choices) {
        const more = chat ? choice.delta.content : choice.text;
        if (more) { if (first === null) first = performance.now(); text.append(more); }
        reason = choice.finish_reason || reason;
        kept = choice.feedback_id || kept;
      }
    }
  }
  offer(place, kept);
  const seconds = (performance.now() - began) / 1000;
  const tokens = usage === null ? 0 : usage.completion_tokens;
  const plain = chat || !$("chat").checked ? "" : "as a text, without a chat template: ";
  note.textContent = `${plain}${tokens} tokens, first after ${ms(first === null ? null : (first - began) / 1000)}, ` +
    `${(tokens / seconds).toFixed(1)} a second, ended by ${reason}`;
}

async function asked(place, signal) {
  try {
    await ask(place, signal);
  } catch (error) {
    place.querySelector("p").textContent = signal.aborted ? "stopped" : `the service was not reached: ${error.message}`;
  }
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  add($("adapter").value.trim());
  $("adapter").value = "";
  if (base === null) { trouble("no base yet: is the key right?"); return; }
  if (asking !== null || chosen().length === 0) return;
  asking = new AbortController();
  $("stop").hidden = false;
  trouble("");
  mark();
  await Promise.all([...$("answers").children].map((place) => asked(place, asking.signal)));
  asking = null;
  $("stop").hidden = true;
  mark();
  live();
});
$("stop").addEventListener("click", () => { if (asking !== null) asking.abort(); });
$("add").addEventListener("click", () => { add($("adapter").value.trim()); $("adapter").value = ""; });
$("adapter").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); $("add").click(); }
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("ask").requestSubmit(); }
});

// -- the key

async function begin() {
  round += 1;
  base = after = null;
  personal = false;
  rates.length = ticks = 0;
  $("learned").hidden = true;
  $("back-state").textContent = "";
  $("who").textContent = "";
  if (asking !== null) asking.abort();
  $("adapter").value = "";
  $("answers").replaceChildren();
  $("live").hidden = true;
  trouble("");
  $("key-form").hidden = true; // where nobody needs one, or has one that is let in, there is nothing to fill in
  $("other-key").hidden = !sessionStorage.getItem("key");
  try {
    await list(true);
  } catch (error) {
    if (error.status === 401) $("key-form").hidden = false;
    $("adapters").replaceChildren();
    $("list").hidden = true;
    trouble(error.message);
    mark();
  }
  await live();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem("key", key); else sessionStorage.removeItem("key");
  $("key").value = "";
  begin();
});
$("other-key").addEventListener("click", () => { $("key-form").hidden = false; $("key").focus(); });
$("more").addEventListener("click", () => list(false).catch((error) => trouble(error.message)));
begin();
setInterval(live, 1000);
