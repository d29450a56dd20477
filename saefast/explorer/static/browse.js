// A choice takes effect at once; without scripts the button does it. Empty fields stay out of the address.

const filters = document.getElementById("filters");
const defaults = { sort: "telling", show: "all" };

filters.addEventListener("submit", (event) => {
  event.preventDefault();
  const asked = new URLSearchParams();
  for (const [name, value] of new FormData(filters)) {
    if (value.trim() && defaults[name] !== value) asked.append(name, value.trim());
  }
  const query = asked.toString();
  location.assign(query ? `/?${query}` : "/");
});
filters.addEventListener("change", (event) => {
  if (event.target.matches("select, input[type=checkbox]")) filters.requestSubmit();
});
