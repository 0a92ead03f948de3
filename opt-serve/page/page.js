// The page of `opt serve`: a prompt, one or two columns of settings, and texts whose tokens tell how likely they were.

const $ = (id) => document.getElementById(id);
const percent = (p) => (p >= 0.9995 ? "100 %" : p < 0.001 ? "< 0.1 %" : `${(p * 100).toFixed(p < 0.1 ? 1 : 0)} %`);
/** A token as it can be read: what would be blank is drawn. */
const visible = (text) => text.replace(/^ /, "␣").replace(/ $/, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
/** Whether a token is text by itself, from which one can go on: not the end of all text, nor a part of a character. */
const continuable = (text) => text !== "" && !/\ufffd|^bytes:|^<\/?(s|pad|unk)>$/.test(text);

// The server. Its paths stand beside this file, so that it can be under a prefix.

async function ask(path, body, signal) {
  const headers = {};
  if (body) headers["content-type"] = "application/json";
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  const answer = await fetch(new URL(path, import.meta.url), options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => undefined);
  if (answer.status === 401) $("access").open = true;
  throw new Error(`${answer.status}: ${said?.error?.message ?? (answer.statusText || "no reason given")}`);
}

/** The JSON of each event of a stream, until its `[DONE]`. */
async function* events(answer) {
  const reader = answer.body.getReader();
  // A character, like a line, can lie in two pieces.
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Error("The connection was lost.");
      });
      if (done) throw new Error("The server ended the answer before it was complete.");
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = /^data: ?(.*?)\r?$/.exec(line)?.[1];
        if (data === undefined) continue;
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// A piece of text: one token, or the tokens that make one character together.

class Piece {
  constructor(text, tokens, turn = false) {
    Object.assign(this, { text, tokens });
    this.logprob = tokens.reduce((sum, token) => sum + token.logprob, 0);
    this.element = document.createElement("span");
    this.element.className = `token ${turn ? "turn" : ""} ${text ? "" : "end"}`;
    this.element.piece = this;
    // The space before a word belongs to its token, but is not underlined.
    const word = document.createElement("span");
    word.textContent = text.trimStart() || text;
    this.element.append(text.slice(0, text.length - word.textContent.length), word);
    if (tokens.length === 0) return;
    // No line above one third, the full line below one in three hundred.
    this.element.style.setProperty("--surprise", Math.min(1, Math.max(0, (-this.logprob - 1.1) / 4.6)).toFixed(2));
  }

  /** What could have stood here, the likeliest first, whatever was chosen among it. */
  alternatives() {
    const [first] = this.tokens;
    const found = new Map(Object.entries(first?.top ?? {}));
    if (first && !found.has(first.text)) found.set(first.text, first.logprob);
    return [...found].sort((a, b) => b[1] - a[1]);
  }
}

class Column {
  pieces = [];
  /** What the text began with, when it was asked for. */
  given = "";

  constructor(name) {
    this.section = $("column").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.section.querySelector(selector);
    Object.assign(this, { name, form: find("form"), details: find("details"), text: find(".text"), status: find(".status") });
    Object.assign(this, { error: find(".error"), spoken: find(".spoken"), keep: find(".keep"), said: find(".said") });
    this.section.dataset.column = name;
    this.form.oninput = () => this.describe();
    this.form.onsubmit = (event) => {
      event.preventDefault();
      $("ask").requestSubmit();
    };
    this.keep.onclick = () => {
      $("prompt").value = this.whole();
      $("prompt").focus();
    };
    this.describe();
  }

  whole(count = this.pieces.length) {
    return this.given + this.pieces.slice(0, count).map((piece) => piece.text).join("");
  }

  /** The fields that were filled, as the server names them. */
  settings() {
    const settings = {};
    for (const field of this.form.elements) {
      if (field.value !== "") settings[field.name] = field.type === "number" ? field.valueAsNumber : field.value;
    }
    if (settings.stop) settings.stop = settings.stop.split("|").filter(Boolean).map((text) => text.replace(/\\n/g, "\n"));
    return settings;
  }

