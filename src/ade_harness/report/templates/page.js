"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(2));

  // ---- figures, in the page's colours ----
  const drawn = new Map();
  function themed(layout) {
    const axis = { gridcolor: color("--grid"), zerolinecolor: color("--grid"), linecolor: color("--line"), automargin: true };
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("--text"), family: "system-ui, sans-serif", size: 13 },
      hoverlabel: { font: { family: "system-ui, sans-serif" } },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
  }
  function draw(id, figure) {
    const place = document.getElementById(id);
    if (!place || !figure) return;
    drawn.set(id, figure);
    const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
    Plotly.react(place, figure.data, themed(figure.layout), options);
  }
  const redraw = () => drawn.forEach((figure, id) => draw(id, figure));

  // ---- light and dark ----
  const stored = () => { try { return localStorage.getItem("ade-theme"); } catch { return null; } };
  const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = stored() || preferred;
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("ade-theme", root.dataset.theme); } catch { /* a page from disk may not store */ }
    redraw();
  });
  addEventListener("beforeprint", () => { root.dataset.was = root.dataset.theme; root.dataset.theme = "light"; redraw(); });
  addEventListener("afterprint", () => { root.dataset.theme = root.dataset.was; redraw(); });

  // ---- tables: sort by any column; missing values stay last ----
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if (!("v" in cell.dataset)) return cell.textContent.trim().toLowerCase();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  function sortTable(table, column, direction) {
    const rows = [...table.tBodies[0].rows];
    const order = (a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return direction * (typeof x === "number" ? x - y : x.localeCompare(y));
    };
    rows.sort(order);
    table.tBodies[0].append(...rows);
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      if (index === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }
  document.querySelectorAll("table.sortable").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const first = head.classList.contains("n") ? -1 : 1;
        const now = head.getAttribute("aria-sort");
        const direction = now === null ? first : now === "ascending" ? -1 : 1;
        sortTable(table, column, direction);
      });
    });
  });

  // ---- search ----
  const search = document.getElementById("search");
  if (search) {
    const rows = [...document.getElementById(search.dataset.table).tBodies[0].rows];
    const counter = document.getElementById("search-count");
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      let shown = 0;
      rows.forEach((row) => {
        const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
        row.hidden = !text.includes(wanted);
        shown += !row.hidden;
      });
      counter.textContent = wanted ? `${shown} of ${rows.length}` : "";
    });
  }

  // ---- pictures: a layer, revealed from the left ----
  document.querySelectorAll(".example").forEach((example) => {
    const layers = [...example.querySelectorAll(".layer")];
    const [choice, slider] = [example.querySelector("select"), example.querySelector("input")];
    const show = () => layers.forEach((layer) => {
      layer.hidden = layer.dataset.layer !== choice.value;
      layer.style.clipPath = `inset(0 0 0 ${100 - slider.value}%)`;
    });
    choice.addEventListener("change", show);
    slider.addEventListener("input", show);
    show();
  });

  // ---- pictures of one class ----
  const imageClass = document.getElementById("image-class");
  if (imageClass) {
    const figures = [...document.querySelectorAll(".example[data-classes]")];
    imageClass.addEventListener("change", () => {
      let shown = 0;
      figures.forEach((figure) => {
        figure.hidden = imageClass.value !== "" && !JSON.parse(figure.dataset.classes).includes(imageClass.value);
        shown += !figure.hidden;
      });
      document.getElementById("image-count").textContent = imageClass.value ? `${shown} of ${figures.length} pictures` : "";
    });
  }

  // ---- the confusion matrix ----
  // the classes of the largest confusions, in the order of the data set; pixels of the others are one column
  function mostConfused(number) {
    const { names, truth, prediction, pixels } = data.confusion;
    const wrong = new Float64Array(names.length);
    truth.forEach((t, i) => {
      const p = prediction[i];
      if (p === t) return;
      wrong[t] += pixels[i];
      if (p < names.length) wrong[p] += pixels[i];
    });
    const order = names.map((_, index) => index).sort((a, b) => wrong[b] - wrong[a] || a - b);
    return order.slice(0, number).sort((a, b) => a - b);
  }
  function matrixFigure(mode, number) {
    const { names: every, truth, prediction, pixels } = data.confusion;
    const few = number !== "all" && Number(number) < every.length;
    const shownClasses = few ? mostConfused(Number(number)) : every.map((_, index) => index);
    const place = new Map(shownClasses.map((c, index) => [c, index]));
    const names = shownClasses.map((c) => every[c]);
    const columns = few ? [...names, "others", "none"] : [...names, "none"];
    const [ofTruth, ofPrediction] = [new Float64Array(every.length), new Float64Array(every.length + 1)];
    const cells = names.map(() => new Array(columns.length).fill(0));
    truth.forEach((t, i) => {
      const p = prediction[i];
      ofTruth[t] += pixels[i];
      ofPrediction[p] += pixels[i];
      if (!place.has(t)) return;
      const column = p === every.length ? columns.length - 1 : place.has(p) ? place.get(p) : names.length;
      cells[place.get(t)][column] += pixels[i];
    });
    const ofColumn = columns.map((_, c) => (c < names.length ? ofPrediction[shownClasses[c]] : c === columns.length - 1 ? ofPrediction[every.length] : 0));
    if (few) ofPrediction.forEach((count, c) => { if (c < every.length && !place.has(c)) ofColumn[names.length] += count; });
    const z = names.map(() => new Array(columns.length).fill(null));
    const text = names.map(() => new Array(columns.length).fill(""));
    cells.forEach((row, t) => row.forEach((count, p) => {
      if (!count) return;
      const value = mode === "pixels" ? count : count / (mode === "truth" ? ofTruth[shownClasses[t]] : ofColumn[p]);
      z[t][p] = Math.log10(value);
      const shown = mode === "pixels" ? `${count.toLocaleString("en")} pixels` : `${percent(value)} %`;
      text[t][p] = `truth ${names[t]}<br>predicted ${columns[p]}<br>${shown}`;
    }));
    const narrow = innerWidth < 600;
    const size = few ? (narrow ? 8 : 11) : 8;
    const ticks = mode === "pixels" ? [0, 2, 4, 6, 8] : [-4, -3, -2, -1, 0];
    const label = (tick) => (mode === "pixels" ? (10 ** tick).toLocaleString("en") : `${(100 * 10 ** tick).toLocaleString("en")} %`);
    const numbers = columns.map((_, index) => index);
    return {
      data: [{
        type: "heatmap", z, text, hoverinfo: "text", colorscale: "Cividis", x: numbers, y: numbers.slice(0, names.length),
        ...(mode === "pixels" ? {} : { zmin: -4, zmax: 0 }),
        ...(narrow ? { showscale: false } : { colorbar: { tickvals: ticks, ticktext: ticks.map(label), len: 0.8 } }),
      }],
      layout: {
        margin: narrow ? { l: 80, r: 5, t: 10, b: 90 } : { l: 120, r: 20, t: 20, b: 120 },
        xaxis: { title: { text: "prediction" }, tickvals: numbers, ticktext: columns, tickangle: -90, tickfont: { size }, showgrid: false, constrain: "domain" },
        yaxis: { title: { text: "truth" }, tickvals: numbers.slice(0, names.length), ticktext: names, tickfont: { size }, showgrid: false, autorange: "reversed", constrain: "domain" },
      },
    };
  }
  const mode = document.getElementById("matrix-mode");
  if (mode) {
    const number = document.getElementById("matrix-classes");
    const show = () => draw("matrix", matrixFigure(mode.value, number.value));
    [mode, number].forEach((choice) => choice.addEventListener("change", show));
    show();
  }

  // ---- two runs of several ----
  const pairChoice = document.getElementById("pair");
  function showPair() {
    const pair = data.pairs[Number(pairChoice.value)];
    const rows = pair.classes.map((row) => ({ ...row, name: data.names[row.class] }));
    const marker = (row) => (row.significant ? "#d55e00" : "#8a8a8a");
    draw("scatter", {
      data: [
        { type: "scatter", mode: "lines", x: [0, 100], y: [0, 100], line: { color: "#8a8a8a", dash: "dot" }, hoverinfo: "skip", showlegend: false },
        {
          type: "scatter", mode: "markers", x: rows.map((r) => 100 * r.first), y: rows.map((r) => 100 * r.second),
          marker: { color: rows.map(marker), symbol: rows.map((r) => (r.significant ? "diamond" : "circle")), size: 8 },
          text: rows.map((r) => r.name), hovertemplate: "%{text}: %{x:.2f} and %{y:.2f}<extra></extra>", showlegend: false,
        },
      ],
      layout: {
        margin: { l: 60, r: 20, t: 20, b: 50 },
        xaxis: { title: { text: "first run: IoU, percent" }, range: [0, 100] },
        yaxis: { title: { text: "second run: IoU, percent" }, range: [0, 100] },
      },
    });
    const sorted = rows.filter((r) => r.first !== r.second).sort((a, b) => a.second - a.first - (b.second - b.first));
    const ends = sorted.length > 40 ? [...sorted.slice(0, 20), ...sorted.slice(-20)] : sorted;
    draw("bars", {
      data: [{
        type: "bar", orientation: "h", y: ends.map((r) => `${r.name} (${r.class})`), x: ends.map((r) => 100 * (r.second - r.first)),
        marker: { color: ends.map(marker) },
        hovertemplate: "%{y}: %{x:+.2f}<extra></extra>",
      }],
      layout: { margin: { l: innerWidth < 600 ? 90 : 150, r: 20, t: 20, b: 50 }, xaxis: { title: { text: "difference, points" } }, yaxis: { tickfont: { size: 10 } } },
    });
    document.querySelectorAll("[data-pair]").forEach((part) => { part.hidden = part.dataset.pair !== pairChoice.value; });
  }
  if (pairChoice) {
    pairChoice.addEventListener("change", showPair);
    showPair();
  }

  Object.entries(data.figures || {}).forEach(([id, figure]) => draw(id, figure));
  root.dataset.ready = "yes";
})();
