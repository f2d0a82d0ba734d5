"use strict";
// Where a feature is active: its contexts, each token shaded by the activation there, and a histogram of activations.
const contextsOf = (text) => {
  const { element, visible, number } = shared;
  const bytes = Uint8Array.from(atob(text.tokens), (c) => c.charCodeAt(0));
  const tokens = new Uint32Array(bytes.buffer);
  const N = text.length, N_POSITIONS = tokens.length;
  const word = (passage, position) => text.texts[tokens[passage * N + position]];
  const range = (position) => [Math.max(0, position - text.before), Math.min(N, position + text.after + 1)];

  // All that the search looks through: the texts of a feature's contexts.
  const wordsOf = (sample) => (sample?.contexts ?? []).map(([, passage, position]) => {
    const [from, to] = range(position);
    return Array.from({ length: to - from }, (_, i) => word(passage, from + i)).join("");
  });

  // The token on which most of a feature's strongest contexts are.
  const commonToken = (sample) => {
    const counts = new Map();
    for (const [group, passage, position] of sample?.contexts ?? []) {
      if (group === 0) counts.set(word(passage, position), 1 + (counts.get(word(passage, position)) ?? 0));
    }
    return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? null;
  };

  const line = ([, passage, position, coefficient, dominant, ...shades], sample, other) => {
    const made = element("p", undefined, "context");
    const sizes = new Map();
    for (let i = 0; i < shades.length; i += 2) sizes.set(position + shades[i], shades[i + 1]);
    const [from, to] = range(position);
    let plain = "";
    made.append(element("small", number(coefficient)));
    for (let at = from; at < to; at += 1) {
      const size = sizes.get(at), shown = visible(word(passage, at));
      if (size === undefined) {
        plain += shown;
        continue;
      }
      const own = at === position;
      const token = element(own ? "mark" : "span", shown, own && !dominant ? "weaker" : "");
      token.style.setProperty("--size", size / 100);
      const of = own ? coefficient : size * sample.max / 100;
      token.title = `coefficient ${number(of)}, ${size}% of its largest; passage ${passage}, position ${at}` + (own && !dominant ? `; another ${other} is stronger here` : "");
      made.append(plain, token);
      plain = "";
    }
    made.append(plain);
    return made;
  };

  // The contexts of a feature under the headings of their groups.
  const draw = (where, sample, other) => {
    if (!sample) {
      where.replaceChildren(element("p", "It is active nowhere in this text.", "soft"));
      return;
    }
    where.replaceChildren(...text.groups.flatMap((name, group) => {
      const own = sample.contexts.filter((context) => context[0] === group);
      return own.length ? [element("h4", name), ...own.map((context) => line(context, sample, other))] : [];
    }));
  };

  const histogram = (where, sample) => {
    where.replaceChildren();
    if (!sample) return;
    const most = Math.max(...sample.bins), bars = element("div", undefined, "bars");
    const width = sample.max / sample.bins.length;
    for (const [i, count] of sample.bins.entries()) {
      const bar = element("i");
      bar.style.height = `${100 * count / most}%`;
      if (count) bar.style.minHeight = "2px";
      bar.title = `${number(count)} with coefficients from ${number(i * width)} to ${number((i + 1) * width)}`;
      bars.append(bar);
    }
    bars.setAttribute("role", "img");
    bars.setAttribute("aria-label", `histogram of the coefficient at ${number(sample.n)} positions, from 0 to ${number(sample.max)}`);
    const ends = element("p", undefined, "ends");
    ends.append(element("span", "0"), element("span", `coefficient (highest bar: ${number(most)} tokens)`), element("span", number(sample.max)));
    where.append(bars, ends, element("p", `Active at ${number(sample.n)} of ${number(N_POSITIONS)} tokens (${number(100 * sample.n / N_POSITIONS, 2)}%).`, "soft"));
  };
  return { draw, histogram, wordsOf, commonToken };
};
