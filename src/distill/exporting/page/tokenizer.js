// CLIP's tokenizer: byte-level BPE on lower-case words.
//
// The same ids as the `tokenizers` library gives, for any text: normalisation, splitting, merges,
// special tokens, truncation and padding.
"use strict";

const SPACE = /\p{White_Space}+/gu; // of Unicode: JavaScript's \s has other members
const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const PARTS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+/gu;

// Byte -> the character that stands for it in the vocabulary: itself where it can be printed.
function byteCharacters() {
  const found = new Array(256);
  const printed = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  for (let b = 0; b < 256; b += 1) found[b] = String.fromCodePoint(printed(b) ? b : next++);
  return found;
}
const CHARACTERS = byteCharacters();

class Tokenizer {
  // about: vocab {token: id}, merges [[left, right], ...], special {text: id}, begin, end, pad,
  // unknown (ids), length, suffix (of the last token of a word)
  constructor(about) {
    this.about = about;
    this.ranks = new Map(about.merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
    this.known = new Map();
  }

  // Token ids of a caption, padded to the length.
  ids(caption) {
    const { begin, end, pad, length } = this.about;
    const read = this.pieces(caption).flatMap((piece) => this.idsOf(piece));
    const kept = [begin, ...read.slice(0, length - 2), end];
    return [...kept, ...new Array(length - kept.length).fill(pad)];
  }

  // Ids of special tokens that the caption spells out, and the words between them.
  pieces(caption) {
    const found = [];
    let rest = caption;
    while (rest) {
      const places = Object.keys(this.about.special)
        .map((text) => [rest.indexOf(text), text])
        .filter(([at]) => at >= 0)
        .sort(([a], [b]) => a - b);
      const [at, text] = places[0] ?? [rest.length, ""];
      found.push(...this.words(rest.slice(0, at)));
      if (text) found.push(this.about.special[text]);
      rest = rest.slice(at + text.length);
    }
    return found;
  }

  words(text) {
    const normal = text.normalize("NFC").replace(SPACE, " ");
    // Character by character: JavaScript lowers a sigma at the end of a word to another letter.
    const lower = Array.from(normal, (character) => character.toLowerCase()).join("");
    return (lower.match(WORDS) ?? []).flatMap((word) => word.match(PARTS) ?? []);
  }

  idsOf(piece) {
    if (typeof piece === "number") return [piece];
    if (!this.known.has(piece)) {
      const { vocab, unknown } = this.about;
      this.known.set(piece, this.merged(piece).map((token) => vocab[token] ?? unknown));
    }
    return this.known.get(piece);
  }

  // The bytes of a word, merged by the pairs that came first in training.
  merged(word) {
    const tokens = Array.from(new TextEncoder().encode(word), (byte) => CHARACTERS[byte]);
    tokens[tokens.length - 1] += this.about.suffix;
    for (;;) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < tokens.length; i += 1) {
        const rank = this.ranks.get(`${tokens[i]} ${tokens[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return tokens;
      tokens.splice(at, 2, tokens[at] + tokens[at + 1]);
    }
  }
}
