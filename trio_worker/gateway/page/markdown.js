// Markdown as models write it, drawn as nodes of the page.
//
// Text becomes text nodes and nothing else: there is no markup in an answer, so HTML in it is seen
// as it was written. An address is followed only by a click, never loaded. What is not understood
// stays as it is. Every reader takes time in proportion to the text, whatever is in it.

const DEPTH_MAX = 8; // Lists and quotes in each other, and emphasis; what is deeper is plain text.
const SAFE_SCHEMES = new Set(["http:", "https:", "mailto:"]);

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DIVIDER = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;

const sources = new WeakMap(); // A drawn block: the text that it was drawn from.

/** Let `host` show this text; blocks that have not changed keep their nodes, and with them focus and selection. */
export function draw(host, text) {
  const blocks = blocksOf(text.split("\n"));
  const nodes = [...host.children];
  const added = document.createDocumentFragment();
  blocks.forEach((block, index) => {
    const shown = nodes[index];
    if (shown && sources.get(shown) === block.source) return;
    const node = (shown && grown(shown, block)) || nodeOf(block);
    sources.set(node, block.source);
    if (!shown) added.append(node);
    else if (shown !== node) shown.replaceWith(node);
  });
  for (const node of nodes.slice(blocks.length)) node.remove();
  host.append(added);
}

// --- blocks --------------------------------------------------------------------------------

function blocksOf(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

/** The block that begins here, and the line after it. */
function blockAt(lines, at, depth) {
  for (const read of [fence, heading, rule, table, quote, list]) {
    const found = read(lines, at, depth);
    if (found) return found;
  }
  return paragraph(lines, at);
}

function fence(lines, start) {
  const opening = FENCE.exec(lines[start]);
  if (!opening) return null;
  const [, marks, info] = opening;
  const body = [];
  let at = start + 1;
  for (; at < lines.length; at += 1) {
    const closing = lines[at].trim();
    if (closing.length >= marks.length && closing === marks[0].repeat(closing.length)) break;
    body.push(lines[at]);
  }
  return [{ kind: "code", language: info.trim().split(/\s/)[0], text: body.join("\n") }, Math.min(at + 1, lines.length)];
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  return [{ kind: "heading", level: found[1].length, text: withoutEnd(found[2].trimEnd(), "#").trimEnd() }, at + 1];
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? [{ kind: "rule" }, at + 1] : null;
}

function isTable(lines, at) {
  const divider = lines[at + 1];
  if (divider === undefined || !lines[at].includes("|") || !divider.includes("-")) return false;
  return DIVIDER.test(divider.trim()) && cellsOf(lines[at]).length === cellsOf(divider).length;
}

function table(lines, start) {
  if (!isTable(lines, start)) return null;
  const sides = cellsOf(lines[start + 1]).map((cell) => {
    if (!cell.endsWith(":")) return "";
    return cell.startsWith(":") ? "middle" : "end";
  });
  let end = start + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(start + 2, end).map(cellsOf);
  return [{ kind: "table", head: cellsOf(lines[start]), sides, rows }, end];
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim());
}

function quote(lines, start, depth) {
  if (depth >= DEPTH_MAX || !QUOTE.test(lines[start])) return null;
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(start, end).map((line) => line.replace(QUOTE, ""));
  return [{ kind: "quote", blocks: blocksOf(inner, depth + 1) }, end];
}

function list(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  if (depth >= DEPTH_MAX || !first) return null;
  const base = columns(first[1]);
  const ordered = isNumber(first[2]);
  const items = [];
  let loose = false;
  let end = start; // After the last line that is not blank.
  for (let at = start; at < lines.length; at += 1) {
    const line = lines[at];
    if (!line.trim()) continue;
    const blanks = at - end;
    const lead = columns(/^[ \t]*/.exec(line)[0]);
    const item = lead < base + 2 && !RULE.test(line) ? ITEM.exec(line) : null;
    if (item) {
      if (isNumber(item[2]) !== ordered || lead + 2 <= base) break;
      items.push({ width: item[0].trimEnd().length + 1, lines: [line.slice(item[0].length)] });
    } else {
      const current = items.at(-1);
      const inside = lead >= base + 2;
      if (!inside && (blanks || beginsBlock(lines, at))) break;
      // Models indent by two where the marker takes three.
      if (inside) current.width = Math.min(current.width, lead);
      current.lines.push(...Array(blanks).fill(""), inside ? dedented(line, current.width) : line);
    }
    loose ||= blanks > 0;
    end = at + 1;
  }
  const blocks = items.map((item) => blocksOf(item.lines, depth + 1));
  return [{ kind: "list", ordered, first: parseInt(first[2], 10), loose, items: blocks }, end];
}

