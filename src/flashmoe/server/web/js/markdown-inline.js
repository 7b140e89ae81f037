// What stands inside a block of Markdown: emphasis, code, links.

import { el } from "./dom.js";

const DEEPEST = 8;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const BARE_LINK = /https?:\/\/[^\s<>"')\]]+/y;
const AUTO_LINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const TARGET = /\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const EMPHASIS = [
  ["***", ["strong", "em"]],
  ["**", ["strong"]],
  ["__", ["strong"]],
  ["~~", ["del"]],
  ["*", ["em"]],
  ["_", ["em"]],
];

/** Nodes of a text. */
export function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  return new Scanner(text, depth).run();
}

class Scanner {
  constructor(text, depth) {
    Object.assign(this, { text, depth, at: 0, plain: "", nodes: [] });
    this.hopeless = new Set(); // marks without a closing one further on: looked for once, not at each occurrence
  }

  run() {
    const { text } = this;
    while (this.at < text.length) {
      if (!(this.escape() || this.code() || this.link() || this.address() || this.emphasis() || this.lineBreak())) {
        this.plain += text[this.at++];
      }
    }
    this.flush();
    return this.nodes;
  }

  flush() {
    if (this.plain) this.nodes.push(this.plain);
    this.plain = "";
  }

  put(node, end) {
    this.flush();
    this.nodes.push(node);
    this.at = end;
    return true;
  }

  match(pattern, at) {
    pattern.lastIndex = at;
    return pattern.exec(this.text);
  }

  escape() {
    if (this.text[this.at] !== "\\" || !PUNCTUATION.test(this.text[this.at + 1] ?? "")) return false;
    this.plain += this.text[this.at + 1];
    this.at += 2;
    return true;
  }

  code() {
    if (this.text[this.at] !== "`") return false;
    const mark = /`+/y;
    mark.lastIndex = this.at;
    const [run] = mark.exec(this.text);
    const begin = this.at + run.length;
    const end = this.hopeless.has(run) ? -1 : this.closingRun(run, begin);
    if (end < 0) {
      this.hopeless.add(run);
      this.plain += run;
      this.at = begin;
      return true;
    }
    const body = this.text.slice(begin, end).replaceAll("\n", " ");
    return this.put(el("code", { text: /^ .*\S.* $/.test(body) ? body.slice(1, -1) : body }), end + run.length);
  }

  closingRun(run, from) {
    for (let at = this.text.indexOf(run, from); at >= 0; at = this.text.indexOf(run, at)) {
      let end = at + run.length;
      while (this.text[end] === "`") end++;
      if (end === at + run.length) return at;
      at = end;
    }
    return -1;
  }

  link() {
    const image = this.text.startsWith("![", this.at);
    if (!image && this.text[this.at] !== "[") return false;
    const begin = this.at + (image ? 2 : 1);
    const close = this.hopeless.has("]") ? -1 : this.closingBracket(begin);
    if (close < 0) {
      this.hopeless.add("]");
      return false;
    }
    const target = this.match(TARGET, close + 1);
    if (!target) return false;
    const label = this.text.slice(begin, close);
    const children = image ? [label || "image"] : inline(label, this.depth + 1);
    return this.put(anchor(target[1], children), close + 1 + target[0].length);
  }

  closingBracket(from) {
    let depth = 1;
    for (let at = from; at < this.text.length; at++) {
      if (this.text[at] === "\\") at++;
      else if (this.text[at] === "[") depth++;
      else if (this.text[at] === "]" && --depth === 0) return at;
    }
    return -1;
  }

  address() {
    const marked = this.text[this.at] === "<" && this.match(AUTO_LINK, this.at);
    if (marked) return this.put(anchor(marked[1], [marked[1].replace(/^mailto:/, "")]), this.at + marked[0].length);
    if (this.text[this.at] !== "h") return false;
    const bare = this.match(BARE_LINK, this.at);
    if (!bare) return false;
    const url = bare[0].replace(/[.,;:!?*_~]+$/, "");
    return this.put(anchor(url, [url]), this.at + url.length);
  }

  emphasis() {
    const char = this.text[this.at];
    if (char !== "*" && char !== "_" && char !== "~") return false;
    for (const [mark, tags] of EMPHASIS) {
      if (!this.text.startsWith(mark, this.at) || this.hopeless.has(mark) || !this.opens(mark)) continue;
      const end = this.closing(mark, this.at + mark.length);
      if (end < 0) {
        this.hopeless.add(mark);
        continue;
      }
      const children = inline(this.text.slice(this.at + mark.length, end), this.depth + 1);
      return this.put(tags.reduceRight((inner, tag) => [el(tag, {}, inner)], children)[0], end + mark.length);
    }
    return false;
  }

  opens(mark) {
    const after = this.text[this.at + mark.length] ?? " ";
    if (/\s/.test(after)) return false;
    return mark[0] !== "_" || !/[\p{L}\p{N}]/u.test(this.text[this.at - 1] ?? " ");
  }

  closing(mark, from) {
    for (let at = this.text.indexOf(mark, from); at >= 0; at = this.text.indexOf(mark, at + 1)) {
      if (at === from || /\s/.test(this.text[at - 1]) || this.text[at - 1] === "\\") continue;
      if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(this.text[at + mark.length] ?? " ")) continue;
      if (mark.length === 1 && (this.text[at + 1] === mark || this.text[at - 1] === mark)) {
        while (this.text[at + 1] === mark) at++; // of a longer mark, which is another one
        continue;
      }
      return at;
    }
    return -1;
  }

  lineBreak() {
    if (this.text[this.at] !== "\n") return false;
    this.plain = this.plain.replace(/(?: +|\\)$/, "");
    return this.put(el("br"), this.at + 1);
  }
}

function anchor(url, children) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(url)) return el("span", { class: "dead-link", title: url }, children);
  return el("a", { href: url, target: "_blank", rel: "noopener noreferrer", title: url }, children);
}
