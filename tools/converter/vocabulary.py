"""Tokens: numbers that stand for texts, their counts in bounded memory, and vocabularies with their files.

A token is what a field looks up: uint64 for a text (see string_keys), int32 for a bucket, the bits of a float64 for a
number of which quantiles are sought. Everything here works on arrays of tokens, and on the texts where they are longer
than a token.
"""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tools.converter.spool import append_table, read_tables, shuffle_keys
from tools.converter.values import BOOLEANS, Spelling, time_digits
from tools.trainer.cli import UserError, first_line
from tools.trainer.places import arrow_file

INDEXING = threading.Lock()  # of a vocabulary, which several threads need at once
RARE_TOKENS = 1 << 20  # tokens below the threshold whose counts are kept for growth, per field: the most frequent ones
NO_TEXTS = (np.empty(0, np.uint64), pa.array([], pa.string()))
_MASKS = np.array([(1 << 8 * length) - 1 for length in range(9)], np.uint64)  # of the first bytes of a text


# ------------------------------------------------------------------------------------------------- numbers for texts


def string_keys(column):
    """A number for each text of a pyarrow string Array without nulls, equal exactly when the texts are.

    Up to 8 bytes it is the text itself, "" being 0; a longer one (or one with a zero byte) is hashed to 56 bits, with a
    mark in the first byte that no UTF-8 text has.
    Returns: (uint64 (n), None or the long ones: (distinct keys, their texts)).
    """
    if not pa.types.is_string(column.type) and not pa.types.is_binary(column.type):
        column = column.cast(pa.string())
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    first, last = (int(offsets[0]), int(offsets[-1])) if len(column) else (0, 0)
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[first:last]
    lengths = np.diff(offsets)
    long = lengths > 8
    if not data.all():
        zeros = np.flatnonzero(data == 0) + first
        long[np.searchsorted(offsets, zeros, side="right") - 1] = True
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray(len(data) + 1, "<u8", padded, strides=(1,))  # the 8 bytes from every position on
    keys = words[offsets[:-1] - first] & _MASKS[np.minimum(lengths, 8)]
    if not long.any():
        return keys, None
    rows = np.flatnonzero(long)
    encoded = column.take(pa.array(rows)).dictionary_encode()
    distinct = np.array([_hash(text) for text in encoded.dictionary.to_pylist()], np.uint64)
    keys[rows] = distinct[encoded.indices.to_numpy()]
    return keys, (distinct, encoded.dictionary)


def _hash(text):
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    return int.from_bytes(b"\xff" + hashlib.blake2b(data, digest_size=7).digest(), "little")


def is_long(keys):
    """Which of uint64 keys stand for texts that they do not hold."""
    return keys & np.uint64(0xFF) == 0xFF


def texts_of(tokens, long_texts):
    """string Array of the texts of tokens; long_texts: (distinct keys, texts) that has those of the long ones."""
    if tokens.dtype != np.uint64:
        return pa.array(tokens).cast(pa.string())
    short = np.where(is_long(tokens), np.uint64(0), tokens).view("S8")
    texts = pa.array(short, pa.binary()).cast(pa.string())
    places = np.flatnonzero(is_long(tokens))
    if not len(places):
        return texts
    found = pd.Index(long_texts[0]).get_indexer(tokens[places])
    if (found < 0).any():
        raise AssertionError("the text of a long token was lost")
    take = np.arange(len(tokens))
    take[places] = len(tokens) + found
    return pa.concat_arrays([texts, long_texts[1]]).take(pa.array(take))


def text_order(tokens):
    """Numbers that sort tokens as their texts: by bytes (long ones last, by hash), or by value."""
    return tokens.byteswap() if tokens.dtype == np.uint64 else tokens


# -------------------------------------------------------------------------------------------------------- vocabularies