  /** Says the settings in the line that opens them. */
  describe() {
    const { model, stop, ...numbers } = this.settings();
    const said = Object.entries(numbers).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
    if (stop) said.push(`stop at ${stop.map((text) => `“${visible(text)}”`).join(", ")}`);
    this.said.textContent = [model, ...said].filter(Boolean).join(" · ");
    this.section.querySelector(".name").textContent = document.body.classList.contains("two") ? this.name : "Settings";
  }

  /** Asks for a continuation of `given`, or, with `turn`, of the text up to a piece and what is to stand there instead. */
  async run(given, turn) {
    if (!this.form.reportValidity()) {
      this.details.open = true;
      return;
    }
    this.stop();
    const cancel = (this.cancel = new AbortController());
    if (turn) this.pieces.length = turn.at;
    else [this.given, this.pieces] = [given, []];
    this.drawText();
    if (turn) this.add(turn.piece);
    const prompt = this.whole();
    Object.assign(this, { count: 0, waiting: [], reason: "", usage: undefined, began: performance.now(), first: 0 });
    this.error.textContent = this.spoken.textContent = "";
    this.section.classList.add("busy");
    this.tell();
    buttons();
    const before = this.pieces.length;
    try {
      const asked = { ...this.settings(), prompt, stream: true, logprobs: 5, stream_options: { include_usage: true } };
      const answer = await ask("v1/completions", asked, cancel.signal);
      for await (const event of events(answer)) {
        if (this.cancel !== cancel) return;
        this.usage = event.usage ?? this.usage;
        if (event.choices?.[0]) this.take(event.choices[0]);
        this.tell();
      }
    } catch (error) {
      if (this.cancel !== cancel) return;
      if (error.name === "AbortError") this.reason = "stopped";
      else this.error.textContent = error.message;
    }
    this.cancel = undefined;
    this.last = performance.now();
    this.section.classList.remove("busy");
    this.tell();
    if (!this.error.textContent) {
      const made = this.pieces.slice(before).map((piece) => piece.text).join("");
      this.spoken.textContent = `${this.status.textContent}. ${made}`;
    }
    buttons();
  }

  stop() {
    this.cancel?.abort();
  }

  /** Takes what one event brings: tokens, and the text they made so far, which can lag behind them. */
  take({ text, logprobs, finish_reason }) {
    const { tokens = [], token_logprobs = [], top_logprobs } = logprobs ?? {};
    tokens.forEach((text, i) => this.waiting.push({ text, logprob: token_logprobs[i] ?? 0, top: top_logprobs?.[i] ?? {} }));
    this.count += tokens.length;
    if (tokens.length) {
      this.last = performance.now();
      this.first ||= this.last;
    }
    this.reason = finish_reason ?? this.reason;
    // The end of the text is a token too, with others that could have stood there.
    const ended = finish_reason === "stop" && this.waiting.length === 1 && !continuable(this.waiting[0].text);
    if (!text && ended) this.add(new Piece("", this.waiting.splice(0)));
    if (!text) return;
    const followed = innerHeight + scrollY > document.documentElement.scrollHeight - 40;
    const made = this.waiting.splice(0);
    if (made.map((token) => token.text).join("") === text) made.forEach((token) => this.add(new Piece(token.text, [token])));
    else this.add(new Piece(text, made));
    if (followed && $("card").hidden) scrollTo(scrollX, document.documentElement.scrollHeight);
  }

  add(piece) {
    this.pieces.push(piece);
    this.text.append(piece.element);
    if (this.pieces.length === 1) piece.element.tabIndex = 0;
  }

  drawText() {
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = this.given;
    this.text.replaceChildren(given, ...this.pieces.map((piece) => piece.element));
    this.text.scrollIntoView({ block: "nearest" });
  }

