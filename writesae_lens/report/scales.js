"use strict";
// How the atlas shows figures: as text, as a place on a scale, and as a colour that most colour-blind readers can tell.
const scalesOf = (columns, cells) => {
  const { visible, number } = shared;
  const VIRIDIS = ["#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"];
  const DIVERGING = ["#b2182b", "#f4a582", "#f7f7f7", "#92c5de", "#2166ac"]; // red below zero, blue above

  // Numbers that would begin with many zeros, or end with them, are written with a power of ten.
  const digits = (x, n) => (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e7) ? x.toExponential(n - 1).replace(/\.?0*e\+?/, "e") : number(x, n));
  // A value as text: shares in %, whole numbers in full, others with three digits.
  const format = (i, value, { unit = false, short = false } = {}) => {
    if (value === null) return "–";
    const column = columns[i];
    if (typeof value === "string") return visible(value);
    if (column.unit === "share") return `${short ? Math.round(100 * value) + 0 : (100 * value).toFixed(1)}%`;
    const text = digits(value, short ? 2 : 3);
    return unit && column.unit && column.unit !== "count" ? `${text} ${column.unit}` : text;
  };
  const heading = (i) => {
    const { label, unit } = columns[i];
    return visible(unit && !["share", "count", "text"].includes(unit) ? `${label}, ${unit}` : label);
  };

  // Scales end at the data. Values far outside the quartiles take the colour, or the edge, of the nearer end where
  // the others would else share less than a fifth of the scale.
  const scaleOf = (i, around) => {
    const known = cells.map((cell) => cell.values[i]).filter((x) => x !== null).sort((a, b) => a - b);
    if (!known.length) return null;
    const log = columns[i].unit !== "share" && known[0] > 0 && known.at(-1) / known[0] > 100;
    const inner = log ? known.map(Math.log10) : known;
    const quartile = (q) => inner[Math.round(q * (inner.length - 1))];
    const far = 3 * (quartile(0.75) - quartile(0.25)) || Infinity;
    const inside = inner.filter((x) => x >= quartile(0.25) - far && x <= quartile(0.75) + far);
    const squeezed = inside.at(-1) - inside[0] < (inner.at(-1) - inner[0]) / 5;
    let [low, high] = squeezed ? [inside[0], inside.at(-1)] : [inner[0], inner.at(-1)];
    const diverging = low < 0 && high > 0 && !log;
    if (diverging && around) [low, high] = [-Math.max(-low, high), Math.max(-low, high)];
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 20, high + (Math.abs(high) || 1) / 20];
    const back = (x) => (log ? 10 ** x : x);
    const raw = (value) => ((log ? Math.log10(value) : value) - low) / (high - low);
    return {
      log, diverging, low: back(low), high: back(high), raw, back: (p) => back(low + p * (high - low)),
      place: (value) => Math.min(1, Math.max(0, raw(value))),
      below: inner[0] < low, above: inner.at(-1) > high,
    };
  };
  const colourAt = (stops, p) => {
    const at = Math.min(stops.length - 2, Math.floor(p * (stops.length - 1)));
    const share = p * (stops.length - 1) - at;
    return [1, 3, 5].map((c) => {
      const [a, b] = [stops[at], stops[at + 1]].map((stop) => parseInt(stop.slice(c, c + 2), 16));
      return Math.round(a + share * (b - a));
    });
  };
  const rgb = (scale, p) => colourAt(scale.diverging ? DIVERGING : VIRIDIS, p);
  const css = (colour) => `rgb(${colour.join(" ")})`;
  const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff");

  const ticksOf = (axis) => {
    if (axis.log) {
      const powers = Array.from({ length: 40 }, (_, n) => 10 ** (n - 20)).flatMap((p) => [p, 2 * p, 5 * p]).filter((v) => v >= axis.low && v <= axis.high);
      const decades = powers.filter((v) => Number.isInteger(Number(Math.log10(v).toFixed(9))));
      return decades.length > 2 ? decades : powers;
    }
    const rough = (axis.high - axis.low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const first = Math.ceil(axis.low / step);
    return Array.from({ length: Math.floor(axis.high / step) - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
  };
  const tickText = (i, value) => (columns[i].unit === "share" ? `${number(100 * value)}%` : digits(value, 3));
  return { format, heading, tickText, ticksOf, scaleOf, rgb, css, inkOn };
};
