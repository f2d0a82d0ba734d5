"use strict";
// The atlas's script: the grid of cells, the panel of the chosen one, the scatter plot, the table and its filter.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { element, visible, compare } = shared;
  const { columns, cells } = data;
  const { format, heading, tickText, ticksOf, scaleOf, rgb, css, inkOn } = scalesOf(columns, cells);
  const parse = filterOf(columns);
  const $ = (id) => document.getElementById(id);
  const measures = columns.map((_, i) => i).filter((i) => columns[i].measure);
  const byName = new Map(cells.map((cell) => [cell.name, cell]));
  const say = (cell) => `layer ${cell.layer}, head ${cell.head}`;
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  let measure = data.first, scale = null, x = null, y = null;
  const colourOf = (cell) => (scale === null || cell.values[measure] === null ? null : rgb(scale, scale.place(cell.values[measure])));
  let kept = new Set(cells);

  // The grid.
  const buttons = new Map();
  const heads = [...new Set(cells.map((cell) => cell.head))].sort((a, b) => a - b);
  const layers = [...new Set(cells.map((cell) => cell.layer))].sort((a, b) => a - b);
  const gap = (from, to) => {
    const row = element("div", `${from === to ? `layer ${from}` : `layers ${from} to ${to}`}: ${data.mapped ? "no recurrent head" : "no cell in this folder"}`, "gap");
    row.setAttribute("role", "presentation");
    return row;
  };
  const buildGrid = () => {
    const grid = $("grid");
    grid.style.setProperty("--columns", heads.length);
    grid.classList.toggle("many", layers.length > 12);
    const rowOf = (name) => {
      const row = element("div", undefined, "row");
      row.setAttribute("role", "row");
      const first = element("div", undefined, "layer");
      first.setAttribute("role", name === null ? "columnheader" : "rowheader");
      first.append(name === null ? "head" : element("i", "layer "), name === null ? "" : String(name));
      row.append(first);
      return row;
    };
    const top = rowOf(null);
    heads.forEach((head, i) => {
      const title = element("div", heads.length > 20 && i % 4 ? "" : String(head), "head");
      title.setAttribute("role", "columnheader");
      top.append(title);
    });
    grid.append(top);
    let next = 0;
    for (const layer of layers) {
      if (layer > next) grid.append(gap(next, layer - 1));
      next = layer + 1;
      const row = rowOf(layer);
      for (const cell of cells.filter((each) => each.layer === layer)) {
        const button = element("button", undefined, "cell");
        button.setAttribute("role", "gridcell");
        button.dataset.name = cell.name;
        button.tabIndex = -1;
        button.style.gridColumn = 2 + heads.indexOf(cell.head);
        button.append(element("span"));
        row.append(button);
        buttons.set(cell, button);
      }
      grid.append(row);
    }
    buttons.get(cells[0]).tabIndex = 0;
  };
  const colourGrid = () => {
    scale = measure === null ? null : scaleOf(measure, true);
    for (const [cell, button] of buttons) {
      const colour = colourOf(cell);
      button.style.background = colour ? css(colour) : "";
      button.style.color = colour ? inkOn(colour) : "";
      button.firstChild.textContent = colour ? format(measure, cell.values[measure], { short: true }) : "";
      button.classList.toggle("empty", !colour);
      button.classList.toggle("failed", cell.failed.length > 0);
      button.classList.toggle("off", !kept.has(cell));
      const value = measure === null ? "" : `: ${visible(columns[measure].label)} ${colour ? format(measure, cell.values[measure], { unit: true }) : "no value"}`;
      button.title = `${say(cell)}${value}${cell.failed.length ? "; failed" : ""}`;
      button.setAttribute("aria-label", button.title);
    }
    $("scale").hidden = scale === null;
    if (scale) {
      const stops = Array.from({ length: 21 }, (_, i) => css(rgb(scale, i / 20)));
      $("ramp").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
      const tick = (value, sign) => element("span", sign + format(measure, value, { unit: true }));
      $("ticks").replaceChildren(tick(scale.low, scale.below ? "≤ " : ""), tick(scale.back(0.5), ""), tick(scale.high, scale.above ? "≥ " : ""));
    }
    const key = (id, n, text) => {
      $(id).hidden = n === 0;
      $(id).lastChild.textContent = `${text}: ${plural(n, "cell")}`;
    };
    key("n-empty", [...buttons.keys()].filter((cell) => colourOf(cell) === null).length, "no value");
    key("n-failed", cells.filter((cell) => cell.failed.length).length, "failed");
    const column = measure === null ? null : columns[measure];
    $("about").textContent = column ? `${visible(column.key)}${column.about ? `: ${column.about}` : ""}${scale?.log ? " (colours on a logarithmic scale)" : ""}.` : "No figure has been measured.";
  };
  // The nearest cell from a cell in a direction of the keyboard.
  const neighbour = (cell, key) => {
    const inRow = cells.filter((each) => each.layer === cell.layer).sort((a, b) => a.head - b.head);
    const at = inRow.indexOf(cell);
    if (key === "ArrowLeft") return inRow[at - 1];
    if (key === "ArrowRight") return inRow[at + 1];
    if (key === "Home") return inRow[0];
    if (key === "End") return inRow.at(-1);
    const layer = layers[layers.indexOf(cell.layer) + (key === "ArrowDown" ? 1 : key === "ArrowUp" ? -1 : NaN)];
    const there = cells.filter((each) => each.layer === layer);
    return there.sort((a, b) => Math.abs(a.head - cell.head) - Math.abs(b.head - cell.head))[0];
  };

  // The panel.
  let chosen = null;
  const choose = (cell) => {
    if (cell === chosen) showPanel();
    else location.hash = cell.name;
  };
  const link = (text, address) => {
    const made = element("a", visible(text));
    made.href = address;
    return made;
  };
  const groups = [...new Set(columns.map((column) => column.group))];
  const showPanel = () => {
    const cell = chosen, parts = [];
    $("panel").classList.toggle("idle", cell === null);
    $("close").hidden = cell === null;
    $("name").textContent = cell ? `Layer ${cell.layer}, head ${cell.head}` : "No cell chosen";
    for (const [each, button] of buttons) button.classList.toggle("current", each === cell);
    for (const [each, row] of rows) row.classList.toggle("current", each === cell);
    for (const [each, circle] of circles) circle.classList.toggle("current", each === cell);
    if (cell === null) {
      const unknown = /^#L\d+H\d+$/.test(location.hash) ? `There is no cell ${location.hash.slice(1)} here. ` : "";
      $("body").replaceChildren(element("p", `${unknown}Click a cell in the grid, a point of the scatter plot or a row of the table.`, "soft"));
      $("panel").classList.toggle("idle", !unknown);
      return;
    }
    for (const [step, reason] of cell.failed) parts.push(element("p", `Failed at ${visible(step)}: ${visible(reason)}`, "notice"));
    if (cell.report) {
      const line = element("p");
      line.append(link("Open its report", cell.report));
      parts.push(line);
    } else if (cell.trained) {
      parts.push(element("p", cell.finished ? "It has no report yet. To make it:" : "Its SAE is trained and not tested yet. To test it and make a report:", "soft"), element("pre", visible(cell.command)));
    } else parts.push(element("p", "There is no SAE of this cell in the folder.", "soft"));
    if (cell.pictures.length) {
      const line = element("p", "Pictures: ");
      line.id = "pictures";
      line.append(...cell.pictures.flatMap(([experiment, stem, address]) => [link(stem === experiment ? stem : `${experiment}: ${stem}`, address), " "]));
      parts.push(line);
    }
    for (const group of groups) {
      const known = columns.map((_, i) => i).filter((i) => columns[i].group === group && cell.values[i] !== null);
      if (!known.length) continue;
      const title = element("h3", group || "cell");
      if (data.questions[group]) title.title = data.questions[group];
      const table = element("table");
      for (const i of known) {
        const row = table.insertRow();
        row.title = `${visible(columns[i].key)}: ${columns[i].about}`;
        row.insertCell().textContent = visible(columns[i].label);
        const value = row.insertCell();
        value.append(format(i, cell.values[i], { unit: true }));
        const ends = cell.intervals[i];
        if (ends) value.append(element("br"), element("small", `${format(i, ends[0])} to ${format(i, ends[1])}`));
      }
      parts.push(title, table);
    }
    $("body").replaceChildren(...parts);
    $("panel").scrollTop = 0;
  };

  // The scatter plot.
  const circles = new Map();
  let dots = [];
  const svg = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const drawScatter = () => {
    const plot = $("plot"), width = plot.clientWidth, height = plot.clientHeight;
    circles.clear();
    dots = [];
    $("tip").hidden = true;
    plot.replaceChildren();
    const axes = x === null || y === null ? [null, null] : [scaleOf(x, false), scaleOf(y, false)];
    const both = cells.filter((cell) => kept.has(cell) && cell.values[x] !== null && cell.values[y] !== null);
    plot.setAttribute("aria-label", x === null ? "No figures to plot" : `${heading(y)} against ${heading(x)}, ${plural(both.length, "cell")}; left and right move from point to point, Enter chooses`);
    if (axes.includes(null) || !width) {
      $("caption").textContent = "No cell has both figures.";
      return;
    }
    const [left, right, top, bottom, pad] = [62, 14, 12, 44, 14];
    const across = (p) => left + pad + p * (width - left - right - 2 * pad);
    const up = (p) => height - bottom - pad - p * (height - top - bottom - 2 * pad);
    const [ax, ay] = axes;
    for (const v of ticksOf(ax)) plot.append(svg("line", { x1: across(ax.raw(v)), x2: across(ax.raw(v)), y1: top, y2: height - bottom }), svg("text", { x: across(ax.raw(v)), y: height - bottom + 16, "text-anchor": "middle" }, tickText(x, v)));
    for (const v of ticksOf(ay)) plot.append(svg("line", { x1: left, x2: width - right, y1: up(ay.raw(v)), y2: up(ay.raw(v)) }), svg("text", { x: left - 6, y: up(ay.raw(v)) + 4, "text-anchor": "end" }, tickText(y, v)));
    const name = (i, axis) => `${columns[i].group ? `${columns[i].group}: ` : ""}${heading(i)}${axis.log ? ", log scale" : ""}`;
    plot.append(svg("text", { class: "title", x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, name(x, ax)));
    plot.append(svg("text", { class: "title", transform: `translate(14 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, name(y, ay)));
    // Where both axes are shares, points above the diagonal have more of the upper figure.
    const [from, to] = [Math.max(ax.low, ay.low), Math.min(ax.high, ay.high)];
    const diagonal = columns[x].unit === "share" && columns[y].unit === "share" && x !== y && from < to;
    let beyond = 0;
    for (const cell of both) {
      const [px, py] = [ax.raw(cell.values[x]), ay.raw(cell.values[y])];
      const outside = Math.min(px, py) < 0 || Math.max(px, py) > 1;
      beyond += outside;
      const dot = { cell, x: across(ax.place(cell.values[x])), y: up(ay.place(cell.values[y])) };
      const colour = colourOf(cell);
      const circle = svg("circle", { cx: dot.x, cy: dot.y, r: 5, class: `${outside ? "beyond" : ""}${cell === chosen ? " current" : ""}`, "data-name": cell.name, fill: colour ? css(colour) : "var(--hatch)" });
      plot.append(circle);
      circles.set(cell, circle);
      dots.push(dot);
    }
    if (diagonal) plot.append(svg("line", { class: "diagonal", x1: across(ax.raw(from)), y1: up(ay.raw(from)), x2: across(ax.raw(to)), y2: up(ay.raw(to)) }));
    dots.sort((a, b) => a.x - b.x || a.y - b.y);
    $("caption").textContent = `${plural(both.length, "cell")} with both figures, in the colours of the grid.`
      + (diagonal ? " Dashed: where both are equal." : "") + (beyond ? ` ${plural(beyond, "cell")} far outside the others, drawn as dashed rings at the edge.` : "");
  };
  let near = null;
  const point = (dot) => {
    if (near) circles.get(near.cell)?.classList.remove("near");
    near = dot ?? null;
    $("tip").hidden = near === null;
    if (near === null) return;
    circles.get(near.cell).classList.add("near");
    const line = (i) => `${heading(i)}: ${format(i, near.cell.values[i])}`;
    $("tip").textContent = `${say(near.cell)}\n${line(x)}\n${line(y)}`;
    $("tip").style.top = `${near.y + 12}px`;
    const room = $("plot").clientWidth - $("tip").offsetWidth;
    $("tip").style.left = `${Math.max(0, Math.min(room, near.x + 10))}px`;
  };
  const nearest = (event) => {
    const box = $("plot").getBoundingClientRect();
    const distance = (dot) => Math.hypot(dot.x - event.clientX + box.left, dot.y - event.clientY + box.top);
    const best = dots.reduce((a, b) => (a && distance(a) <= distance(b) ? a : b), null);
    return best && distance(best) < 18 ? best : null;
  };

  // The table.
  const rows = new Map();
  const inTable = columns.map((_, i) => i).filter((i) => columns[i].measure || new Set(cells.map((cell) => cell.values[i]).filter((value) => value !== null)).size > 1);
  let order = { column: null, down: false };
  const buildTable = () => {
    const [groupRow, titleRow] = $("table").tHead.rows;
    const starts = inTable.filter((i, n) => n === 0 || columns[i].group !== columns[inTable[n - 1]].group);
    const title = (text, i, about) => {
      const th = element("th", undefined, i === null || columns[i].unit === "text" ? "" : "number");
      th.scope = "col";
      th.title = about;
      if (starts.includes(i)) th.classList.add("start");
      th.append(element("button", text));
      th.firstChild.addEventListener("click", () => {
        // Numbers begin with the largest, texts and cells with the first.
        const down = i !== null && columns[i].unit !== "text";
        order = { column: i, down: order.column === i ? !order.down : down };
        fillTable();
      });
      titleRow.append(th);
    };
    groupRow.append(element("th"));
    title("cell", null, "layer and head");
    for (const i of starts) {
      const th = element("th", columns[i].group || "cell", "start");
      const end = starts[starts.indexOf(i) + 1];
      th.colSpan = (end === undefined ? inTable.length : inTable.indexOf(end)) - inTable.indexOf(i);
      groupRow.append(th);
    }
    for (const i of inTable) title(heading(i), i, `${visible(columns[i].key)}: ${columns[i].about}`);
    for (const cell of cells) {
      const row = element("tr");
      row.tabIndex = -1;
      row.dataset.name = cell.name;
      const first = element("th", `${cell.name}${cell.failed.length ? " ✕" : ""}`);
      first.scope = "row";
      row.append(first);
      for (const i of inTable) row.append(element("td", format(i, cell.values[i]), `${columns[i].unit === "text" ? "text" : "number"}${starts.includes(i) ? " start" : ""}`));
      rows.set(cell, row);
    }
    for (const [i, column] of columns.entries()) {
      const row = $("meanings").querySelector("tbody").insertRow();
      row.insertCell().append(element("code", visible(column.key)));
      for (const text of [column.label, { share: "%", count: "", text: "text" }[column.unit] ?? column.unit, column.about]) row.insertCell().textContent = visible(text);
      row.dataset.column = i;
    }
  };
  const fillTable = () => {
    const value = (cell) => (order.column === null ? cell.layer : cell.values[order.column]);
    const shown = cells.filter((cell) => kept.has(cell))
      .sort((a, b) => compare(value(a), value(b), order.down) || a.layer - b.layer || (order.column === null && order.down ? b.head - a.head : a.head - b.head));
    $("table").tBodies[0].replaceChildren(...shown.map((cell) => rows.get(cell)));
    for (const row of rows.values()) row.tabIndex = -1;
    if (shown.length) rows.get(shown[0]).tabIndex = 0;
    [...$("table").tHead.rows[1].cells].forEach((th, n) => {
      const mine = (n === 0 ? null : inTable[n - 1]) === order.column;
      if (mine) th.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
  };
  const applyFilter = () => {
    let test;
    try {
      test = parse($("filter").value);
    } catch (error) {
      $("answer").textContent = error.message;
    }
    $("filter").setAttribute("aria-invalid", String(!test));
    $("answer").classList.toggle("wrong", !test);
    if (!test) return;
    kept = new Set(cells.filter(test));
    $("answer").textContent = `${kept.size.toLocaleString("en")} of ${plural(cells.length, "cell")}`;
    colourGrid();
    drawScatter();
    fillTable();
  };

  // Choices, keys and the address.
  const fillSelect = (id, i, change) => {
    for (const group of groups) {
      const own = measures.filter((m) => columns[m].group === group);
      if (!own.length) continue;
      const options = element("optgroup");
      options.label = group || "cell";
      for (const m of own) {
        const option = element("option", heading(m));
        option.value = m;
        options.append(option);
      }
      $(id).append(options);
    }
    $(id).disabled = i === null;
    if (i !== null) $(id).value = i;
    $(id).addEventListener("change", () => change(Number($(id).value)));
  };
  const route = () => {
    chosen = byName.get(location.hash.slice(1)) ?? null;
    showPanel();
  };
  const close = () => {
    history.replaceState(null, "", location.href.split("#")[0]);
    route();
  };
  const named = (event) => byName.get(event.target.closest("[data-name]")?.dataset.name);
  $("grid").addEventListener("click", (event) => { if (named(event)) choose(named(event)); });
  $("grid").addEventListener("keydown", (event) => {
    const next = named(event) && neighbour(named(event), event.key);
    if (!next) return;
    event.preventDefault();
    for (const button of buttons.values()) button.tabIndex = -1;
    buttons.get(next).tabIndex = 0;
    buttons.get(next).focus();
  });
  $("table").tBodies[0].addEventListener("click", (event) => { if (named(event)) choose(named(event)); });
  $("table").tBodies[0].addEventListener("keydown", (event) => {
    const row = event.target.closest("tr");
    const next = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[event.key];
    if (event.key === "Enter") choose(named(event));
    if (!next) return;
    event.preventDefault();
    row.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  $("plot").addEventListener("pointermove", (event) => point(nearest(event)));
  $("plot").addEventListener("pointerleave", () => point(null));
  $("plot").addEventListener("click", (event) => { const dot = nearest(event); if (dot) choose(dot.cell); });
  $("plot").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Enter" && near) choose(near.cell);
    if (!step || !dots.length) return;
    event.preventDefault();
    point(dots[near ? Math.min(dots.length - 1, Math.max(0, dots.indexOf(near) + step)) : 0]);
  });
  $("filter").addEventListener("input", applyFilter);
  $("close").addEventListener("click", close);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen && event.target !== $("filter")) close(); });
  window.addEventListener("hashchange", route);

  const others = measures.filter((i) => i !== data.first);
  const lookup = columns.findIndex((column) => column.key === "replace_lookup_median_recovered");
  y = measure;
  x = measures.includes(lookup) ? lookup : others[0] ?? measure;
  $("example").textContent = measure === null ? "NAME > 0.8" : `${columns[measure].key} > 0.8`;
  fillSelect("measure", measure, (i) => { measure = i; colourGrid(); drawScatter(); });
  fillSelect("x", x, (i) => { x = i; drawScatter(); });
  fillSelect("y", y, (i) => { y = i; drawScatter(); });
  buildGrid();
  buildTable();
  applyFilter();
  route();
  new ResizeObserver(drawScatter).observe($("scatter"));
})();
