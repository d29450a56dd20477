
"use strict";
// The index is searched, and rows and contexts are walked by key. All of a page can be read without this.
const search = document.querySelector("#search");
const rows = [...document.querySelectorAll(".index .row")];
const texts = rows.map((row) => `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase());

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let n = 0;
  rows.forEach((row, i) => {
    row.hidden = !words.every((word) => texts[i].includes(word));
    n += !row.hidden;
  });
  document.querySelector("#found").textContent = words.length ? `${n.toLocaleString("en")} found` : "";
}

if (search) {
  search.closest(".find").hidden = false;
  search.addEventListener("input", filter);
  // A page that is come back to keeps what was typed.
  filter();
}

function walk(step) {
  const stops = [...document.querySelectorAll(".row:not([hidden]) a, .context")];
  const next = stops[stops.indexOf(document.activeElement) + step] ?? (step > 0 ? stops[0] : stops.at(-1));
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === search) {
    if (event.key === "Escape") search.blur();
    return;
  }
  if (event.key === "/" && search) {
    event.preventDefault();
    search.select();
  }
  if (event.key === "j" || event.key === "k") walk(event.key === "j" ? 1 : -1);
  if (event.key === "ArrowLeft" && event.target === document.body) document.querySelector("[rel=prev]")?.click();
  if (event.key === "ArrowRight" && event.target === document.body) document.querySelector("[rel=next]")?.click();
});
