
"use strict";
// Everything is readable without this script; it adds sorting, search, tooltips and the choice of a theme.
(() => {
  const compareText = new Intl.Collator("en", {numeric: true, sensitivity: "base"}).compare;
  const order = ["none", "ascending", "descending"];

  function keyOf(row, column, kind) {
    const cell = row.cells[column];
    if (kind === "text") return cell.textContent.trim();
    return cell.dataset.key === "" ? NaN : Number(cell.dataset.key);
  }

  function isAbsent(key) {
    return key === "" || Number.isNaN(key);
  }

  function sortTable(table, header, announce) {
    const next = order[(order.indexOf(header.getAttribute("aria-sort") || "none") + 1) % order.length];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    const body = table.tBodies[0];
    const rows = table.originalRows.slice();
    if (next !== "none") {
      header.setAttribute("aria-sort", next);
      const kind = header.dataset.sort, sign = next === "ascending" ? 1 : -1;
      const compare = kind === "text" ? compareText : (a, b) => a - b;
      const keyed = rows.map((row) => [keyOf(row, header.cellIndex, kind), row]);
      keyed.sort(([a], [b]) => isAbsent(a) - isAbsent(b) || (isAbsent(a) ? 0 : sign * compare(a, b)));
      rows.splice(0, rows.length, ...keyed.map(([, row]) => row));
    }
    body.append(...rows);
    announce(next === "none" ? "in the original order" : `sorted by ${header.textContent.trim()}, ${next}`);
  }

  for (const table of document.querySelectorAll("table[data-table]")) {
    table.originalRows = Array.from(table.tBodies[0].rows);
    const status = document.querySelector(`[data-count="${table.dataset.table}"]`);
    for (const header of table.tHead.querySelectorAll("th[data-sort]")) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sortTable(table, header, (text) => { status.textContent = text; }));
    }
  }

  for (const search of document.querySelectorAll("input[data-search]")) {
    const name = search.dataset.search;
    const status = document.querySelector(`[data-count="${name}"]`);
    let found = null;
    search.closest(".controls").hidden = false;
    search.addEventListener("input", () => {
      found = found || Array.from(document.querySelectorAll(`table[data-table="${name}"] > tbody > tr`),
        (row) => [row, Array.from(row.cells, (cell) => cell.textContent).join(" ").toLowerCase()]);
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const [row, text] of found) {
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      status.textContent = `${shown} of ${found.length} shown`;
    });
  }

  const theme = document.getElementById("theme"), root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const nameTheme = () => { theme.textContent = isDark() ? "Light colours" : "Dark colours"; };
  theme.hidden = false;
  nameTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });

  const tip = document.getElementById("tip");
  function showTip(text, box) {
    tip.hidden = false;
    tip.textContent = text;
    tip.style.left = `${Math.max(4, Math.min(box.right + 8, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, box.top - tip.offsetHeight - 4)}px`;
  }
  document.addEventListener("pointerover", (event) => {
    const point = event.target.closest?.("[data-tip]");
    tip.hidden = !point;
    if (point) showTip(point.dataset.tip, point.getBoundingClientRect());
  });

  // The values of a curve: of the point nearest to the pointer.
  function nearestPoint(svg, at) {
    let best = {distance: 40};
    for (const line of svg.querySelectorAll("[data-values]")) {
      const pairs = line.getAttribute("points").split(" "), values = line.dataset.values.split(";");
      for (const [index, pair] of pairs.entries()) {
        const [x, y] = pair.split(",").map(Number), distance = Math.hypot(x - at.x, y - at.y);
        if (distance < best.distance) best = {distance, x, y, line, value: values[index]};
      }
    }
    return best;
  }
  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const mark = document.createElementNS(svg.namespaceURI, "circle");
    mark.setAttribute("class", "hovered");
    mark.setAttribute("r", "4");
    const hide = () => { mark.remove(); tip.hidden = true; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const found = nearestPoint(svg, at);
      if (!found.line) return hide();
      mark.setAttribute("cx", found.x);
      mark.setAttribute("cy", found.y);
      found.line.parentNode.append(mark);
      const [epoch, mean, low, high] = found.value.split(" ");
      const range = low === high ? "" : ` (${low} to ${high})`;
      showTip(`${found.line.dataset.name}: ${mean}${range} at epoch ${epoch}`, mark.getBoundingClientRect());
    });
  }

  // A link into a folded part opens it.
  const openTarget = () => {
    const details = document.getElementById(location.hash.slice(1))?.querySelector("details");
    if (details && ["#cells", "#runs"].includes(location.hash)) details.open = true;
  };
  addEventListener("hashchange", openTarget);
  openTarget();
})();
