// Two runs side by side: waits for what is compared, and asks for another list as soon as one is chosen.

import { ask, count } from "./base.js";

const working = document.getElementById("working");
const form = document.getElementById("ask");

async function wait() {
  const says = document.getElementById("says"), bar = document.getElementById("progress");
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5000 : 700));
    let state;
    try {
      state = await ask("/compare/state");
    } catch (error) {
      says.textContent = `Nothing new comes from saefast explore (${error.message}).`;
      continue;
    }
    if (state.is !== "working") {
      location.reload();
      return;
    }
    if (!state.of) {
      says.textContent = "Reading the weights of both …";
      continue;
    }
    bar.value = state.done / state.of;
    says.textContent = `Comparing every latent of A with every latent of B: ${count((100 * state.done) / state.of)} %`;
  }
}

if (working && !working.dataset.failed) wait();

form?.addEventListener("change", () => form.submit());
document.getElementById("alike")?.addEventListener("input", (event) => {
  document.getElementById("alike-says").textContent = Number(event.target.value).toFixed(2);
});
