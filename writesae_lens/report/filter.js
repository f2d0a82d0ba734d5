"use strict";
// The filter of the atlas: a text becomes a test of a cell; its terms must all hold. Throws an Error that says what is wrong.
const filterOf = (columns) => {
  const { visible } = shared;
  const TERM = /("[^"]*"|[^\s<>=!"]+)\s*(>=|<=|!=|==|=|<|>)\s*("[^"]*"|[^\s<>=!"]+)|\S+/g;
  const OPERATORS = {
    ">": (a, b) => a > b, ">=": (a, b) => a >= b, "<": (a, b) => a < b, "<=": (a, b) => a <= b,
    "=": (a, b) => a === b, "==": (a, b) => a === b, "!=": (a, b) => a !== b,
  };
  const bare = (text) => text.replaceAll('"', "");
  const comparison = (name, operator, operand) => {
    const i = columns.findIndex((column) => column.key === name);
    if (i < 0 && !["layer", "head"].includes(name)) {
      const like = columns.map((column) => column.key).filter((key) => key.includes(name)).slice(0, 3);
      throw new Error(`No column is called '${visible(name)}'${like.length ? `: is it ${like.map(visible).join(", ")}?` : "; the names are listed below the table."}`);
    }
    const read = (cell) => (i < 0 ? cell[name] : cell.values[i]);
    const isText = i >= 0 && columns[i].unit === "text";
    const digits = operand.replace(/%$/, "");
    const bound = isText ? operand : Number(digits) / (digits === operand ? 1 : 100);
    if (!isText && (digits === "" || Number.isNaN(bound))) throw new Error(`'${visible(operand)}' is no number: write ${visible(name)} ${operator} 0.8`);
    if (isText && !["=", "==", "!="].includes(operator)) throw new Error(`${visible(name)} is a text: compare it by = or !=`);
    if (isText) { // a missing text is "", and of several notes between commas each counts
      const holds = (text) => text === bound || text.split(", ").includes(bound);
      return (cell) => holds(read(cell) ?? "") === (operator !== "!=");
    }
    return (cell) => read(cell) !== null && OPERATORS[operator](read(cell), bound);
  };
  const word = (text) => {
    const at = /^L(\d+)(?:H(\d+))?$/i.exec(text) ?? /^(\d+|\*):(\d+|\*)$/.exec(text);
    const wanted = (given, own) => given === undefined || given === "*" || Number(given) === own;
    if (at) return (cell) => wanted(at[1], cell.layer) && wanted(at[2], cell.head);
    if (/^failed$/i.test(text)) return (cell) => cell.failed.length > 0;
    throw new Error(`'${visible(text)}' is no cell and no comparison: write for example L9H4, layer 9, or NAME > 0.8`);
  };
  return (text) => {
    const terms = text.replace(/\b(layer|head)\s+(\d+)/gi, (_, name, n) => `${name.toLowerCase()}=${n}`).matchAll(TERM);
    const tests = [...terms].filter(([term]) => term.toLowerCase() !== "and")
      .map(([term, name, operator, operand]) => (operator ? comparison(bare(name), operator, bare(operand)) : word(term)));
    return (cell) => tests.every((test) => test(cell));
  };
};
