"use strict";
// The page of a prompt: its text shaded by a cell or by one feature, and the features at a token.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const { element, visible, number } = shared;
  const NAMES = { atom: "atom", key: "key code", value: "value code" };
  // What is chosen: a cell, a feature of it or null for all, and a token or null.
  const chosen = { cell: 0, feature: null, token: null };

  const tokens = data.tokens.map((text, at) => {
    const token = element("span", visible(text) || "·");
    if (text.includes("\n")) token.append("\n");
    token.tabIndex = 0;
    token.setAttribute("role", "button");
    token.addEventListener("click", () => choose({ token: at }));
    token.addEventListener("keydown", (event) => { if (event.key === "Enter") choose({ token: at }); });
    return token;
  });
  $("text").append(...tokens);
  $("cell").append(...data.cells.map((cell, i) => {
    const option = element("option", `${cell.name}${cell.kind === "state" ? " (states)" : ""}`);
    option.value = i;
    return option;
  }));

  const shades = () => {
    const cell = data.cells[chosen.cell];
    if (chosen.feature === null) return cell.shade;
    const mine = cell.entries.filter(([, feature]) => feature === chosen.feature);
    const most = Math.max(...mine.map(([, , size]) => size));
    const shade = data.tokens.map(() => 0);
    for (const [at, , size] of mine) shade[at] = size / most;
    return shade;
  };

  const features = (cell) => {
    const found = new Map();
    for (const [, feature, size] of cell.entries) {
      const [largest, count] = found.get(feature) ?? [0, 0];
      found.set(feature, [Math.max(largest, size), count + 1]);
    }
    const isKey = (feature) => cell.features[feature][0] === "key";
    return [...found].sort((a, b) => isKey(a[0]) - isKey(b[0]) || b[1][0] - a[1][0]);
  };

  const promoted = (texts) => {
    const td = element("td");
    td.append(...texts.map((text) => element("span", visible(text), "token")));
    return td;
  };

  // A row of either table; a click or Enter shades the text by the feature.
  const row = (cell, feature, cells) => {
    const [, label, promotes] = data.cells[cell].features[feature];
    const tr = element("tr");
    tr.tabIndex = 0;
    tr.setAttribute("aria-selected", cell === chosen.cell && feature === chosen.feature);
    tr.append(...cells.map(([text, name]) => element("td", text, name)), element("td", label), promoted(promotes));
    tr.addEventListener("click", () => choose({ cell, feature }));
    tr.addEventListener("keydown", (event) => { if (event.key === "Enter") choose({ cell, feature }); });
    return tr;
  };

  const draw = () => {
    const cell = data.cells[chosen.cell];
    const shade = shades();
    tokens.forEach((token, at) => {
      token.style.background = shade[at] > 0 ? `rgb(var(--shade) / ${Math.round(10 + 60 * shade[at])}%)` : "none";
      token.setAttribute("aria-pressed", at === chosen.token);
    });
    $("cell").value = chosen.cell;
    $("all").disabled = chosen.feature === null;
    const name = (feature) => `${NAMES[cell.features[feature][0]]} ${feature}${cell.features[feature][1] ? `, ${cell.features[feature][1]}` : ""}`;
    $("shown").textContent = chosen.feature === null ? `${Object.keys(cell.features).length.toLocaleString("en")} features shown` : name(chosen.feature);
    $("features-title").textContent = `Features of ${cell.name}`;
    $("features").tBodies[0].replaceChildren(...features(cell).map(([feature, [largest, count]]) =>
      row(chosen.cell, feature, [[String(feature), "number"], [NAMES[cell.features[feature][0]], "side"], [number(largest), "number"], [number(count), "number"]])));
    const at = chosen.token;
    $("token-title").textContent = at === null ? "Features at a token: click one" : `Features at “${visible(data.tokens[at])}”, position ${at}`;
    // The chosen cell first, and in each cell contents before addresses.
    const order = [chosen.cell, ...[...data.cells.keys()].filter((i) => i !== chosen.cell)];
    const isKey = (one, feature) => one.features[feature][0] === "key";
    const here = at === null ? [] : order.flatMap((i) => {
      const one = data.cells[i];
      const entries = one.entries.filter(([where]) => where === at).sort((a, b) => isKey(one, a[1]) - isKey(one, b[1]) || b[2] - a[2]);
      return entries.map(([, feature, size]) =>
        row(i, feature, [[one.name], [String(feature), "number"], [NAMES[one.features[feature][0]], "side"], [number(size), "number"]]));
    });
    $("here").tBodies[0].replaceChildren(...here);
  };

  const choose = (change) => {
    Object.assign(chosen, change);
    draw();
  };
  $("cell").addEventListener("change", () => choose({ cell: Number($("cell").value), feature: null }));
  $("all").addEventListener("click", () => choose({ feature: null }));
  draw();
})();