class Vocabulary:
    """The tokens of a field in the order of their ids.

    Attributes: keys (n) tokens, texts: string Array (n), counts int64 (n): times seen in the train rows; known: how
    many of the first tokens were there before the conversion that goes on, in which rows are read more than once.
    """

    def __init__(self, keys, texts, counts, known=None):
        """known: None for a vocabulary of an earlier conversion"""
        self.keys, self.texts, self.counts = keys, texts, np.asarray(counts, np.int64)
        self.known = len(keys) if known is None else known
        self._index = self._spelling = None

    def __len__(self):
        return len(self.keys)

    def __getstate__(self):
        return {**vars(self), "_index": None, "_spelling": None}

    @property
    def spelling(self):
        """How its known tokens, which are texts, write booleans and times: a Spelling."""
        if self._spelling is None:
            keys = [string_keys(pa.array(words))[0] for words in BOOLEANS]
            found = [words for words, two in zip(BOOLEANS, keys) if np.isin(two, self.keys[:self.known]).any()]
            self._spelling = Spelling(found[0] if found else BOOLEANS[0], time_digits(self.texts.slice(0, self.known)))
        return self._spelling

    def positions(self, tokens):
        """Place of each token in the vocabulary, -1 where it is unknown: int64 (n)."""
        with INDEXING:
            if self._index is None:
                wide = np.uint64 if self.keys.dtype == np.uint64 else np.int64
                index = pd.Index(self.keys.astype(wide, copy=False))
                index.get_indexer(index[:1])  # makes its table: pandas lets other threads come upon a half made one
                self._index = index
        return self._index.get_indexer(tokens.astype(self._index.dtype, copy=False))

    def digest(self, digest, size=None):
        """Feed the first `size` tokens to a hashlib object: their number, their lengths in bytes, their texts."""
        texts = self.texts if size is None else self.texts.slice(0, size)
        offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
        digest.update(np.array([len(texts)], "<i8").tobytes())
        digest.update(np.diff(offsets).astype("<i8").tobytes())
        if len(texts):
            digest.update(np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]].data)

    def grown(self, keys, texts, counts):
        """A Vocabulary with more tokens behind those of this one."""
        return Vocabulary(np.concatenate([self.keys, keys]), pa.concat_arrays([self.texts, texts]),
                          np.concatenate([self.counts, counts]), self.known)

    def write(self, path, first_id):
        ids = np.arange(first_id, first_id + len(self))
        write_tokens(path, self.texts, {"id": ids, "count": self.counts})


def write_tokens(path, texts, numbers):
    """A parquet file of tokens and columns of integers."""
    table = pa.table({"token": texts, **numbers})
    packed = {name: "DELTA_BINARY_PACKED" for name in numbers}
    # tokens are nearly all distinct, so dictionaries would only cost
    pq.write_table(table, str(path), compression="snappy", use_dictionary=False, column_encoding=packed)


def read_tokens(path, columns):
    """{column: Array} of such a file. Raises: UserError"""
    try:
        table = pq.read_table(arrow_file(path), columns=columns)
        if table.column_names != columns:
            raise ValueError(f"it has the columns {', '.join(table.column_names)}, expected {', '.join(columns)}")
        arrays = [column.combine_chunks() for column in table.columns]
        if any(array.null_count for array in arrays):
            raise ValueError("a value is missing")
        texts = arrays[0].cast(pa.string())
        texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
        return [texts] + [array.cast(pa.int64()).to_numpy() for array in arrays[1:]]
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable vocabulary ({first_line(error)}); it belongs to the dataset: copy "
                        "the dataset again, or convert again") from None


def keys_of_texts(texts, dtype):
    """Tokens of texts as they stand in a vocabulary file; dtype: uint64, or a signed type for whole numbers."""
    if dtype == np.uint64:
        return string_keys(texts)[0]
    return texts.cast(pa.int64()).to_numpy().astype(dtype)


# ------------------------------------------------------------------------------------------------------------ counting


def count_tokens(tokens):
    """(distinct tokens, counts) of an array."""
    codes, distinct = pd.factorize(np.ascontiguousarray(tokens))
    return distinct, np.bincount(codes, minlength=len(distinct))


def merge_counts(parts):
    """Sum [(tokens, counts)] by token."""
    if len(parts) == 1:
        return parts[0]
    codes, distinct = pd.factorize(np.concatenate([tokens for tokens, _ in parts]))
    counts = np.concatenate([counts for _, counts in parts])
    return distinct, np.bincount(codes, weights=counts, minlength=len(distinct)).astype(np.int64)


def merge_texts(parts):
    """Join [(distinct keys, texts)]; each key once."""
    parts = [part for part in parts if len(part[0])]
    if len(parts) < 2:
        return parts[0] if parts else NO_TEXTS
    keys, firsts = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)
    return keys, pa.concat_arrays([texts for _, texts in parts]).take(pa.array(firsts))


def most_frequent(tokens, counts, limit=None):
    """The tokens (and counts) with the largest counts, ties in the order of the texts; all of them without limit."""
    order = np.lexsort((text_order(tokens), -counts))[:limit]
    return tokens[order], counts[order]


def divide(tokens, counts, min_count):
    """((tokens, counts) seen at least min_count times, the most frequent first; (tokens, counts) of the rare ones)."""
    frequent = counts >= min_count
    rare_tokens, rare_counts = tokens[~frequent], counts[~frequent]
    if len(rare_tokens) > RARE_TOKENS:
        rare_tokens, rare_counts = most_frequent(rare_tokens, rare_counts, RARE_TOKENS)
    return most_frequent(tokens[frequent], counts[frequent]), (rare_tokens, rare_counts)