  tell() {
    const [running, said] = [this.cancel !== undefined, []];
    const seconds = (this.last - this.first) / 1000;
    const prompt = this.usage?.prompt_tokens;
    if (running && this.count === 0) said.push("waiting for the first token");
    else if (!this.error.textContent || this.count) {
      said.push(`${prompt ? `${prompt} + ` : ""}${this.usage?.completion_tokens ?? this.count} tokens`);
      // The first token waits for the whole prompt, and for the requests that came before.
      if (this.count > 1 && seconds > 0) said.push(`${((this.count - 1) / seconds).toFixed(1)} tokens/s`);
      if (this.first) said.push(`first ${Math.round(this.first - this.began)} ms`);
      if (!running) said.push({ length: "max tokens", stop: "ended" }[this.reason] ?? this.reason);
    }
    this.status.textContent = said.filter(Boolean).join(" · ");
    this.keep.hidden = running || this.pieces.length === 0;
  }
}

// The card beside a piece: how likely it was, and what else could stand there.

const card = { shown: undefined, timer: 0 };

function show(element) {
  clearTimeout(card.timer);
  if (card.shown === element) return;
  hide();
  const piece = element.piece;
  card.shown = element;
  element.classList.add("shown");
  const quoted = document.createElement("q");
  const said = piece.text ? visible(piece.text) : "end of text";
  quoted.textContent = said;
  const share = document.createElement("b");
  share.textContent = piece.tokens.length ? percent(Math.exp(piece.logprob)) : "no probability";
  const note = piece.tokens.length > 1 ? ` ${piece.tokens.length} tokens` : "";
  $("card").querySelector(".chosen").replaceChildren(quoted, note, share);
  element.setAttribute("aria-label", `${said}, ${share.textContent}`);
  const column = columns.find(({ text }) => text.contains(element));
  $("card").querySelector("ol").replaceChildren(...piece.alternatives().map(([text, logprob]) => {
    const [item, button] = [document.createElement("li"), document.createElement("button")];
    const [word, number] = [document.createElement("span"), document.createElement("span")];
    word.textContent = /^<\/s>$/.test(text) ? "end of text" : visible(text);
    number.textContent = percent(Math.exp(logprob));
    button.append(word, number);
    button.type = "button";
    button.tabIndex = -1;
    button.style.setProperty("--share", Math.exp(logprob).toFixed(3));
    button.disabled = !continuable(text);
    if (text === (piece.tokens.length === 1 ? piece.tokens[0].text : piece.text)) button.setAttribute("aria-current", "true");
    button.onclick = () => {
      const token = { text, logprob, top: piece.tokens[0].top };
      const chosen = new Piece(text, [token], true);
      const at = column.pieces.indexOf(piece);
      hide();
      column.run(undefined, { at, piece: chosen });
      walkTo(chosen.element, true);
    };
    item.append(button);
    return item;
  }));
  $("card").hidden = false;
  place(element);
}

/** Puts the card under the piece, or above it where there is no room below. */
function place(element) {
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = $("card");
  const room = document.documentElement.clientWidth - width - 8;
  const below = at.bottom + height + 12 < innerHeight || at.top < height + 12;
  $("card").style.left = `${scrollX + Math.max(8, Math.min(at.left - 8, room))}px`;
  $("card").style.top = `${scrollY + (below ? at.bottom + 4 : at.top - height - 4)}px`;
}

function hide() {
  clearTimeout(card.timer);
  card.shown?.classList.remove("shown");
  card.shown = undefined;
  $("card").hidden = true;
}

/** Makes a piece the one of its text that the keyboard is at. */
function walkTo(element, quietly) {
  for (const other of element.parentElement.querySelectorAll("[tabindex]")) {
    other.removeAttribute("tabindex");
    other.removeAttribute("role");
  }
  element.tabIndex = 0;
  element.setAttribute("role", "button");
  element.focus({ preventScroll: quietly });
  if (quietly) hide();
}

const choices = () => [...$("card").querySelectorAll("button:not(:disabled)")];
const pieceOf = (event) => event.target.closest?.(".token");

