"use strict";

// A click on a column's heading sorts its table, a second one the other way round; what has no value stays last.
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.querySelectorAll("thead th")];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table.tBodies[0], column, descending ? -1 : 1);
    });
  });
}

function sortRows(body, column, direction) {
  const keyed = [...body.rows].map((row) => {
    const cell = row.cells[column];
    const number = cell.dataset.number === undefined ? NaN : Number(cell.dataset.number);
    return { row, number, text: cell.textContent };
  });
  const numeric = keyed.some((item) => !Number.isNaN(item.number));
  const collator = new Intl.Collator("en", { numeric: true });
  keyed.sort((a, b) => {
    if (!numeric) return direction * collator.compare(a.text, b.text);
    if (Number.isNaN(a.number) || Number.isNaN(b.number)) return Number.isNaN(a.number) - Number.isNaN(b.number);
    return direction * (a.number - b.number);
  });
  body.append(...keyed.map((item) => item.row));
}

// Pointing at a cell of a schedule, or going there with the arrow keys, tells what happens in it.
for (const map of document.querySelectorAll(".map")) {
  const svg = map.querySelector(".grid svg");
  const readout = map.querySelector(".readout");
  const { width: numSteps, height: numBlocks } = svg.viewBox.baseVal;
  let data = null; // parsed when it is first needed
  let current = { block: 0, step: 0 };

  const show = (block, step) => {
    data ??= JSON.parse(map.querySelector("script").textContent);
    current = {
      block: Math.min(Math.max(block, 0), numBlocks - 1),
      step: Math.min(Math.max(step, 0), numSteps - 1),
    };
    const source = data.steps[current.block].filter((update) => update <= current.step).at(-1);
    readout.textContent = describe(data, current, source);
    place(svg.querySelector(".cursor"), current.step, current.block);
    place(svg.querySelector(".source"), source, current.block, source !== current.step);
  };

  const point = (event) => {
    const box = svg.getBoundingClientRect();
    show(
      Math.floor(((event.clientY - box.top) / box.height) * numBlocks),
      Math.floor(((event.clientX - box.left) / box.width) * numSteps),
    );
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    show(current.block + move[0], current.step + move[1]);
  });
}

function describe(data, { block, step }, source) {
  const cell = `${data.blocks[block]}, step ${step}: `;
  if (source === step) return `${cell}updated`;
  const similarity = data.similarities[block]?.[step] ?? null;
  return `${cell}reused from step ${source}${similarity === null ? "" : `, ${data.metric} ${similarity}`}`;
}

function place(rect, x, y, visible = true) {
  rect.setAttribute("x", x);
  rect.setAttribute("y", y);
  rect.setAttribute("visibility", visible ? "visible" : "hidden");
}

// The videos of a comparison start together.
for (const films of document.querySelectorAll(".films")) {
  const play = films.querySelector(".play");
  play.hidden = false;
  play.addEventListener("click", () => {
    for (const video of films.querySelectorAll("video")) {
      video.currentTime = 0;
      video.play();
    }
  });
}
