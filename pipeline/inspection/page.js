"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const measures = data.measures;
const panes = [...document.querySelectorAll(".tokens")];
const tokensOf = panes.map((pane) => [...pane.querySelectorAll("[data-row]")]);
const live = document.getElementById("live");
let row = 0;
let active = 0;

// Text is only ever set with textContent: what a token holds is never markup.
function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  for (const child of children) made.append(child);
  return made;
}

function format(name, value) {
  const unit = measures[name].unit;
  if (unit === "rank") return value.toLocaleString("en");
  if (unit === "nats") return value.toFixed(3);
  const percent = 100 * value;
  return percent > 0 && percent < 0.1 ? `${percent.toPrecision(2)} %` : `${percent.toFixed(1)} %`;
}

function level(name, value) {
  return measures[name].edges.filter((edge) => edge <= value).length;
}

function tokenText(id) {
  const token = data.tokens[id];
  return token === undefined ? `<${id}>` : token.shown;
}

function colour() {
  const name = document.getElementById("measure").value;
  const measure = measures[name];
  document.getElementById("legend-title").textContent =
    `${measure.title}: ${measure.meaning}${measure.unit === "nats" ? ", in nats" : ""}`;
  document.querySelectorAll("#legend li").forEach((item, place) => { item.textContent = measure.ranges[place]; });
  tokensOf.forEach((tokens, model) => {
    const values = data.models[model].values[name];
    const note = document.querySelector(`#pane-${model}-title .quiet`);
    if (note) note.remove();
    if (!values) document.getElementById(`pane-${model}-title`).append(" ", element("span", { class: "quiet" }, "(has no such number)"));
    for (const token of tokens) {
      token.classList.remove("h0", "h1", "h2", "h3", "h4", "h5", "h6");
      if (values) token.classList.add(`h${level(name, values[Number(token.dataset.row)])}`);
    }
  });
}

function candidates(model) {
  const sampled = data.response[data.positions[row]].id;
  const body = element("tbody", {});
  const add = (id, logprob, rank) => {
    const probability = Math.exp(Math.min(logprob, 0));
    const bar = element("span", { class: "bar", style: `inline-size: ${(100 * probability).toFixed(2)}%` });
    const head = element("th", { scope: "row" }, element("bdi", {}, tokenText(id)));
    if (id === sampled) head.append(" (sampled)");
    body.append(element("tr", id === sampled ? { class: "sampled" } : {},
      element("td", {}, String(rank)), head,
      element("td", { class: "number" }, `${(100 * probability).toFixed(3)} %`),
      element("td", { class: "bar-cell", "aria-hidden": "true" }, bar)));
  };
  model.top_ids[row].forEach((id, place) => add(id, model.top_logprobs[row][place], place + 1));
  if (!model.top_ids[row].includes(sampled)) add(sampled, -model.values.surprise[row], model.values.rank[row]);
  const head = element("thead", {}, element("tr", {},
    element("th", { scope: "col", style: "width: 3.4rem" }, "Rank"), element("th", { scope: "col" }, "Token"),
    element("th", { scope: "col", class: "number" }, "Probability"),
    element("td", { class: "bar-cell", "aria-hidden": "true" })));
  return element("table", { "aria-label": `Likeliest tokens of ${model.name}` }, head, body);
}

function detail() {
  const position = data.positions[row];
  const token = data.response[position];
  const box = document.getElementById("detail");
  document.getElementById("detail-title").replaceChildren(
    `Position ${position}: `, element("bdi", {}, token.shown));
  box.replaceChildren();
  if (token.part_of) box.append(element("p", {}, "A part of ", element("bdi", {}, token.part_of), "."));
  if (data.models.length > 1) {
    box.append(element("p", {}, data.disagrees[row] ? "The likeliest tokens differ." : "The likeliest tokens are the same."));
  }
  for (const model of data.models) {
    const facts = Object.keys(measures).filter((name) => model.values[name]).map((name) =>
      element("li", {}, `${measures[name].title}: ${format(name, model.values[name][row])}${measures[name].unit === "nats" ? " nats" : ""}`));
    box.append(element("h4", {}, element("bdi", {}, model.name)),
      element("ul", { class: "facts-line" }, ...facts), candidates(model));
  }
  document.getElementById("query").value = `${data.sql} AND position = ${position}`;
}

