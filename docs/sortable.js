// Tables inside <div class="sortable"> are sorted by a click on a heading, and the other way by the next one.
// Cells that begin with a number are compared by it and come first; others are compared as text.
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.style.cursor = "pointer";
    head.tabIndex = 0;
    head.title = "sort";
    const value = (row) => {
      const text = row.cells[column].textContent.trim();
      const number = text.replaceAll(",", "").match(/^[–/ ]*(\d+(\.\d+)?)/);
      return number ? Number(number[1]) : text;
    };
    const sort = () => {
      const down = head.ariaSort === "ascending", sign = down ? -1 : 1;
      for (const each of heads) each.ariaSort = null;
      head.ariaSort = down ? "descending" : "ascending";
      const compare = (first, second) => {
        const [a, b] = [value(first), value(second)];
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
      };
      body.append(...[...body.rows].sort(compare));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}
