"use strict";
// The page's own script: which section shows, the table of atoms, and the page of one atom.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = Object.fromEntries(data.columns.map((key, i) => [key, i]));
  const $ = (id) => document.getElementById(id);
  const { element, visible, number, percent, compare, colour, explain, copyable } = shared;
  const { draw: drawContexts, histogram, wordsOf } = contextsOf(data.text);
  const COLORS = { register: "blue", bundle: "red", rare: "grey", dead: "grey" };
  // Plots are drawn in the colours of the paper that the reader has chosen.
  const layout = (axes) => {
    const grid = { gridcolor: colour("line"), zerolinecolor: colour("edge"), linecolor: colour("edge") };
    const inLines = Object.entries(axes).map(([name, value]) => [name, /axis/.test(name) ? { ...grid, ...value } : value]);
    return {
      margin: { l: 56, r: 12, t: 12, b: 44 }, font: { family: "system-ui, sans-serif", size: 12, color: colour("ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      legend: { orientation: "h", y: 1.12 }, hoverlabel: { align: "left" }, ...Object.fromEntries(inLines),
    };
  };
  const CONFIG = { displayModeBar: false, responsive: true };
  const diverging = () => [[0, "#2166ac"], [0.25, shared.isDark() ? "#1f4e7a" : "#92c5de"], [0.5, colour("paper")], [0.75, shared.isDark() ? "#7c2a30" : "#f4a582"], [1, "#b2182b"]];
  const PAGE = 100;
  const TEXTS = ["class", "token", "side", "label"];

  const of = (atom, key) => data.rows[atom][at[key]];
  const cell = (atom, key) => {
    const value = of(atom, key);
    if (value === null) return "–";
    if (key === "win_rate" || key === "recovered") return percent(value);
    if (key === "token" || key === "label") return visible(value);
    return typeof value === "number" && key !== "atom" ? number(value) : String(value);
  };

  const OF_CODES = "side" in at;
  const sideOf = (atom) => (OF_CODES ? of(atom, "side") : "atom");
  const NAMES = { atom: "Atom", key: "Key code", value: "Value code" };

  const ratio = (atom) => {
    const [mine, deleted] = [of(atom, "kl_atom"), of(atom, "kl_delete")];
    return mine === null ? "–" : `${number(deleted / Math.max(mine, 1e-12), 2)} ×`;
  };

  // Bytes of one atom's profile, as fractions of its largest entry.
  const decode = (text) => Int8Array.from(atob(text), (c) => c.charCodeAt(0));
  let profiles;
  const profile = (side, atom) => {
    profiles ??= { key: decode(data.key), value: decode(data.value) };
    const size = side === "key" ? data.d_k : data.d_v;
    return Array.from(profiles[side].subarray(atom * size, (atom + 1) * size), (x) => x / 127);
  };

  // The table: the order and the atoms that the search leaves.
  let order = { key: "n_firings", down: true };
  let shown = [];
  let limit = PAGE;
  // What the search looks through is put together when it is first used.
  let found;
  const texts = (atom) => {
    found ??= data.rows.map((_, n) => {
      const promoted = data.tokens[n].slice(0, data.tokens[n].length / 2).map((id) => data.texts[id]);
      return [data.labels[n] ?? "", ...wordsOf(data.samples[n]), ...promoted].join("\n").toLowerCase();
    });
    return found[atom];
  };

  const select = () => {
    const words = $("search").value.toLowerCase();
    const name = $("class").value;
    const side = OF_CODES ? $("side").value : "";
    const exact = /^\d+$/.test(words.trim()) ? Number(words) : null;
    shown = data.rows.map((_, atom) => atom).filter((atom) =>
      (!name || of(atom, "class") === name) && (!side || of(atom, "side") === side) && (!words || atom === exact || texts(atom).includes(words)));
    const column = at[order.key];
    shown.sort((a, b) => compare(data.rows[a][column], data.rows[b][column], order.down) || a - b);
    // An atom that is asked for by number comes before those whose texts hold the number.
    if (exact !== null && shown.includes(exact)) shown = [exact, ...shown.filter((atom) => atom !== exact)];
    limit = PAGE;
    draw();
  };

  const draw = () => {
    const rows = shown.slice(0, limit).map((atom) => {
      const row = element("tr");
      row.tabIndex = 0;
      row.dataset.atom = atom;
      for (const key of data.columns) {
        const text = TEXTS.includes(key);
        const td = element("td", undefined, text ? "text" : "number");
        td.append(key === "class" ? element("span", cell(atom, key), `badge ${of(atom, key)}`) : cell(atom, key));
        row.append(td);
      }
      return row;
    });
    $("table").tBodies[0].replaceChildren(...rows);
    $("more").hidden = shown.length <= limit;
    $("count").textContent = `${shown.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} ${OF_CODES ? "codes" : "atoms"}`;
    for (const th of $("table").tHead.rows[0].cells) {
      if (th.dataset.key === order.key) th.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
  };

  // A mean over few firings, or one whose sign is as often the other, says nothing: such tokens are greyed.
  const FEW = 4, TOSS = 0.75;
  const signed = (x) => `${x < 0 ? "−" : "+"}${number(Math.abs(x), 2)}`;
  const tokens = (where, atom, first) => {
    const half = data.tokens[atom].length / 2;
    const [n, agreement, control] = data.measured[atom] ?? [0, null, null];
    const address = sideOf(atom) === "key";
    where.replaceChildren(...Array.from({ length: half }, (_, i) => {
      const place = first + i;
      const doubtful = !address && (n ? n < FEW || agreement[place] < TOSS : data.read[atom] < TOSS);
      const shownToken = element("span", visible(data.texts[data.tokens[atom][place]]), doubtful ? "token doubtful" : "token");
      const size = address ? percent(data.logits[atom][place]) : signed(data.logits[atom][place]);
      const beside = n ? `${size}, ${Math.round(n * agreement[place])} of ${n}, control ${signed(control[place])}` : size;
      shownToken.append(" ", element("small", beside));
      return shownToken;
    }));
  };
  const howMeasured = (atom) => {
    if (sideOf(atom) === "key") {
      const met = data.met[atom];
      const spread = met ? ` Reads that meet what is written here: ${data.distances.map((h, i) => `${h ? `${h} on` : "own token"} ${percent(met[i])}`).join(", ")} (share of <read, code>² by tokens from the write, each pulled back through decay and erase).` : "";
      return `An address: tokens of this text whose own reads meet it most, and the share of their read's squared norm along it, in the mean.${spread}`;
    }
    const n = data.measured[atom]?.[0];
    if (n) {
      return `Measured at ${n === 1 ? "one of its firings" : `${n} of its firings`}: mean shift of the next token's logits with ${OF_CODES ? "the code alone, at the address of the active key codes," : "the atom"} in the write's place against the write deleted, beyond the mean of all tokens; `
        + `at how many firings the shift has that sign; and the same for another ${OF_CODES ? "content" : "atom"} of this norm (control). Greyed: fewer than ${FEW} firings, or the sign holds at fewer than ${percent(TOSS)} of them. Later tokens, which read the write too, are not looked at.`;
    }
    const toss = data.read[atom] < TOSS ? " Reads of both signs are nearly as frequent, so it promotes and suppresses these alike: they are greyed." : "";
    return `Not measured, for it is the strongest ${OF_CODES ? "code of its side" : "atom"} nowhere in this text. Tokens by the direct path: value side through the head's output matrix and the unembedding, without norm, gate or later layers, for a read of the sign that ${percent(data.read[atom])} of this text's reads have.${toss}`;
  };

  const drawProfile = (atom) => {
    const [key, value] = [profile("key", atom), profile("value", atom)];
    const bars = { type: "bar", marker: { color: colour("blue") }, showlegend: false };
    Plotly.react("profile", [
      { type: "heatmap", z: key.map((k) => value.map((v) => k * v)), zmid: 0, zmin: -1, zmax: 1, colorscale: diverging(),
        showscale: false, hovertemplate: "key %{y}, value %{x}: %{z:.2f}<extra></extra>" },
      { ...bars, x: value.map((_, i) => i), y: value, yaxis: "y2", hovertemplate: "value %{x}: %{y:.2f}<extra></extra>" },
      { ...bars, orientation: "h", y: key.map((_, i) => i), x: key, xaxis: "x2", hovertemplate: "key %{y}: %{x:.2f}<extra></extra>" },
    ], layout({
      bargap: 0,
      xaxis: { domain: [0, 0.82], title: { text: "value side" } }, yaxis: { domain: [0, 0.78], autorange: "reversed", title: { text: "key side" } },
      xaxis2: { domain: [0.85, 1], range: [-1.05, 1.05], showticklabels: false, zeroline: true },
      yaxis2: { domain: [0.82, 1], range: [-1.05, 1.05], showticklabels: false, zeroline: true },
    }), CONFIG);
  };

  const drawDistributions = (atom) => {
    const firings = data.firings[atom];
    $("distributions").hidden = !firings;
    if (!firings) return;
    const [cosine, withAtom, without, wins] = firings;
    Plotly.react("cosines", [{ type: "histogram", x: cosine, xbins: { start: -1, end: 1.0001, size: 0.05 }, marker: { color: colour("blue") } }],
      layout({ bargap: 0.05, xaxis: { range: [-1.02, 1.02], title: { text: "cosine" } }, yaxis: { title: { text: "firings" } } }), CONFIG);
    const ends = [Math.min(...withAtom, ...without) - 0.3, Math.max(...withAtom, ...without) + 0.3];
    Plotly.react("kls", [
      { type: "scatter", mode: "lines", x: ends, y: ends, line: { color: colour("ink"), width: 1, dash: "dash" }, hoverinfo: "skip", showlegend: false },
      { type: "scatter", mode: "markers", x: without, y: withAtom, marker: { size: 6, opacity: 0.6,
        color: wins.map((win) => colour(win ? "blue" : "red")) }, showlegend: false,
        hovertemplate: "deleted 10^%{x:.2f}, atom 10^%{y:.2f} nats<extra></extra>" },
    ], layout({ xaxis: { range: ends, title: { text: "log10 KL, write deleted (nats)" } }, yaxis: { range: ends, title: { text: "log10 KL, atom in its place" } } }), CONFIG);
  };

  // Lines of Python that steer with the feature, and that take it out of the writes.
  const drawUse = (atom) => {
    const [cut, imports] = data.reading;
    const [head, body] = data.loading.split("\n\n");
    const steers = data.shipped ? body : `${body}\n${cut}`, sizes = data.shipped ? "" : ", tokens=tokens";
    const lines = [
      ["steer", "Steer with it (3 times the size that it usually has where it is active):",
        `${[head, ...(data.shipped ? [] : imports)].join("\n")}\nfrom writesae_lens import steering\n\n${steers}\nwith steering(model, sae, {${atom}: 3.0}${sizes}):\n    print(model.generate("Once upon a time", max_new_tokens=40))`],
      ["ablate", "Ablate it, where it is active, and see what the token that it promotes loses:",
        `${[head, ...imports].join("\n")}\nfrom writesae_lens.experiments import erase_atom\n\n${body}\n${cut}\nprint(erase_atom(model, sae, tokens, atom=${atom}).headline)`],
    ].slice(data.on_states ? 1 : 0);
    $("use").replaceChildren(...lines.flatMap(([name, title, code]) => {
      const pre = element("pre", code);
      pre.dataset.name = name;
      return [element("p", title, "soft"), pre];
    }));
    $("use").querySelectorAll("pre").forEach(copyable);
  };

  const open = (atom) => {
    const label = data.labels[atom] ? `· ${visible(data.labels[atom])} ` : "";
    $("name").replaceChildren(`${NAMES[sideOf(atom)]} ${atom} ${label}`, element("span", of(atom, "class"), `badge ${of(atom, "class")}`));
    const cards = [
      [cell(atom, "recovered"), "recovered in the median by its stand-ins"], [cell(atom, "n_firings"), `firings as the strongest ${OF_CODES ? "of its side" : "atom"}`], [cell(atom, "coefficient"), "largest coefficient"],
      [cell(atom, "median_cosine"), OF_CODES ? `median cosine to the writes' ${sideOf(atom)}s` : "median cosine to native writes"], [cell(atom, "win_rate"), `wins of ${cell(atom, "n_tested")} tested against deletion`],
      [ratio(atom), "median KL deleted, in that of the stand-in"],
    ];
    $("figures-of-merit").replaceChildren(...cards.map(([value, label]) => {
      const card = element("div", undefined, "card");
      card.append(element("b", value), element("span", label));
      return card;
    }));
    explain($("figures-of-merit"));
    drawContexts($("contexts"), data.samples[atom], OF_CODES ? "code of its side" : "atom");
    $("uses").hidden = !data.samples[atom];
    histogram($("activations"), data.samples[atom]);
    drawUse(atom);
    $("up-title").textContent = sideOf(atom) === "key" ? "Read by" : "Promotes";
    $("suppressed").hidden = sideOf(atom) === "key";
    tokens($("up"), atom, 0);
    tokens($("down"), atom, data.tokens[atom].length / 2);
    const rank = data.rank1[atom] < 0.995 ? ` Its leading rank-1 part, shown here, has ${percent(data.rank1[atom])} of its squared norm.` : "";
    $("read").textContent = howMeasured(atom) + rank;
    $("near").tBodies[0].replaceChildren(...data.near[atom].map((other, i) => {
      const row = element("tr");
      const link = element("a", String(other));
      link.href = `#atom-${other}`;
      const first = element("td", undefined, "number");
      first.append(link);
      const kind = element("td");
      kind.append(element("span", of(other, "class"), `badge ${of(other, "class")}`));
      row.append(first, element("td", data.cosines[atom][i].toFixed(3), "number"), kind, element("td", cell(other, "token"), "text"));
      return row;
    }));
    const place = shown.indexOf(atom);
    $("previous").disabled = place <= 0;
    $("next").disabled = place < 0 || place === shown.length - 1;
    $("previous").onclick = () => { location.hash = `#atom-${shown[place - 1]}`; };
    $("next").onclick = () => { location.hash = `#atom-${shown[place + 1]}`; };
    drawProfile(atom);
    drawDistributions(atom);
  };

  let mapped = false;
  const drawMap = () => {
    if (mapped) return;
    mapped = true;
    const tested = data.rows.map((_, atom) => atom).filter((atom) => of(atom, "recovered") !== null && of(atom, "median_cosine") !== null);
    const groups = OF_CODES ? { "key codes": "red", "value codes": "blue" } : COLORS;
    const groupOf = (atom) => (OF_CODES ? `${of(atom, "side")} codes` : of(atom, "class"));
    const traces = Object.keys(groups).map((name) => {
      const atoms = tested.filter((atom) => groupOf(atom) === name);
      return {
        type: "scatter", mode: "markers", name: `${name} (${atoms.length})`, customdata: atoms,
        x: atoms.map((atom) => of(atom, "median_cosine")), y: atoms.map((atom) => Math.max(-1, of(atom, "recovered"))),
        text: atoms.map((atom) => `${NAMES[sideOf(atom)]} ${atom}: ${cell(atom, "n_tested")} firings tested, ${cell(atom, "token")}`.replaceAll("<", "‹")),
        marker: { color: colour(groups[name]), opacity: 0.5, size: atoms.map((atom) => 4 + 2 * Math.log2(1 + of(atom, "n_tested"))) },
        hovertemplate: "%{text}<br>cosine %{x:.2f}, recovered %{y:.0%}<extra></extra>",
      };
    }).filter((trace) => trace.x.length);
    Plotly.react("map", traces, layout({ xaxis: { title: { text: "median cosine to the native writes" } },
      yaxis: { title: { text: "median recovered (lowest: -100% or less)" }, tickformat: ".0%", range: [-1.05, 1.05] } }), CONFIG);
    $("map").removeAllListeners("plotly_click");
    $("map").on("plotly_click", (event) => { location.hash = `#atom-${event.points[0].customdata}`; });
  };

  const asked = () => {
    const hash = /^#atom-(\d+)$/.exec(location.hash);
    return hash && Number(hash[1]) < data.rows.length ? Number(hash[1]) : null;
  };
  const route = () => {
    const hash = location.hash.slice(1), atom = asked();
    const page = atom !== null ? "atom" : hash === "atoms" ? "atoms" : "overview";
    for (const name of ["overview", "atoms", "atom"]) $(`page-${name}`).hidden = name !== page;
    for (const link of document.querySelectorAll("nav a")) {
      const current = link.hash === (page === "overview" ? "#overview" : "#atoms");
      if (current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (atom !== null) open(atom);
    if (page === "overview") drawMap();
    window.scrollTo(0, 0);
    if (atom !== null) $("name").focus({ preventScroll: true });
  };

  for (const name of Object.keys(COLORS).filter((name) => data.rows.some((row) => row[at.class] === name))) {
    const option = element("option", name);
    option.value = name;
    $("class").append(option);
  }
  $("search").addEventListener("input", select);
  $("class").addEventListener("change", select);
  if (OF_CODES) $("side").addEventListener("change", select);
  $("more").addEventListener("click", () => { limit += PAGE; draw(); });
  $("table").tHead.addEventListener("click", (event) => {
    const th = event.target.closest("th");
    if (!th) return;
    const key = th.dataset.key;
    // Numbers begin with the largest, texts and the atoms' numbers with the first.
    const down = !["atom", ...TEXTS].includes(key);
    order = { key, down: order.key === key ? !order.down : down };
    select();
  });
  const follow = (event) => {
    const row = event.target.closest("tr[data-atom]");
    if (row && (event.type === "click" || event.key === "Enter")) location.hash = `#atom-${row.dataset.atom}`;
  };
  $("table").addEventListener("click", follow);
  $("table").addEventListener("keydown", follow);
  window.addEventListener("hashchange", route);
  window.addEventListener("theme", () => {
    const atom = asked();
    mapped = false;
    if (atom !== null) { drawProfile(atom); drawDistributions(atom); } else if (!$("page-overview").hidden) drawMap();
  });
  select();
  route();
})();