addEventListener("pointerover", (event) => {
  if (event.pointerType !== "mouse") return;
  if (pieceOf(event)) show(pieceOf(event));
  else if ($("card").contains(event.target)) clearTimeout(card.timer);
  else if (card.shown && document.activeElement !== card.shown) {
    clearTimeout(card.timer);
    card.timer = setTimeout(hide, 250);
  }
});
addEventListener("pointerdown", (event) => {
  if (!pieceOf(event) && !$("card").contains(event.target)) hide();
});
addEventListener("click", (event) => {
  if (pieceOf(event)) walkTo(pieceOf(event));
});
addEventListener("focusin", (event) => {
  if (pieceOf(event)) show(event.target);
  else if (!$("card").contains(event.target)) hide();
});
addEventListener("resize", () => card.shown && place(card.shown));

addEventListener("keydown", (event) => {
  const { key, target } = event;
  const inCard = $("card").contains(target);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[key];
  const handled = () => event.preventDefault();
  if (key === "Escape") {
    const busy = columns.some(({ cancel }) => cancel);
    columns.forEach((column) => column.stop());
    if (inCard && !busy) card.shown.focus();
    else hide();
  } else if (key === "Enter" && (event.ctrlKey || event.metaKey)) {
    handled();
    $("ask").requestSubmit();
  } else if (inCard && step && key !== "ArrowRight") {
    handled();
    const all = choices();
    const next = all.indexOf(target) + step;
    if (key === "ArrowLeft" || next < 0) card.shown.focus();
    else all[Math.min(next, all.length - 1)].focus();
  } else if (pieceOf(event)) {
    const pieces = columns.find(({ text }) => text.contains(target)).pieces;
    const at = pieces.indexOf(target.piece);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: pieces.length - 1 }[key];
    if (to !== undefined) {
      handled();
      if (pieces[to]) walkTo(pieces[to].element);
    } else if (["Enter", " ", "ArrowDown"].includes(key)) {
      handled();
      show(target);
      choices()[0]?.focus();
    }
  }
});

// The whole.

const columns = [new Column("First"), new Column("Second")];
const active = () => ($("compare").checked ? columns : columns.slice(0, 1));

function buttons() {
  const busy = columns.some(({ cancel }) => cancel);
  if (!busy && document.activeElement === $("stop")) $("go").focus();
  $("stop").disabled = !busy;
}

function arrange(copied) {
  const two = $("compare").checked;
  document.body.classList.toggle("two", two);
  if (!two) columns[1].stop();
  columns[1].section.hidden = !two;
  if (two && copied) {
    for (const field of columns[1].form.elements) field.value = columns[0].form.elements[field.name].value;
    // So that something differs at once.
    columns[1].form.elements.temperature.value = "0";
    columns.forEach(({ details }) => (details.open = true));
  }
  columns.forEach((column) => column.describe());
}

async function models() {
  try {
    const { data } = await (await ask("v1/models")).json();
    for (const { form } of columns) {
      const [select, before] = [form.elements.model, form.elements.model.value];
      select.replaceChildren(...data.map(({ id }) => new Option(id, id)));
      if (data.some(({ id }) => id === before)) select.value = before;
    }
    $("about").textContent = `${data[0]?.id ?? "no model"} continues what you write`;
    columns[0].error.textContent = "";
  } catch (error) {
    columns[0].error.textContent = error.message;
  }
  columns.forEach((column) => column.describe());
}

$("columns").append(...columns.map(({ section }) => section));
columns[0].details.open = matchMedia("(min-width: 701px)").matches;
$("ask").onsubmit = (event) => {
  event.preventDefault();
  hide();
  active().forEach((column) => column.run($("prompt").value));
};
$("stop").onclick = () => columns.forEach((column) => column.stop());
let compared = false;
$("compare").onchange = () => {
  arrange(!compared);
  compared = true;
};
// Storage can be forbidden; the key is then forgotten with the page.
try {
  $("key").value = sessionStorage.getItem("key") ?? "";
} catch {}
$("key").onchange = () => {
  try {
    sessionStorage.setItem("key", $("key").value);
  } catch {}
  models();
};
// A page that is gone back to keeps the state of its boxes.
arrange(false);
models();