function paragraph(lines, start) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines, end)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(start, end).map((line) => line.trim()).join("\n") }, end];
}

function beginsBlock(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line)) || isTable(lines, at);
}

const isNumber = (marker) => marker.length > 1;
const columns = (lead) => [...lead].reduce((width, each) => width + (each === "\t" ? 4 : 1), 0);

function dedented(line, width) {
  let at = 0;
  for (let left = width; left > 0 && (line[at] === " " || line[at] === "\t"); at += 1) {
    left -= line[at] === "\t" ? 4 : 1;
  }
  return line.slice(at);
}

function withoutEnd(text, marks) {
  let end = text.length;
  while (end > 0 && marks.includes(text[end - 1])) end -= 1;
  return text.slice(0, end);
}

// --- nodes ---------------------------------------------------------------------------------

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

const DRAWN = {
  paragraph: ({ text }) => element("p", "", ...inline(text)),
  // The page's own headings end at the second level.
  heading: ({ level, text }) => element(`h${Math.min(level + 2, 6)}`, `h${level}`, ...inline(text)),
  rule: () => element("hr", ""),
  quote: ({ blocks }) => element("blockquote", "", ...blocks.map(nodeOf)),
  code: codeNode,
  list: listNode,
  table: tableNode,
};

const nodeOf = (block) => DRAWN[block.kind](block);

function codeNode({ language, text }) {
  const copy = element("button", "copy", "Copy");
  copy.type = "button";
  const code = element("code", "", text);
  const pre = element("pre", "", code);
  pre.tabIndex = 0; // What scrolls sideways has to be reached by the keyboard.
  const node = element("div", "code", element("div", "bar", element("span", "language", language), copy), pre);
  node.dataset.language = language;
  return node;
}

/** The node itself, if it can take on what has been added to its block. */
function grown(node, block) {
  if (block.kind !== "code" || node.dataset.language !== block.language) return null;
  const code = node.querySelector("code");
  if (!code) return null;
  code.textContent = block.text;
  return node;
}

function listNode({ ordered, first, loose, items }) {
  const rows = items.map((blocks) => element("li", "", ...blocks.map(nodeOf)));
  const node = element(ordered ? "ol" : "ul", loose ? "" : "tight", ...rows);
  if (ordered && first !== 1) node.start = first;
  return node;
}

function tableNode({ head, sides, rows }) {
  const row = (tag, cells) => element("tr", "", ...sides.map((side, at) => element(tag, side, ...inline(cells[at] ?? ""))));
  const body = element("tbody", "", ...rows.map((cells) => row("td", cells)));
  const node = element("div", "table", element("table", "", element("thead", "", row("th", head)), body));
  node.tabIndex = 0;
  return node;
}

// --- within a line -------------------------------------------------------------------------

