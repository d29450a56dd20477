// The keyboard: / searches, j and k walk over [data-walk], n and p follow links of rel next and prev, ? helps.

const search = document.getElementById("search");
const help = document.getElementById("keys");

function typing(element) {
  return element?.closest("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]");
}

function walk(step) {
  const all = [...document.querySelectorAll("[data-walk]")].filter((element) => element.offsetParent !== null);
  if (!all.length) return;
  const now = all.findIndex((element) => element.contains(document.activeElement));
  const next = now < 0 ? firstInSight(all, step) : Math.min(Math.max(now + step, 0), all.length - 1);
  const target = all[next].matches("a, button, [tabindex]") ? all[next] : all[next].querySelector("a, button") || all[next];
  if (target === all[next] && !target.matches("a, button, [tabindex]")) target.tabIndex = -1;
  target.focus({ preventScroll: true });
  all[next].scrollIntoView({ block: "nearest" });
}

function firstInSight(all, step) {
  const at = all.findIndex((element) => element.getBoundingClientRect().bottom > 60);
  return at < 0 ? (step > 0 ? all.length - 1 : 0) : at;
}

const KEYS = {
  "/": () => { search?.focus(); search?.select(); },
  j: () => walk(1),
  k: () => walk(-1),
  n: () => document.querySelector("a[rel~=next]")?.click(),
  p: () => document.querySelector("a[rel~=prev]")?.click(),
  "?": () => (help.open ? help.close() : help.showModal()),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.defaultPrevented) return;
  if (event.key === "Escape" && typing(document.activeElement)) {
    document.activeElement.blur();
    return;
  }
  if (typing(event.target) || !Object.hasOwn(KEYS, event.key) || (help.open && event.key !== "?")) return;
  event.preventDefault();
  KEYS[event.key]();
});
