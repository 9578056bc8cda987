// Filters, and the keys of the drawer. Everything else works without this.
const form = document.querySelector("form.filters");
const chosen = (name) => [...form.querySelectorAll(`input[name=${name}]:checked`)].map((box) => box.value.replace(" ", "-"));

function filter() {
  const [outcomes, parts, chapters] = ["outcome", "part", "chapter"].map(chosen);
  const stack = form.elements.stack ? form.elements.stack.value : "";
  const columns = [...document.querySelectorAll("[data-column]")];
  for (const cell of columns) cell.hidden = stack !== "" && cell.dataset.column !== stack;
  if (columns.some((cell) => !cell.hidden && stack && cell.classList.contains("other"))) {
    document.getElementById("others").checked = true;
  }
  document.documentElement.classList.toggle("one", stack !== "");
  const rows = [...document.querySelectorAll("[data-outcomes]")];
  for (const row of rows) {
    const one = stack && row.querySelector(`td[data-column="${stack}"]`).dataset.outcome.replace(" ", "-");
    const found = one ? [one] : row.dataset.outcomes.trim().split(" ");
    row.hidden =
      (chapters.length > 0 && !chapters.includes(row.closest("[data-chapter]").dataset.chapter)) ||
      (parts.length > 0 && !parts.includes(row.dataset.part)) ||
      (outcomes.length > 0 && !outcomes.some((outcome) => found.includes(outcome)));
  }
  for (const group of document.querySelectorAll("[data-chapter], .group")) {
    group.hidden = !group.querySelector("[data-outcomes]:not([hidden])");
  }
  const shown = rows.filter((row) => !row.hidden).length;
  form.querySelector("output").value = shown === rows.length ? "" : `${shown} of ${rows.length} clauses`;
  form.querySelector("button").hidden = shown === rows.length && stack === "";
}

document.documentElement.classList.add("js");
if (form) {
  form.addEventListener("change", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  filter();
}

document.addEventListener("keydown", (event) => {
  const open = document.querySelector(".box details[name][open]");
  if (event.key === "Escape" && open) {
    open.open = false;
    open.querySelector("summary").focus();
  }
});

// A link to a clause opens it.
function reveal() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", reveal);
reveal();