const ESCAPED = /\\([!#*+\-.<>_`{|}~\\])/y;
const TICKS = /`+/y;
const LINK = /!?\[([^[\]]{1,1000})\]\(([^()\s]{1,2000}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?)(?:[ \t]+"[^"\n]{0,200}")?\)/y;
const ADDRESS = /<?https?:\/\/[^\s<>"`|]+>?/y;
const MARKS = /\*+|_+|~~/y;
const PLAIN = /[^\\`!\[<h*_~]+/y;
const TAGS = { "*": "em", "**": "strong", _: "em", __: "strong", "~~": "del" };

/** The nodes of a text without blocks; a link's own has no links in it. */
function inline(text, { links = true } = {}) {
  const emphasis = new Emphasis();
  const matchAt = (form, at) => {
    form.lastIndex = at;
    return form.exec(text);
  };
  for (let at = 0; at < text.length; ) {
    let found;
    if ((found = matchAt(PLAIN, at)) || (found = matchAt(ESCAPED, at))) {
      emphasis.add(found[1] ?? found[0]);
    } else if ((found = matchAt(TICKS, at))) {
      const code = codeAt(text, at, found[0]);
      emphasis.add(code ? element("code", "", code.text) : found[0]);
      if (code) at = code.end - found[0].length;
    } else if (links && (found = matchAt(LINK, at))) {
      emphasis.add(linkNode(found[2], found[1]) ?? found[0]);
    } else if (links && !isWord(text[at - 1]) && (found = matchAt(ADDRESS, at))) {
      found = [addressOf(found[0])];
      emphasis.add(linkNode(bare(found[0]), bare(found[0])) ?? found[0]);
    } else if ((found = matchAt(MARKS, at))) {
      emphasis.mark(found[0], text[at - 1], text[at + found[0].length]);
    } else {
      found = [text[at]];
      emphasis.add(found[0]);
    }
    at += found[0].length;
  }
  return emphasis.end();
}

const isWord = (sign) => sign !== undefined && /[\p{L}\p{N}]/u.test(sign);
const isSpace = (sign) => sign === undefined || /\s/.test(sign);

/** Searched to the end in vain at most once for each number of ticks: a second run of it would close the first. */
function codeAt(text, start, ticks) {
  for (let at = start + ticks.length; (at = text.indexOf("`", at)) !== -1; ) {
    TICKS.lastIndex = at;
    const run = TICKS.exec(text)[0];
    if (run.length === ticks.length) {
      const inner = text.slice(start + ticks.length, at).replaceAll("\n", " ");
      const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
      return { text: padded ? inner.slice(1, -1) : inner, end: at + run.length };
    }
    at += run.length;
  }
  return null;
}

/** What belongs to an address in running text: not the full stop after it. */
function addressOf(found) {
  if (found.startsWith("<") && found.endsWith(">")) return found;
  const address = withoutEnd(found, found.includes("(") ? ".,;:!?'*_~]>" : ".,;:!?'*_~])>");
  return address || found;
}

const bare = (address) => address.replace(/^</, "").replace(/>$/, "");

/** A link that tells its target nothing of this page; null where the address is not one to follow. */
function linkNode(address, label) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!url || !SAFE_SCHEMES.has(url.protocol)) return null;
  const node = element("a", "", ...inline(label, { links: false }));
  node.href = url.href;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  node.title = url.href;
  return node;
}

/** Gathers nodes; what was opened and is not closed is text again. */
class Emphasis {
  #frames = [{ mark: "", nodes: [] }];

  add(node) {
    const { nodes } = this.#frames.at(-1);
    if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes[nodes.length - 1] += node;
    else nodes.push(node);
  }

  mark(run, before, after) {
    const inWord = run[0] === "_" && isWord(before) && isWord(after);
    let left = run.length > 3 || inWord ? 0 : run.length;
    if (!left) {
      this.add(run);
      return;
    }
    if (!isSpace(before)) left = this.#close(run[0], left);
    if (!left) return;
    if (isSpace(after) || (run[0] === "_" && isWord(before)) || this.#frames.length > DEPTH_MAX) {
      this.add(run[0].repeat(left));
      return;
    }
    if (left === 3) this.#frames.push({ mark: run[0].repeat(2), nodes: [] });
    this.#frames.push({ mark: run[0].repeat(left === 3 ? 1 : left), nodes: [] });
  }

  end() {
    this.#giveUp(1);
    return this.#frames[0].nodes;
  }

  /** How many of the signs have closed nothing. */
  #close(sign, count) {
    let left = count;
    while (left) {
      const at = this.#frames.findLastIndex(({ mark }) => mark[0] === sign && mark.length <= left);
      if (at < 1 || (at === this.#frames.length - 1 && !this.#frames[at].nodes.length)) break;
      this.#giveUp(at + 1);
      const { mark, nodes } = this.#frames.pop();
      this.add(element(TAGS[mark], "", ...nodes));
      left -= mark.length;
    }
    return left;
  }

  /** All that is open beyond so many frames becomes text. */
  #giveUp(count) {
    while (this.#frames.length > count) {
      const { mark, nodes } = this.#frames.pop();
      this.add(mark);
      for (const node of nodes) this.add(node);
    }
  }
}
