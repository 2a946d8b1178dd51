"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// -- loss curves: pointing at a name or focusing it fades all other students ----------------------
const charts = document.getElementById("charts");
for (const button of document.querySelectorAll("[data-fade]")) {
  const fade = (on) => charts.querySelectorAll(`[data-student]:not([data-student="${button.dataset.fade}"])`)
    .forEach((mark) => mark.classList.toggle("dim", on));
  for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => fade(true));
  for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => fade(false));
}

// -- tables that can be sorted by each of their columns -------------------------------------------
function sortBy(table, column, heading) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  const body = table.tBodies[0];
  const value = (row) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === "" ? Infinity : Number(cell.dataset.value);
  };
  const compare = (a, b) => typeof a === "number" ? (a === b ? 0 : a - b) : a.localeCompare(b, "en", { numeric: true });
  const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
  for (const other of table.querySelectorAll("th[aria-sort]")) {
    other.removeAttribute("aria-sort");
    other.querySelector("button").textContent = "sort";
  }
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  heading.querySelector("button").textContent = down ? "sort \u25be" : "sort \u25b4";
  body.append(...rows);
}

for (const table of document.querySelectorAll("[data-sortable]")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const name = heading.firstChild.textContent.trim();
    const button = element("button", { type: "button", "aria-label": `sort by ${name}` }, "sort");
    button.addEventListener("click", () => sortBy(table, column, heading));
    heading.append(button);
  });
}

// -- commands to copy; where the browser does not allow it, a click selects them ------------------
for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
  });
}

// a closed section is not printed; the settings alone stay as they are, they are long
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not(:has(#config))")) details.open = true;
});

// -- one response: what the teacher thought at the selected token ---------------------------------
const box = document.getElementById("tokens");
const tokens = box ? [...box.children] : [];

function digits(probability) {
  return probability === 0 || probability >= 5e-5 ? probability.toFixed(4) : probability.toExponential(1);
}

// A token alone: every space counts, nothing is invisible.
function spelled(text) {
  const signs = { "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", " ": "\u2423" };
  const shown = text
    .replace(/^ +| +$|[\n\t\r]/g, (found) => [...found].map((char) => signs[char]).join(""))
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g,
      (char) => "U+" + char.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0"));
  return element("bdi", {}, shown || "\u2205");
}

function probabilityRow({ text, probability }, sampled) {
  const bar = element("span", { class: "bar" });
  bar.style.width = `${100 * Math.min(1, probability)}%`;
  const name = element("th", { scope: "row", title: text }, spelled(text));
  if (sampled) name.append(" ", element("span", { class: "hidden" }, "(the response)"), "\u25c0");
  return element("tr", sampled ? { class: "sampled" } : {}, name,
    element("td", {}, bar), element("td", { class: "number" }, digits(probability)));
}

function select(index, focus = false) {
  const token = report.response.tokens[index];
  for (const other of box.querySelectorAll("[aria-selected=true]")) {
    other.setAttribute("aria-selected", "false");
    other.tabIndex = -1;
  }
  tokens[index].setAttribute("aria-selected", "true");
  tokens[index].tabIndex = 0;
  if (focus) tokens[index].focus();
  const facts = element("dl", { class: "facts" });
  for (const [name, value] of [
    ["Entropy", token.entropy === null ? "not recorded" : `${token.entropy.toFixed(4)} nats`],
    ["Probability", digits(token.probability)],
    ["Rank", token.rank.toLocaleString("en")],
    ["Tail mass", `${digits(token.tail_mass)} outside the top ${report.labels.k}`],
  ]) facts.append(element("dt", {}, name), element("dd", {}, value));
  const rows = token.top.map((choice, n) => probabilityRow(choice, n + 1 === token.rank));
  if (token.rank > token.top.length) rows.push(probabilityRow(token, true));
  document.getElementById("panel").replaceChildren(
    element("h3", {}, spelled(token.text)),
    element("p", { class: "quiet" }, `Token ${index + 1} of ${tokens.length}`),
    facts,
    element("table", {}, element("caption", {}, "Likeliest tokens"), element("tbody", {}, ...rows)),
  );
}

if (box) {
  const found = (event) => tokens.indexOf(event.target.closest(".tok"));
  box.addEventListener("pointerover", (event) => { if (found(event) >= 0) select(found(event)); });
  box.addEventListener("focusin", (event) => { if (found(event) >= 0) select(found(event)); });
  box.addEventListener("keydown", (event) => {
    const index = found(event);
    const forward = getComputedStyle(box).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const target = {
      ArrowLeft: () => index + (forward === "ArrowLeft" ? 1 : -1),
      ArrowRight: () => index + (forward === "ArrowRight" ? 1 : -1),
      ArrowUp: () => index - 10,
      ArrowDown: () => index + 10,
      Home: () => 0,
      End: () => tokens.length - 1,
    }[event.key];
    if (!target || index < 0) return;
    event.preventDefault();
    select(Math.max(0, Math.min(tokens.length - 1, target())), true);
  });
  // report.html#token-12 opens at a token; otherwise at the one where the teacher was least certain
  const linked = () => tokens.findIndex((token) => `#${token.id}` === location.hash);
  window.addEventListener("hashchange", () => { if (linked() >= 0) select(linked(), true); });
  const entropies = report.response.tokens.map((token) => token.entropy ?? 0);
  if (linked() >= 0) select(linked(), true);
  else select(entropies.reduce((best, entropy, n) => (entropy > entropies[best] ? n : best), 0));
}

document.getElementById("config").textContent = JSON.stringify(report.config, null, 2);
