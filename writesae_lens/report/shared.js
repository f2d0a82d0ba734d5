"use strict";
// What the scripts of all pages share: elements, how texts and numbers are shown, the order of values, light and dark
// paper, terms with their meanings, and code to copy.
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

  // Light or dark: the reader's system decides until the button does; pages that draw listen for "theme".
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const button = element("button", undefined, "button");
  const tell = () => {
    button.textContent = isDark() ? "☀ light" : "☾ dark";
    button.title = `Switch to ${isDark() ? "light" : "dark"} paper`;
    window.dispatchEvent(new Event("theme"));
  };
  button.id = "theme";
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("writesae-theme", root.dataset.theme); } catch { /* it is forgotten, then */ }
    tell();
  });
  system.addEventListener("change", tell);
  document.querySelector("header").append(button);
  tell();

  // The first place in an element at which a term of the glossary stands shows its meaning.
  const meanings = new Map();
  for (const term of document.querySelectorAll("#glossary dt")) {
    for (const name of term.dataset.names.split("|")) meanings.set(name.toLowerCase(), term.nextElementSibling.textContent);
  }
  const names = [...meanings.keys()].sort((a, b) => b.length - a.length).map((name) => name.replace(/[^\w\s]/g, "\\$&"));
  const TERM = new RegExp(`(?<![\\w-])(${names.join("|") || "(?!)"})(?=s?(?![\\w-]))`, "gi");
  const explain = (where) => {
    const walker = document.createTreeWalker(where, NodeFilter.SHOW_TEXT), texts = [], seen = new Set();
    while (walker.nextNode()) if (!walker.currentNode.parentElement.closest("button, code, .term")) texts.push(walker.currentNode);
    for (const text of texts) {
      const parts = [];
      let done = 0;
      for (const found of text.data.matchAll(TERM)) {
        const name = found[0].toLowerCase();
        if (seen.has(name)) continue;
        seen.add(name);
        const term = element("span", found[0], "term");
        term.title = meanings.get(name);
        parts.push(text.data.slice(done, found.index), term);
        done = found.index + found[0].length;
      }
      if (parts.length) text.replaceWith(...parts, text.data.slice(done));
    }
  };
  document.querySelectorAll("[data-explain]").forEach(explain);

  // A button that copies the text of a <pre>; where the browser lets no page copy, it selects the text.
  const copyable = (pre) => {
    const box = element("div", undefined, "copied"), copy = element("button", "copy", "button");
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(pre.textContent);
        copy.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(pre);
        copy.textContent = "selected";
      }
      setTimeout(() => { copy.textContent = "copy"; }, 1500);
    });
    pre.replaceWith(box);
    box.append(pre, copy);
  };
  document.querySelectorAll("pre.copy").forEach(copyable);
  return { element, visible, number, percent, compare, isDark, colour, explain, copyable };
})();
