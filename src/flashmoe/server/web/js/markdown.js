// Markdown of a model to elements.  Only elements and text nodes are made; of links only http(s) and mailto lead
// anywhere; images are shown as links, because the page loads nothing from elsewhere.

import { copyButton, el } from "./dom.js";
import { inline } from "./markdown-inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}(?:-[ \t]*){3,}$|^ {0,3}(?:\*[ \t]*){3,}$|^ {0,3}(?:_[ \t]*){3,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 6; // nested quotes and lists; a hostile text must not exhaust the stack

/** Shows a text that grows; only the blocks that changed are made anew, so that a selection above them stays. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.sources = [];
  }

  /** Show this text. */
  update(text) {
    const found = blocks(text.split("\n"));
    const sources = found.map((block) => block.lines.join("\n"));
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same++;
    while (this.container.childElementCount > same) this.container.lastElementChild.remove();
    this.container.append(...found.slice(same).map((block) => render(block, 0)));
    this.sources = sources;
  }
}

/** Top-level blocks: {kind, lines}. */
function blocks(lines) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const kind = kindAt(lines, at);
    const end = ENDS[kind](lines, at);
    found.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return found;
}

function kindAt(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) return "table";
  return "paragraph";
}

const ENDS = {
  heading: (lines, at) => at + 1,
  rule: (lines, at) => at + 1,
  fence(lines, at) {
    const mark = FENCE.exec(lines[at])[1];
    const close = lines.findIndex((line, i) => i > at && closes(line, mark));
    return close < 0 ? lines.length : close + 1;
  },
  quote: (lines, at) => until(lines, at, (line) => !line.trim()),
  table: (lines, at) => until(lines, at, (line) => !line.includes("|")),
  list(lines, at) {
    let end = at + 1;
    for (; end < lines.length; end++) {
      if (lines[end].trim()) {
        if (RULE.test(lines[end]) && !ITEM.test(lines[end])) break;
        if (FENCE.test(lines[end]) && !lines[end].startsWith(" ")) break;
        if (HEADING.test(lines[end])) break;
        continue;
      }
      const next = lines[end + 1] ?? "";
      if (!/^ {2,}\S/.test(next) && !ITEM.test(next)) break;
    }
    return end;
  },
  paragraph: (lines, at) => until(lines, at, (line, i) => !line.trim() || kindAt(lines, i) !== "paragraph"),
};

function until(lines, at, ends) {
  const found = lines.findIndex((line, i) => i > at && ends(line, i));
  return found < 0 ? lines.length : found;
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && [...text].every((char) => char === mark[0]);
}

const RENDERERS = {
  heading(lines) {
    const [, marks, text] = HEADING.exec(lines[0]);
    return el(`h${Math.min(6, marks.length + 2)}`, {}, inline(text)); // the page's own are h1 and h2
  },
  rule: () => el("hr"),
  paragraph: (lines) => el("p", {}, inline(lines.map((line) => line.trimStart()).join("\n"))),
  quote: (lines, depth) => el("blockquote", {}, inner(lines.map((line) => line.replace(QUOTE, "")), depth)),
  fence(lines) {
    const [, mark, language] = FENCE.exec(lines[0]);
    const closed = lines.length > 1 && closes(lines.at(-1), mark);
    return codeBlock(lines.slice(1, closed ? -1 : undefined).join("\n"), language);
  },
  list: renderList,
  table: renderTable,
};

function render(block, depth) {
  return RENDERERS[block.kind](block.lines, depth);
}

function inner(lines, depth) {
  if (depth >= DEEPEST) return [el("p", { text: lines.join("\n") })];
  return blocks(lines).map((block) => render(block, depth + 1));
}

/** A block of code with its language and a button that copies it. */
export function codeBlock(code, language) {
  const head = el("div", { class: "code-head" }, el("span", { text: language || "text" }), copyButton("Copy this code", () => code));
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", { text: code })));
}

function renderList(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const numbered = /\d/.test(first[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && (items.length === 0 || item[1].length <= first[1].length + 1)) {
      items.push({ indent: item[0].length || 2, lines: [line.slice(item[0].length)] });
    } else {
      const current = items.at(-1);
      const spaces = /^ */.exec(line)[0].length;
      current.lines.push(line.slice(Math.min(spaces, current.indent)));
    }
  }
  const loose = lines.some((line) => !line.trim());
  const start = numbered && parseInt(first[2], 10) !== 1 ? parseInt(first[2], 10) : null;
  return el(numbered ? "ol" : "ul", { start }, items.map((item) => renderItem(item.lines, depth, loose)));
}

function renderItem(lines, depth, loose) {
  const children = inner(lines, depth);
  // A tight item shows its text without a paragraph's margins.
  if (!loose && children[0]?.tagName === "P") children.splice(0, 1, ...children[0].childNodes);
  return el("li", {}, children);
}

function renderTable(lines) {
  const [head, rule, ...rows] = lines.map(cells);
  const sides = rule.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  const row = (tag, values) => el("tr", {}, head.map((_, i) => el(tag, { "data-side": sides[i] }, inline(values[i] ?? ""))));
  const table = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, rows.map((values) => row("td", values))));
  return el("div", { class: "table", tabindex: "0" }, table);
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}
