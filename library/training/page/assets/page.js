"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // ---- charts ----------------------------------------------------------------------------------------------
  const short = value => value == null ? "–" : value === 0 ? "0" :
    Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5 ? value.toExponential(2).replace("e+", "e") : String(+value.toPrecision(4));
  const ticks = (plot, values) => values.map(value => value === 0 ? "0" :
    Math.abs(value) < 1e-3 ? String(+value.toPrecision(3)).includes("e") || value < 1e-4 ? value.toExponential().replace(/^(\d\.\d{0,2})\d*e/, "$1e") : String(+value.toPrecision(3)) :
    Math.abs(value) >= 1e4 ? value.toLocaleString("en") : String(+value.toPrecision(4)));

  const markBest = best => plot => {
    if (!best) return;
    const x = plot.valToPos(best[0], "x", true), y = plot.valToPos(best[1], "y", true), scale = devicePixelRatio;
    const { left, top, width, height } = plot.bbox;
    if (x < left || x > left + width || y < top || y > top + height) return;
    const pen = plot.ctx, text = `best: step ${best[0].toLocaleString("en")}`;
    pen.save();
    pen.fillStyle = colour("second");
    pen.strokeStyle = colour("card");
    pen.lineWidth = 2 * scale;
    pen.beginPath();
    pen.arc(x, y, 5 * scale, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
    pen.font = `600 ${12 * scale}px system-ui, sans-serif`;
    const room = pen.measureText(text).width + 10 * scale;
    pen.textAlign = x + room > left + width ? "right" : "left";
    pen.lineWidth = 4 * scale;
    pen.lineJoin = "round";
    const place = [text, x + (pen.textAlign === "right" ? -10 : 10) * scale, y + (y - 20 * scale < top ? 20 : -12) * scale];
    pen.strokeText(...place);
    pen.fillText(...place);
    pen.restore();
  };

  const draw = place => {
    const chart = data.charts[place.dataset.chart];
    const few = chart.data[0].length < 60;
    const series = chart.lines.map(line => ({
      label: line.title, stroke: colour(line.style), width: line.style === "raw" ? 1 : 2, spanGaps: line.style !== "raw",
      value: (plot, value) => short(value),
      points: { show: chart.points || (line.title === "validation" && few) || chart.data[0].length < 3, size: 6, fill: colour(line.style) },
    }));
    const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const y = chart.range ? { range: (plot, low, high) => chart.range } :
      chart.from_zero ? { range: (plot, low, high) => [0, (high || 1) * 1.1] } : {};
    place.replaceChildren();
    return new uPlot({
      width: place.clientWidth, height: place.closest(".charts > :first-child, .wide") ? (innerWidth < 600 ? 240 : 300) : 200,
      scales: { x: { time: false, range: (plot, low, high) => low === high ? [low - 1, high + 1] : [low, high] }, y },
      series: [{ label: "step", value: (plot, value) => value == null ? "–" : value.toLocaleString("en") }, ...series],
      axes: [{ ...axis, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5], values: (plot, values) => values.map(value => value.toLocaleString("en")) },
        { ...axis, size: 58, values: ticks }],
      padding: [10, 14, 0, 0], cursor: { y: false, focus: { prox: 24 } }, focus: { alpha: .35 },
      legend: { markers: { width: 0, fill: (plot, index) => series[index - 1] && series[index - 1].stroke } },
      hooks: { draw: [markBest(chart.best)] },
    }, chart.data, place);
  };

  const places = all("[data-chart]").filter(place => data.charts[place.dataset.chart]);
  let plots = new Map();
  const drawAll = () => { plots.forEach(plot => plot.destroy()); plots = new Map(places.map(place => [place, draw(place)])); };
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const watcher = new ResizeObserver(entries => entries.forEach(({ target }) => {
    const plot = plots.get(target);
    if (plot && plot.width !== target.clientWidth && target.clientWidth) plot.setSize({ width: target.clientWidth, height: plot.height });
  }));
  places.forEach(place => watcher.observe(place));

  // ---- pictures --------------------------------------------------------------------------------------------
  const prompts = all(".prompt"), slider = document.getElementById("step"), viewer = document.getElementById("viewer");
  const rows = prompts.map(prompt => all(".strip", prompt).map(strip => all(".cell", strip)));
  rows.flat().forEach(cells => cells.filter(cell => cell.dataset.same).forEach(cell => {
    const first = cells[cell.dataset.same];
    cell.replaceChildren(...[...first.childNodes].map(node => node.cloneNode(true)));
    cell.disabled = first.disabled;
    Object.assign(cell.dataset, { label: first.dataset.label, href: first.dataset.href || "", column: first.dataset.column });
  }));
  const cellAt = (prompt, line, at) => rows[prompt] && rows[prompt][line] && rows[prompt][line][at];
  const isThere = cell => cell && !cell.disabled;
  const labels = slider ? JSON.parse(slider.dataset.labels) : [];
  let at = 0, enlarged = { prompt: 0, line: 0 };

  const fill = (figure, cell) => {
    const button = figure.querySelector("button");
    const picture = isThere(cell) ? cell.querySelector("img").cloneNode() : null;
    button.replaceChildren(...(picture ? [picture] : []));
    button.disabled = !picture;
    if (picture) picture.removeAttribute("loading");
    figure.querySelector("figcaption").textContent = (figure.dataset.title ? `${figure.dataset.title}, ` : "") + (cell ? cell.dataset.label : "–");
  };
  const show = step => {
    at = Math.max(0, Math.min(step, +slider.max));
    slider.value = at;
    prompts.forEach((prompt, index) => rows[index].forEach((cells, line) => {
      const cell = cells[at];
      const base = all(".base", prompt)[line], now = all(".now", prompt)[line];
      if (base) fill(base, cells[0]);
      fill(now, cell);
      cells.forEach((other, number) => other.setAttribute("aria-current", String(number === at)));
    }));
    const label = labels[at];
    document.querySelector(".stepper output").textContent = label;
    slider.setAttribute("aria-valuetext", label);
    if (viewer.open) enlarge(enlarged.prompt, enlarged.line, at);
  };
  const enlarge = (prompt, line, step) => {
    const cell = cellAt(prompt, line, step);
    if (!cell) return;
    enlarged = { prompt, line };
    const picture = viewer.querySelector("img"), link = viewer.querySelector("a");
    const source = cell.querySelector("img");
    picture.src = source ? source.src : "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";
    picture.alt = source ? source.alt : "";
    viewer.querySelector(".what").textContent = source ? source.alt : cell.dataset.label;
    link.href = cell.dataset.href || "#";
    link.hidden = !cell.dataset.href;
    if (!viewer.open) viewer.showModal();
  };
  if (slider) {
    slider.addEventListener("input", () => show(+slider.value));
    all(".stepper .back").forEach(button => button.addEventListener("click", () => show(at - 1)));
    all(".stepper .on").forEach(button => button.addEventListener("click", () => show(at + 1)));
    prompts.forEach((prompt, index) => {
      rows[index].forEach((cells, line) => cells.forEach((cell, step) => cell.addEventListener("click", () => show(step))));
      all(".now button", prompt).forEach((button, line) => button.addEventListener("click", () => enlarge(index, line, at)));
      all(".base button", prompt).forEach((button, line) => button.addEventListener("click", () => { show(0); enlarge(index, line, 0); }));
    });
    show(+slider.max);
    const turn = (prompt, line) => {
      if (!cellAt(prompt, line, at)) return;
      enlarge(prompt, line, at);
    };
    viewer.addEventListener("keydown", event => {
      const { prompt, line } = enlarged;
      const act = {
        ArrowLeft: () => show(at - 1), ArrowRight: () => show(at + 1),
        ArrowUp: () => line > 0 ? turn(prompt, line - 1) : turn(prompt - 1, rows[prompt - 1] ? rows[prompt - 1].length - 1 : 0),
        ArrowDown: () => cellAt(prompt, line + 1, at) ? turn(prompt, line + 1) : turn(prompt + 1, 0),
      }[event.key];
      if (act) { event.preventDefault(); act(); }
    });
    viewer.addEventListener("click", event => { if (event.target === viewer || event.target.tagName === "IMG") viewer.close(); });
    all(".mini").forEach(mini => prompts.slice(0, 4).forEach((prompt, index) => {
      const step = rows[index][0].findIndex(cell => cell.dataset.column === mini.dataset.column);
      if (!isThere(rows[index][0][step])) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(rows[index][0][step].querySelector("img").cloneNode());
      button.addEventListener("click", () => { show(step); enlarge(index, 0, step); });
      mini.append(button);
    }));
  }

  // ---- commands --------------------------------------------------------------------------------------------
  all(".copy").forEach(button => button.addEventListener("click", async () => {
    const text = button.previousElementSibling.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch (error) {  // not everywhere allowed for files: the text is selected, to be copied by the keyboard
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "Selected";
      return;
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));
})();
