// Filters, and the keys of the drawer. Everything else works without this.
const form = document.querySelector("form.filters");
const chosen = (name) => [...form.querySelectorAll(`input[name=${name}]:checked`)].map((box) => box.value.replace(" ", "-"));

function filter() {
  const outcomes = chosen("outcome");
  const chapters = chosen("chapter");
  const rows = [...document.querySelectorAll("[data-outcomes]")];
  for (const row of rows) {
    const chapter = row.closest("[data-chapter]").dataset.chapter;
    const found = row.dataset.outcomes.trim().split(" ");
    row.hidden =
      (chapters.length > 0 && !chapters.includes(chapter)) ||
      (outcomes.length > 0 && !outcomes.some((outcome) => found.includes(outcome)));
  }
  for (const group of document.querySelectorAll("[data-chapter], .group")) {
    group.hidden = !group.querySelector("[data-outcomes]:not([hidden])");
  }
  const shown = rows.filter((row) => !row.hidden).length;
  form.querySelector("output").value = shown === rows.length ? "" : `${shown} of ${rows.length} clauses`;
  form.querySelector("button").hidden = shown === rows.length;
}

document.documentElement.classList.add("js");
form.addEventListener("change", filter);
form.addEventListener("reset", () => setTimeout(filter));
filter();

document.addEventListener("keydown", (event) => {
  const open = document.querySelector(".box details[open]");
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
