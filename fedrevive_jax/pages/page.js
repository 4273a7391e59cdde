"use strict";
(async () => {
  const root = document.documentElement;

  // Tables: a click on a header sorts by the number a cell begins with, else by its text.
  function compare(one, other) {
    const [a, b] = [parseFloat(one), parseFloat(other)];
    if (Number.isNaN(a) && Number.isNaN(b)) return one.localeCompare(other);
    return Number.isNaN(a) ? 1 : Number.isNaN(b) ? -1 : a - b;
  }
  for (const head of document.querySelectorAll("th")) {
    head.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = head.closest("table").tBodies[0];
      const text = row => row.cells[head.cellIndex].textContent;
      const rows = [...body.rows].sort((a, b) => compare(text(a), text(b)));
      body.append(...(down ? rows.reverse() : rows));
    });
  }

  // Charts.
  const charts = document.getElementById("charts");
  let models = [], figures = [];
  if (charts !== null) {
    const shown = JSON.parse(charts.textContent);
    const item = {docid: "page", roots: shown.roots, root_ids: Object.keys(shown.roots)};
    await Bokeh.embed.embed_items({page: shown.document}, [item]);
    models = [...Bokeh.documents[0].all_models];
    figures = Bokeh.documents[0].roots();
  }

  // Light and dark: charts are drawn on a canvas, which no style sheet reaches.
  const INKS = {
    background_fill_color: "--paper", border_fill_color: "--paper", outline_line_color: "--rule",
    text_color: "--ink", axis_label_text_color: "--ink", label_text_color: "--ink",
    title_text_color: "--ink", major_label_text_color: "--pale", axis_line_color: "--pale",
    major_tick_line_color: "--pale", minor_tick_line_color: "--pale", grid_line_color: "--rule",
    border_line_color: "--paper", bar_line_color: "--rule",
  };
  const INKED = ["Figure", "Title", "LinearAxis", "Grid", "Legend", "ColorBar"];
  function paint() {
    const style = getComputedStyle(root);
    for (const model of models.filter(model => INKED.includes(model.type))) {
      const names = Object.keys(INKS).filter(name => name in model.properties);
      const value = name => style.getPropertyValue(INKS[name]).trim();
      model.setv(Object.fromEntries(names.map(name => [name, value(name)])));
    }
  }
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  // Switches: what is drawn has tags, and is seen where none of them is switched off.
  const boxes = [...document.querySelectorAll("input[data-tag]")];
  function show() {
    const off = new Set(boxes.filter(box => !box.checked).map(box => box.dataset.tag));
    for (const model of models.filter(model => model.type === "GlyphRenderer")) {
      if (model.tags.length) model.visible = !model.tags.some(tag => off.has(tag));
    }
  }
  for (const box of boxes) box.addEventListener("change", show);

  // A page that is served asks whether there is news, and keeps zoom and what is hidden over a
  // reload.
  if (root.dataset.stamp !== undefined) {
    const kept = JSON.parse(sessionStorage.getItem("view") ?? '{"hidden": [], "zoom": {}}');
    const curves = models.filter(model => model.type === "GlyphRenderer" && model.name !== null);
    for (const curve of curves) curve.visible = !kept.hidden.includes(curve.name);
    const ranges = figures.flatMap(figure => [
      [`${figure.name}/x`, figure.x_range], [`${figure.name}/y`, figure.y_range],
    ]);
    for (const [name, range] of ranges) {
      if (!(name in kept.zoom)) continue;
      range.have_updated_interactively = true;
      range.setv(kept.zoom[name]);
    }
    const look = async () => {
      const answer = await fetch("stamp").then(reply => reply.text()).catch(() => null);
      if (answer === null || answer === root.dataset.stamp) return;
      const zoomed = ranges.filter(([, range]) => range.have_updated_interactively);
      const hidden = curves.filter(curve => !curve.visible).map(curve => curve.name);
      const zoom = Object.fromEntries(
        zoomed.map(([name, range]) => [name, {start: range.start, end: range.end}]));
      sessionStorage.setItem("view", JSON.stringify({hidden, zoom}));
      clearInterval(timer);
      location.reload();
    };
    const timer = setInterval(look, 2000);
  }
  show();
  root.dataset.ready = "true";  // for those who wait until all is drawn
})();
