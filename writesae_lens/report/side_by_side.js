"use strict";
// The page of two SAEs: the table of matched features, and the contexts of a chosen pair.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { element, visible, number, percent, compare } = shared;
  const { draw, histogram, wordsOf, commonToken } = contextsOf(data.text);
  const $ = (id) => document.getElementById(id);
  const NAMES = { atom: "Atom", key: "Key code", value: "Value code" };
  const LETTERS = ["A", "B"], PAGE = 100, [LOW, HIGH] = data.thresholds;
  const sampleOf = (which, feature) => data.saes[which].samples[feature] ?? null;

  // A row: side and cosine of a pair, then for either SAE the feature, its label or most common token, uses, recovered.
  const about = (which, feature) => {
    if (feature === null) return [null, null, null, null];
    const sae = data.saes[which];
    return [feature, sae.labels[feature] ?? commonToken(sampleOf(which, feature)), sampleOf(which, feature)?.n ?? 0, sae.recovered[feature] ?? null];
  };
  const rows = data.pairs.map(([side, a, b, cosine]) => ({ side, features: [a, b], values: [side, cosine, ...about(0, a), ...about(1, b)] }));
  const address = (row) => `#${row.features.map((feature, i) => (feature === null ? "" : LETTERS[i].toLowerCase() + feature)).filter(Boolean).join("-")}`;
  const byAddress = new Map(rows.map((row) => [address(row), row]));
  const COLUMNS = [["side", "of codes: of the key, or of the value"], ["cosine", "of the two partners"],
    ...LETTERS.flatMap((name) => [[name, `feature of ${name}`, name.toLowerCase()], ["label or token", "its label, or the most common token of its strongest contexts"],
      ["active", "tokens of this text at which it is active"], ["recovered", "median over the tested firings in which it is dominant"]])];
  const TEXTS = [0, 3, 7], SHARES = [5, 9];
  const inTable = COLUMNS.map((_, i) => i).filter((i) => i > 0 || data.of_codes);

  let order = { column: 1, down: true }, shown = [], limit = PAGE, chosen = null, found;
  const texts = (row) => {
    found ??= new Map(rows.map((each) => [each, each.features.flatMap((feature, i) => (feature === null ? [] : [data.saes[i].labels[feature] ?? "", ...wordsOf(sampleOf(i, feature))])).join("\n").toLowerCase()]));
    return found.get(row);
  };
  const KINDS = {
    all: () => true, high: (cosine) => cosine > HIGH, middle: (cosine) => cosine > LOW && cosine <= HIGH,
    low: (cosine) => cosine === null || cosine <= LOW,
  };
  const select = () => {
    const words = $("search").value.toLowerCase(), side = data.of_codes ? $("side").value : "";
    const exact = /^\d+$/.test(words.trim()) ? Number(words) : null;
    const isExact = (row) => exact !== null && row.features.includes(exact);
    shown = rows.filter((row) => KINDS[$("which").value](row.values[1]) && (!side || row.side === side) && (!words || isExact(row) || texts(row).includes(words)));
    shown.sort((a, b) => isExact(b) - isExact(a) || compare(a.values[order.column], b.values[order.column], order.down));
    limit = PAGE;
    fill();
  };
  const text = (i, value) => {
    if (value === null) return "–";
    if (SHARES.includes(i)) return percent(value);
    if (TEXTS.includes(i)) return visible(value);
    return i === 1 ? value.toFixed(2) : i === 2 || i === 6 ? String(value) : number(value);
  };
  const fill = () => {
    $("pairs").tBodies[0].replaceChildren(...shown.slice(0, limit).map((row) => {
      const made = element("tr");
      made.tabIndex = 0;
      made.dataset.pair = address(row);
      made.classList.toggle("current", row === chosen);
      for (const i of inTable) made.append(element("td", text(i, row.values[i]), TEXTS.includes(i) ? "text" : "number"));
      return made;
    }));
    $("more").hidden = shown.length <= limit;
    $("count").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    inTable.forEach((i, n) => {
      const th = $("pairs").tHead.rows[0].cells[n];
      if (i === order.column) th.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
  };

  const promoted = (which, feature, isKey) => {
    const { tokens, logits, texts: words, measured } = data.saes[which], line = element("p");
    const half = tokens[feature].length / 2, n = measured[feature]?.[0] ?? 0;
    for (let i = 0; i < half; i += 1) {
      const size = logits[feature][i], chip = element("span", visible(words[tokens[feature][i]]), n || isKey ? "token" : "token doubtful");
      chip.append(" ", element("small", isKey ? percent(size) : `${size < 0 ? "−" : "+"}${number(Math.abs(size), 2)}`));
      line.append(chip);
    }
    return line;
  };
  const drawOne = (where, which, row) => {
    const feature = row.features[which], title = element("h3"), sae = data.saes[which];
    title.append(element("span", LETTERS[which], `name ${LETTERS[which].toLowerCase()}`), " ");
    if (feature === null) {
      title.append("no partner");
      where.replaceChildren(title, element("p", "The other SAE has more active features of this side than this one.", "soft"));
      return;
    }
    const label = sae.labels[feature] ? ` · ${visible(sae.labels[feature])}` : "";
    title.append(`${NAMES[row.side]} ${feature}${label}`);
    const sample = sampleOf(which, feature), contexts = element("div"), bars = element("div");
    draw(contexts, sample, row.side === "atom" ? "atom" : "code of its side");
    histogram(bars, sample);
    const recovered = sae.recovered[feature] ?? null;
    const facts = `${row.values[1] === null ? "" : `Cosine of the two: ${row.values[1].toFixed(2)}. `}${recovered === null ? "It is dominant at no tested firing." : `Recovered in the median where it is dominant: ${percent(recovered)}.`}`;
    const measured = sae.measured[feature]?.[0];
    const how = row.side === "key" ? "Tokens whose reads meet it most" : measured ? `Tokens that it promotes, measured at ${measured} of its firings` : "Tokens that it promotes by the direct path (not measured)";
    where.replaceChildren(title, element("p", facts), bars, element("h4", how), promoted(which, feature, row.side === "key"), contexts);
  };
  const route = () => {
    chosen = byAddress.get(location.hash) ?? null;
    $("both").hidden = chosen === null;
    for (const row of $("pairs").tBodies[0].rows) row.classList.toggle("current", row.dataset.pair === location.hash);
    if (chosen === null) return;
    drawOne($("one"), 0, chosen);
    drawOne($("other"), 1, chosen);
    $("both").scrollIntoView({ block: "nearest" });
  };

  for (const i of inTable) {
    const [label, title, name] = COLUMNS[i], th = element("th", undefined, TEXTS.includes(i) ? "" : "number");
    const button = element("button", name ? undefined : label);
    if (name) button.append(element("span", label, `name ${name}`));
    th.scope = "col";
    th.title = title;
    button.addEventListener("click", () => {
      const down = !TEXTS.includes(i) && label.length > 1; // numbers begin with the largest, texts and features with the first
      order = { column: i, down: order.column === i ? !order.down : down };
      select();
    });
    th.append(button);
    $("pairs").tHead.rows[0].append(th);
  }
  const follow = (event) => {
    const row = event.target.closest("tr[data-pair]");
    if (row && (event.type === "click" || event.key === "Enter")) location.hash = row.dataset.pair;
  };
  $("pairs").addEventListener("click", follow);
  $("pairs").addEventListener("keydown", follow);
  $("search").addEventListener("input", select);
  $("which").addEventListener("change", select);
  if (data.of_codes) $("side").addEventListener("change", select);
  $("more").addEventListener("click", () => { limit += PAGE; fill(); });
  window.addEventListener("hashchange", route);
  select();
  route();
})();
