// Sorts and filters the table of all results. Without this script the table is whole, in the order of the cards.
(() => {
  const table = document.getElementById("rvl-results");
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const asked = new URLSearchParams(location.hash.slice(1)); // results.html#chapter=04_tga_zsr begins filtered

  const make = (tag, into, properties = {}) => into.appendChild(Object.assign(document.createElement(tag), properties));
  const key = (row, i) => row.cells[i].dataset.key ?? row.cells[i].textContent.trim();
  const number = (row, i) => Number(row.cells[i].dataset.value ?? key(row, i));

  const panel = document.createElement("form");
  panel.className = "rvl-filters";
  table.parentElement.before(panel);
  const filters = heads.flatMap((head, i) => {
    if (!("filter" in head.dataset)) return [];
    const name = head.textContent, label = make("label", panel, { textContent: name + " " });
    const select = make("select", label);
    make("option", select, { value: "", textContent: "any" });
    for (const value of [...new Set(rows.map((row) => key(row, i)))].sort(compare)) make("option", select, { value, textContent: value });
    select.value = asked.get(name) ?? "";
    if (select.selectedIndex < 0) select.value = "";
    return [{ select, fits: (row) => !select.value || key(row, i) === select.value, of: (row) => key(row, i) }];
  });
  const reset = make("button", panel, { type: "reset", textContent: "Show all" });
  const count = make("output", panel);

  function filter() {
    let shown = 0;
    for (const row of rows) shown += !(row.hidden = !filters.every((f) => f.fits(row)));
    count.textContent = `${shown} of ${rows.length} rows`;
    reset.disabled = shown === rows.length;
    for (const f of filters) { // what would leave no row cannot be chosen
      const left = new Set(rows.filter((row) => filters.every((g) => g === f || g.fits(row))).map(f.of));
      for (const option of f.select.options) option.disabled = option.value !== "" && !left.has(option.value);
    }
  }
  panel.addEventListener("change", filter);
  panel.addEventListener("reset", () => setTimeout(filter)); // after the fields are empty

  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const numeric = rows.every((row) => !Number.isNaN(number(row, i)));
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const by = numeric ? (a, b) => number(a, i) - number(b, i) : (a, b) => compare(key(a, i), key(b, i));
      rows.sort((a, b) => (down ? by(b, a) : by(a, b)));
      body.append(...rows);
    });
  });
  filter();
})();
