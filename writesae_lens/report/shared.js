"use strict";
// What the scripts of all pages share: elements, how texts and numbers are shown, and the order of values.
const shared = (() => {
  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const visible = (text) => String(text).replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/[\u0000-\u001f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, "");
  const number = (x, digits = 3) => (x === null ? "–" : Number.isInteger(x) ? x.toLocaleString("en") : Number(x.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits }));
  const percent = (x) => (x === null ? "–" : `${Math.round(100 * x)}%`);
  // Order of two values for sort(): texts by letters, numbers by size; a missing value comes last either way.
  const compare = (x, y, down) => {
    if (x === null || y === null) return (x === null) - (y === null);
    return (down ? -1 : 1) * (typeof x === "string" ? x.localeCompare(y) : x - y);
  };
  return { element, visible, number, percent, compare };
})();