function announce() {
  const token = data.response[data.positions[row]];
  const parts = [`${token.spoken}, position ${data.positions[row]}`];
  const name = document.getElementById("measure").value;
  data.models.forEach((model) => {
    const known = model.values[name] ? `${measures[name].title} ${format(name, model.values[name][row])}, ` : "";
    const likeliest = data.tokens[model.argmax[row]];
    const share = Math.exp(Math.min(model.top_logprobs[row][0], 0));
    parts.push(`${data.models.length > 1 ? `${model.name}: ` : ""}${known}likeliest ${likeliest ? likeliest.spoken : model.argmax[row]} ${(100 * share).toFixed(1)} %`);
  });
  if (data.disagrees[row]) parts.push("models differ");
  live.textContent = parts.join("; ");
}

function select(next, focus) {
  for (const tokens of tokensOf) {
    tokens[row].setAttribute("aria-selected", "false");
    tokens[row].tabIndex = -1;
  }
  row = Math.max(0, Math.min(data.positions.length - 1, next));
  tokensOf.forEach((tokens) => {
    tokens[row].setAttribute("aria-selected", "true");
    tokens[row].tabIndex = 0;
  });
  if (focus) tokensOf[active][row].focus();
  detail();
  announce();
  const place = data.positions.length > 1 ? (640 * row) / (data.positions.length - 1) : 0;
  document.querySelectorAll(".cursor").forEach((line) => {
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.setAttribute("visibility", "visible");
  });
  if (focus) history.replaceState(null, "", `#p${data.positions[row]}`);
}

function nextDifference() {
  const behind = data.disagrees.indexOf(true, row + 1);
  const next = behind >= 0 ? behind : data.disagrees.indexOf(true);
  if (next >= 0) select(next, true);
  else live.textContent = "the likeliest tokens never differ";
}

function find() {
  const wanted = document.getElementById("search").value.toLowerCase();
  if (!wanted) return;
  let text = "";
  const starts = data.response.map((token) => { const start = text.length; text += token.adds.toLowerCase(); return start; });
  const here = data.positions[row];
  const from = starts[here] + Math.max(data.response[here].adds.length, 1);
  let found = text.indexOf(wanted, from);
  if (found < 0) found = text.indexOf(wanted);
  if (found < 0) { live.textContent = `${wanted} does not occur`; return; }
  let position = starts.findLastIndex((start) => start <= found);
  // of several tokens that share a character the first brings its text
  while (position > 0 && starts[position - 1] === starts[position] && !data.response[position].adds) position -= 1;
  const next = data.positions.findIndex((place) => place >= position);
  select(next < 0 ? data.positions.length - 1 : next, true);
}

const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
panes.forEach((pane, model) => {
  pane.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    active = model;
    // in right-to-left text the next token is on the left
    const mirrored = event.key.startsWith("Arrow") && getComputedStyle(pane).direction === "rtl" && !/Up|Down/.test(event.key);
    if (event.key in steps) select(row + (mirrored ? -1 : 1) * steps[event.key], true);
    else if (event.key === "Home") select(0, true);
    else if (event.key === "End") select(data.positions.length - 1, true);
    else if (event.key === "n") nextDifference();
    else return;
    event.preventDefault();
  });
  const at = (event) => event.target.closest("[data-row]");
  pane.addEventListener("mouseover", (event) => { if (at(event)) { active = model; select(Number(at(event).dataset.row), false); } });
  pane.addEventListener("click", (event) => { if (at(event)) { active = model; select(Number(at(event).dataset.row), true); } });
});
document.getElementById("measure").addEventListener("change", () => { colour(); announce(); });
document.getElementById("controls").addEventListener("submit", (event) => { event.preventDefault(); find(); });
document.getElementById("next-difference")?.addEventListener("click", nextDifference);
document.getElementById("copy").addEventListener("click", async () => {
  const query = document.getElementById("query");
  query.select();
  try {
    await navigator.clipboard.writeText(query.value);
    live.textContent = "copied";
  } catch {
    live.textContent = "selected; copy it with your keyboard";
  }
});

function linked() {
  const place = /^#p(\d+)$/.exec(location.hash);
  return place ? data.positions.indexOf(Number(place[1])) : -1;
}
window.addEventListener("hashchange", () => { if (linked() >= 0) select(linked(), true); });
colour();
select(Math.max(linked(), 0), linked() >= 0);