class TokenCounter:
    """Counts of all tokens of some fields, in bounded memory: what exceeds it is put on disk, parted by token.

    Args: folder: scratch folder, made when needed. memory_bytes: for what is in memory (16 bytes per token, and the
    long texts). min_counts: threshold of each field. dtypes: type of each field's tokens.
    """

    PARTS = 64

    def __init__(self, folder, memory_bytes, min_counts, dtypes):
        self.folder, self.min_counts, self.dtypes = Path(folder), min_counts, [np.dtype(d) for d in dtypes]
        self.limit = memory_bytes // 16
        self.parts = [[] for _ in dtypes]  # (tokens, counts) per field, not yet merged
        self.texts = [[] for _ in dtypes]  # (distinct keys, texts) per field
        self.size = self.merged_size = 0  # tokens, long texts counted by their length
        self.spilled = False

    def add(self, counted):
        """counted: per field (tokens, counts, None or (distinct keys, texts) that has the long ones)."""
        for field, (tokens, counts, texts) in enumerate(counted):
            self.parts[field].append((tokens, counts))
            self.size += len(tokens)
            if texts is not None:
                self.texts[field].append(texts)
                self.size += _text_size(texts)
        if self.size > max(2 * self.merged_size, self.limit // 4):
            self._merge()
            if self.size > self.limit // 2:
                self._spill()

    def _merge(self):
        self.parts = [[merge_counts(parts)] if parts else [] for parts in self.parts]
        self.texts = [[merge_texts(parts)] if parts else [] for parts in self.texts]
        self.size = sum(len(parts[0][0]) for parts in self.parts if parts)
        self.size += sum(_text_size(parts[0]) for parts in self.texts if parts)
        self.merged_size = self.size

    def _file(self, field, part, kind):
        return self.folder / f"{field}-{part}.{kind}"

    def _spill(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for field, (parts, texts) in enumerate(zip(self.parts, self.texts)):
            if parts:
                tokens, counts = parts[0]
                record = np.empty(len(tokens), self._record(field))
                record["token"], record["count"] = tokens, counts
                for index, chosen in self._by_part(tokens):
                    with open(self._file(field, index, "bin"), "ab") as file:
                        file.write(record[chosen].data)
            if texts:
                table = pa.table({"key": texts[0][0], "text": texts[0][1]})
                for index, chosen in self._by_part(texts[0][0]):
                    append_table(self._file(field, index, "arrow"), table.filter(pa.array(chosen)))
        self.parts = [[] for _ in self.dtypes]
        self.texts = [[] for _ in self.dtypes]
        self.size = self.merged_size = 0
        self.spilled = True

    def _by_part(self, tokens):
        part = (shuffle_keys(tokens.astype(np.int64, copy=False), 0) % self.PARTS).astype(np.int8)
        return [(index, part == index) for index in np.unique(part)]

    def _record(self, field):
        return [("token", self.dtypes[field]), ("count", np.int64)]

    def results(self):
        """Yield per field (tokens, counts, texts) of all frequent tokens, and of as many rare ones as are kept."""
        self._merge()
        if self.spilled:
            self._spill()
        for field, dtype in enumerate(self.dtypes):
            if self.spilled:
                yield self._read_field(field)
            else:
                tokens, counts = self.parts[field][0] if self.parts[field] else (np.empty(0, dtype), np.empty(0, int))
                yield tokens, counts, self.texts[field][0] if self.texts[field] else NO_TEXTS

    def _read_field(self, field):
        """One part after the other, so that only what is kept of a field is in memory at a time."""
        empty = (np.empty(0, self.dtypes[field]), np.empty(0, np.int64))
        frequent, rare, texts = [empty], empty, [NO_TEXTS]
        for part in range(self.PARTS):
            path = self._file(field, part, "bin")
            if not path.exists():
                continue
            record = np.fromfile(path, self._record(field))
            tokens, counts = merge_counts([(record["token"], record["count"]), empty])
            kept, others = divide(tokens, counts, self.min_counts[field])
            frequent.append(kept)
            rare = most_frequent(*merge_counts([rare, others]), RARE_TOKENS)
            texts = [_only(merge_texts([*texts, *self._read_texts(field, part)]), [*frequent, rare])]
        tokens, counts = merge_counts([*frequent, rare])
        return tokens, counts, texts[0]

    def _read_texts(self, field, part):
        for table in read_tables(self._file(field, part, "arrow")):
            if len(table):
                table = table.combine_chunks()
                yield table["key"].to_numpy(), table["text"].chunk(0)


def _text_size(texts):
    return (texts[1].nbytes + 8 * len(texts[0])) // 16


def _only(texts, parts):
    """Of (distinct keys, texts) those whose keys are tokens of one of [(tokens, counts)]."""
    keys, values = texts
    if not len(keys):
        return texts
    wanted = np.isin(keys, np.concatenate([tokens for tokens, _ in parts]))
    return keys[wanted], values.filter(pa.array(wanted))
