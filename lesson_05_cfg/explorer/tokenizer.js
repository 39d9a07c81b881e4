/**
 * Byte-level BPE in JavaScript: the same ids as lesson 4's CaptionTokenizer, whose JSON it reads.
 * Source: Sennrich et al. 2016; Radford et al. 2019 (the pattern and the bytes' characters are GPT-2's).
 */

// What Python calls \s is not JavaScript's \s, so white space is named by its Unicode property.
const PIECES =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const MAX_CHARACTERS = 1000; // far more than the network reads; it keeps a pasted book from blocking the page

/** GPT-2's printable character for each of the 256 bytes. */
function byteCharacters() {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : next++));
}

const CHARACTERS = byteCharacters();
const BYTES = new Map(CHARACTERS.map((character, byte) => [character, byte]));

export class CaptionTokenizer {
  /** json: a tokenizer.json of the `tokenizers` library, model BPE, pre-tokenizer ByteLevel. */
  constructor(json, { contextLength, paddingId, pieces = [] }) {
    this.vocabulary = json.model.vocab;
    this.tokens = new Map(Object.entries(this.vocabulary).map(([token, id]) => [id, token]));
    this.ranks = new Map(json.model.merges.map((pair, rank) => [pair.join("\n"), rank]));
    this.special = json.added_tokens.map((token) => token.content);
    this.contextLength = contextLength;
    this.paddingId = paddingId;
    this.knownPieces = new Set(pieces); // of the training captions
  }

  /** All token ids of a lower-cased caption. */
  tokenIds(caption) {
    const ids = [];
    for (const part of this.splitSpecial(caption.slice(0, MAX_CHARACTERS).toLowerCase())) {
      if (this.special.includes(part)) ids.push(this.vocabulary[part]);
      else for (const piece of toPieces(part)) ids.push(...this.merge(piece));
    }
    return ids;
  }

  /** Padded, truncated ids (int64) and their mask (1 at tokens), as the text encoder takes them. */
  encode(caption) {
    const ids = this.tokenIds(caption).slice(0, this.contextLength);
    const tokens = new BigInt64Array(this.contextLength).fill(BigInt(this.paddingId));
    const mask = new Uint8Array(this.contextLength);
    ids.forEach((id, i) => {
      tokens[i] = BigInt(id);
      mask[i] = 1;
    });
    return { tokens, mask };
  }

  /** The readable text of a token; bytes that are no text on their own become a replacement character. */
  text(id) {
    const bytes = [...this.tokens.get(id)].map((character) => BYTES.get(character));
    return new TextDecoder().decode(Uint8Array.from(bytes)).trim();
  }

  /** The words of a caption that stand in no training caption, in the form they have here. */
  unknownWords(caption) {
    const pieces = toPieces(caption.slice(0, MAX_CHARACTERS).toLowerCase());
    return [...new Set(pieces.filter((piece) => !this.knownPieces.has(piece)).map(decode))];
  }

  splitSpecial(text) {
    const escaped = this.special.map((token) => token.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    return text.split(new RegExp(`(${escaped.join("|")})`)).filter(Boolean);
  }

  /** Merge the pair of lowest rank, leftmost first, until no pair of the piece can be merged. */
  merge(piece) {
    const parts = [...piece];
    for (;;) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]}\n${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((token) => this.vocabulary[token]);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }
}

/** The pieces of a text within which tokens are merged, each byte written as one character. */
function toPieces(text) {
  const toCharacters = (piece) => Array.from(new TextEncoder().encode(piece), (byte) => CHARACTERS[byte]);
  return (text.match(PIECES) ?? []).map((piece) => toCharacters(piece).join(""));
}

/** The inverse of `toPieces` for one piece, without the spaces around it. */
function decode(piece) {
  return new TextDecoder()
    .decode(Uint8Array.from([...piece].map((character) => BYTES.get(character))))
    .trim();
}
