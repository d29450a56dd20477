// A label is saved without leaving the page; buttons copy; w and l are keys of this page.

import { post } from "./base.js";

const form = document.getElementById("labelling");
const field = document.getElementById("label");
const said = form.querySelector("output");
let saved = field.value;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = field.value;
  said.textContent = "Saving …";
  try {
    const label = await post(form.action, { text }, form.elements.key.value);
    saved = field.value = label.text;
    said.textContent = label.text ? `Saved. ${label.about}` : "Taken away.";
    name(label.text);
  } catch (error) {
    said.textContent = error.message;
  }
  field.focus();
});

/** What the page calls the latent: its label, or its tokens where it has none. */
function name(text) {
  const head = document.getElementById("name");
  const shown = document.createElement("span");
  shown.className = text ? "label" : "title";
  shown.dir = "auto";
  shown.textContent = text || head.dataset.title;
  head.replaceChildren(shown);
}

addEventListener("beforeunload", (event) => {
  if (field.value !== saved) event.preventDefault();
});

for (const button of document.querySelectorAll("[data-copy]")) {
  const words = button.textContent;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => { button.textContent = words; }, 1500);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, dialog")) return;
  if (event.key === "w") document.getElementById("wide")?.click();
  if (event.key === "l") {
    event.preventDefault();
    field.focus();
  }
});
