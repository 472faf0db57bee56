"""Fields and the encoder: raw columns -> ids, as dataset_info.json and vocabulary/ describe it.

Ids within a field, the same rule for all kinds but modulus:

    0               padding: absent elements of a list, else unused
    1               missing values, where a kind gives them an id of their own (bucket with own_missing, quantile, hash)
    then            tokens of the vocabulary by falling count, or bins, or hash values
    last            out of vocabulary, where there is a vocabulary: all other values

A field that grows keeps every id and appends tokens, so out-of-vocabulary moves to the new last id. Each kind is a
class below: `tokens` turns a raw column into tokens, `local_ids` tokens into ids, `fit` makes the vocabulary or the
borders, `encoding` describes it all for dataset_info.json, and `identity` is the part of it that the fingerprint
covers.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from tools.converter.values import (
    MAX_INTEGER,
    MIN_INTEGER,
    PLAIN,
    BadValue,
    as_lists,
    as_numbers,
    as_text,
    whole_numbers,
)
from tools.converter.vocabulary import (
    NO_TEXTS,
    Vocabulary,
    count_tokens,
    divide,
    keys_of_texts,
    merge_texts,
    read_tokens,
    string_keys,
    texts_of,
    write_tokens,
)
from tools.trainer.cli import UserError, brief, first_line
from tools.trainer.dataset_info import ADVICE, INFO, check_file, read_info
from tools.trainer.places import as_place

MISSING_TOKEN = np.int32(MIN_INTEGER)  # of a bucket field whose missing values have an id of their own
LARGEST_TABLE = (1 << 31) - 1


class Field:
    """What is common to all kinds.

    Attributes: name (in the shards), raw_column, columns (names in the shards), min_count, vocabulary or None.
    Class attributes: kind; dtype of its tokens; raw_type: how a text file's cells are read; counted: tokens of train
    rows are counted; sampled: only those of a sample of the rows are.
    """

    kind = None
    dtype = np.dtype(np.uint64)
    raw_type = pa.string()
    counted = sampled = False
    min_count = 1
    vocabulary = None
    rare = None  # (tokens, counts, texts) below min_count, while a dataset is being made

    def __init__(self, name, raw_column=None):
        self.name, self.raw_column = name, raw_column or name

    @property
    def columns(self):
        return [self.name]

    @property
    def oov(self):
        """Local id of values outside the vocabulary, or None."""
        return None

    @property
    def missing_id(self):
        raise NotImplementedError

    @property
    def table_size(self):
        raise NotImplementedError

    def tokens(self, column):
        """A raw column (n) -> (list of token arrays (n), one per column of the field; None or long texts)."""
        raise NotImplementedError

    def local_ids(self, tokens):
        """Tokens (n) of one column -> ids within the field (n)."""
        raise NotImplementedError

    def count_tokens(self, columns, texts):
        """(distinct tokens, counts, long texts) of token columns, or None where nothing is counted."""
        if not self.counted:
            return None
        return (*count_tokens(columns[0] if len(columns) == 1 else np.concatenate(columns)), texts)

    def fit(self, tokens, counts, texts):
        """Make what the ids depend on of all tokens of the train rows with their counts."""

    def count_old(self):
        """What the dataset that is to grow had counted: (tokens, counts, texts)."""
        return np.empty(0, self.dtype), np.empty(0, np.int64), None

    def unknown(self, tokens, ids):
        """How many values are not missing and not in the vocabulary."""
        return 0

    def parameters(self):
        """What else defines the encoding, for dataset_info.json and the fingerprint; from_json takes it back."""
        return {}

    def identity(self):
        return {"kind": self.kind, **self.parameters()}

    def digest(self, num_tokens=None):
        """Fingerprint of the field, as it was when its vocabulary had num_tokens tokens; default: all it has."""
        digest = hashlib.sha256(json.dumps([self.name, self.raw_column, self.columns, self.identity()], sort_keys=True,
                                           ensure_ascii=True).encode())
        if self.vocabulary is not None:
            self.vocabulary.digest(digest, num_tokens)
        return digest.hexdigest()

    def encoding(self):
        """The entry `encoding` of dataset_info.json."""
        described = {**self.identity(), "missing": {"id": self.missing_id}, "oov": self.oov}
        if self.vocabulary is not None:
            described.update(num_tokens=len(self.vocabulary), vocabulary=vocabulary_file(self.name),
                             min_count=self.min_count)
        return described


def vocabulary_file(name, rare=False):
    return f"vocabulary/{name}.rare.parquet" if rare else f"vocabulary/{name}.parquet"


class VocabularyField(Field):
    """A field whose tokens are counted; those seen at least min_count times get ids from first_id on.

    ignored: a token that never enters the vocabulary (the missing value).
    """

    counted = True
    first_id = 1
    ignored = 0

    def __init__(self, name, raw_column=None, min_count=1, vocabulary=None):
        super().__init__(name, raw_column)
        self.min_count, self.vocabulary = min_count, vocabulary

    @property
    def oov(self):
        return self.first_id + len(self.vocabulary)

    @property
    def missing_id(self):
        return self.oov

    @property
    def table_size(self):
        return self.first_id + len(self.vocabulary) + 1

    def parameters(self):
        return {"first_id": self.first_id}

    def fit(self, tokens, counts, texts):
        """The vocabulary of all counts; where there is one already (growth), what is new goes behind it.

        The counts then include those of the old dataset (see count_old).
        """
        present = tokens != self.ignored
        tokens, counts = tokens[present], counts[present]
        old = self.vocabulary
        if old is not None:
            places = old.positions(tokens)
            old.counts = old.counts.copy()
            old.counts[places[places >= 0]] = counts[places >= 0]
            tokens, counts = tokens[places < 0], counts[places < 0]
        frequent, rare = divide(tokens, counts, self.min_count)
        if old is None:
            self.vocabulary = Vocabulary(frequent[0], texts_of(frequent[0], texts), frequent[1], known=0)
        else:
            self.vocabulary = old.grown(frequent[0], texts_of(frequent[0], texts), frequent[1])
        self.rare = (*rare, texts)

    def count_old(self):
        tokens, counts, texts = self.rare
        known = self.vocabulary
        long_texts = string_keys(known.texts)[1] if known.keys.dtype == np.uint64 else None
        return (np.concatenate([known.keys, tokens]), np.concatenate([known.counts, counts]),
                merge_texts([texts, *([long_texts] if long_texts else [])]))

    def local_ids(self, tokens):
        ids = self.vocabulary.positions(tokens)
        ids += self.first_id
        ids[ids == self.first_id - 1] = self.oov
        return ids

    def unknown(self, tokens, ids):
        return int(np.count_nonzero((ids == self.oov) & (tokens != self.ignored)))

    def write(self, folder):
        """vocabulary/NAME.parquet, and vocabulary/NAME.rare.parquet where tokens below the threshold are known."""
        self.vocabulary.write(Path(folder) / vocabulary_file(self.name), self.first_id)
        if self.rare is not None and len(self.rare[0]):
            tokens, counts, texts = self.rare
            order = np.argsort(tokens)  # so that the file does not depend on how the rows were counted
            write_tokens(Path(folder) / vocabulary_file(self.name, rare=True), texts_of(tokens[order], texts),
                         {"count": counts[order]})
        self.rare = None  # the rows are written meanwhile, which needs the memory

    def read(self, folder, num_tokens):
        path = as_place(folder) / vocabulary_file(self.name)
        texts, ids, counts = read_tokens(path, ["token", "id", "count"])
        if len(texts) != num_tokens or not np.array_equal(ids, np.arange(self.first_id, self.first_id + len(ids))):
            raise UserError(f"{path} does not hold the {num_tokens} ids from {self.first_id} on that dataset_info.json "
                            "speaks of; copy the dataset again, or convert again")
        try:
            self.vocabulary = Vocabulary(keys_of_texts(texts, self.dtype), texts, counts)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} has a token that is no whole number ({first_line(error)}); copy the dataset "
                            "again") from None

    def read_rare(self, folder, files):
        """Counts of tokens below the threshold, which --base needs; files: of dataset_info.json."""
        path = as_place(folder) / vocabulary_file(self.name, rare=True)
        check_file(folder, vocabulary_file(self.name, rare=True), files)
        self.rare = (np.empty(0, self.dtype), np.empty(0, np.int64), NO_TEXTS)
        if path.exists():
            texts, counts = read_tokens(path, ["token", "count"])
            long_texts = string_keys(texts)[1] if self.dtype == np.uint64 else None
            self.rare = (keys_of_texts(texts, self.dtype), counts, long_texts or NO_TEXTS)


class Category(VocabularyField):
    """A text per row, or up to `length` of them (a list, or texts with a separator) that share one table.

    A missing value is out of vocabulary; absent elements of a list are padding (0), empty elements are dropped.
    """

    kind = "category"

    def __init__(self, name, raw_column=None, min_count=1, length=None, separator=None, vocabulary=None):
        super().__init__(name, raw_column, min_count, vocabulary)
        self.length, self.separator = length, separator

    @property
    def columns(self):
        return [self.name] if self.length is None else [f"{self.name}_{i}" for i in range(self.length)]

    def parameters(self):
        parameters = super().parameters()
        if self.length is not None:
            parameters["list"] = {"length": self.length, "separator": self.separator, "padding": 0}
        return parameters

    def tokens(self, column):
        # without a vocabulary, which then is about to be made, values write themselves
        spelling = self.vocabulary.spelling if self.vocabulary is not None else PLAIN
        if self.length is None:
            keys, texts = string_keys(as_text(column, spelling))
            return [keys], texts
        elements, lengths = as_lists(column, self.separator, spelling)
        keys, texts = string_keys(elements)
        rows = np.repeat(np.arange(len(lengths)), lengths)[keys != 0]
        keys = keys[keys != 0]
        places = np.arange(len(rows)) - np.searchsorted(rows, rows)  # within the row
        result = np.zeros((self.length, len(lengths)), np.uint64)
        kept = places < self.length
        result[places[kept], rows[kept]] = keys[kept]
        return list(result), texts

    def local_ids(self, tokens):
        ids = super().local_ids(tokens)
        if self.length is not None:
            ids[tokens == 0] = 0
        return ids


# ------------------------------------------------------------------------------------------------------------- numbers


def bucket_borders():
    """Smallest integer of each bucket: borders[k-1] is the first v with floor(ln(v)^2) >= k."""
    borders = []
    for bucket in range(1, int(np.log(MAX_INTEGER) ** 2) + 1):
        value = round(np.exp(np.sqrt(bucket)))
        while np.floor(np.log(value) ** 2) >= bucket:
            value -= 1
        while np.floor(np.log(value) ** 2) < bucket:
            value += 1
        borders.append(value)
    return np.array(borders, np.int64)


BORDERS = bucket_borders()
SMALL_BUCKETS = np.searchsorted(BORDERS, np.arange(1 << 16), side="right").astype(np.int32)
SMALL_BUCKETS[:3] = [0, 1, 2]  # up to 2 the value is its own bucket


def buckets(values):
    """floor(ln(v)^2) for v > 2, else v. int64 (n) in, int32 (n) out; by table, which is faster than the formula."""
    result = SMALL_BUCKETS[np.clip(values, 0, len(SMALL_BUCKETS) - 1)]
    large = values >= len(SMALL_BUCKETS)
    if large.any():
        result[large] = np.searchsorted(BORDERS, values[large], side="right")
    return np.where(values < 0, values, result).astype(np.int32)


BUCKET_RULE = "floor(ln(v)^2) if v > 2 else v"


class Bucket(VocabularyField):
    """Logarithmic buckets with a vocabulary.

    As in Criteo_x4 the bucket of a whole number v is floor(ln(v)^2) if v > 2, else v. own_missing False is FuxiCTR's
    rule for Criteo: values must be whole, a missing one counts as 0, and 0 is never in the vocabulary. With own_missing
    numbers of any kind are cut to [-2^31 + 1, 2^53] and to their whole part, and missing values have the id 1.
    """

    kind = "bucket"
    dtype = np.dtype(np.int32)

    def __init__(self, name, raw_column=None, min_count=1, own_missing=False, vocabulary=None):
        super().__init__(name, raw_column, min_count, vocabulary)
        self.own_missing = own_missing
        self.ignored = MISSING_TOKEN if own_missing else 0
        self.first_id = 2 if own_missing else 1
        self.raw_type = pa.float64() if own_missing else pa.int64()

    @property
    def missing_id(self):
        return 1 if self.own_missing else self.oov

    def parameters(self):
        cut = [MIN_INTEGER + 1, MAX_INTEGER] if self.own_missing else None
        rule = BUCKET_RULE + (", v cut to that range and to its whole part first" if self.own_missing else "")
        return {**super().parameters(), "rule": rule, "own_missing": self.own_missing, "cut": cut}

    def tokens(self, column):
        if not self.own_missing:
            return [buckets(whole_numbers(column))], None
        values = as_numbers(column)
        missing = np.isnan(values)
        cut = np.clip(np.where(missing, 0, values), MIN_INTEGER + 1, MAX_INTEGER)
        return [np.where(missing, MISSING_TOKEN, buckets(cut.astype(np.int64)))], None

    def local_ids(self, tokens):
        ids = super().local_ids(tokens)
        if self.own_missing:
            ids[tokens == MISSING_TOKEN] = 1
        return ids


class Quantile(Field):
    """Bins of about equally many train rows: id = 2 + number of borders <= value; missing values have the id 1.

    Borders are values of the train rows, sought in a sample of them. num_bins: bins wanted, fewer where values repeat.
    """

    kind = "quantile"
    dtype = np.dtype(np.int64)  # the bits of a float64
    raw_type = pa.float64()
    counted = sampled = True
    first_id = 2

    def __init__(self, name, raw_column=None, num_bins=50, borders=None):
        super().__init__(name, raw_column)
        self.num_bins = num_bins
        self.borders = None if borders is None else np.asarray(borders, np.float64)

    @property
    def missing_id(self):
        return 1

    @property
    def table_size(self):
        return self.first_id + len(self.borders) + 1

    def parameters(self):
        return {"first_id": self.first_id, "num_bins": self.num_bins, "borders": self.borders.tolist()}

    def tokens(self, column):
        values = as_numbers(column) + 0.0  # no negative zero
        return [np.where(np.isnan(values), np.nan, values).view(np.int64)], None  # one bit pattern for NaN

    def fit(self, tokens, counts, texts):
        if self.borders is not None:
            return  # a dataset that grows keeps its borders
        values = tokens.view(np.float64)
        present = ~np.isnan(values)
        order = np.argsort(values[present])
        values, ends = values[present][order], np.cumsum(counts[present][order])
        if not len(values):
            self.borders = np.empty(0)
            return
        wanted = np.arange(1, self.num_bins) / self.num_bins * ends[-1]
        borders = np.unique(values[np.searchsorted(ends, wanted, side="right").clip(max=len(values) - 1)])
        self.borders = borders[borders > values[0]]

    def local_ids(self, tokens):
        values = tokens.view(np.float64) if tokens.flags.c_contiguous else np.ascontiguousarray(tokens).view(np.float64)
        ids = np.searchsorted(self.borders, values, side="right") + self.first_id
        ids[np.isnan(values)] = 1
        return ids


# -------------------------------------------------------------------------------------------------------------- hashes


def fnv1a(column):
    """64-bit FNV-1a of the UTF-8 bytes of a string Array without nulls: uint64 (n)."""
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.cast(pa.large_string())
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    hashes = np.full(len(texts), 0xCBF29CE484222325, np.uint64)
    order = np.argsort(-np.diff(offsets), kind="stable")  # long ones first: after p bytes only a head of them goes on
    starts, lengths = offsets[:-1][order], np.diff(offsets)[order]
    prime, done = np.uint64(0x100000001B3), 0
    going = len(texts)
    while True:
        going = int(np.searchsorted(-lengths[:going], -done, side="left"))
        if not going:
            break
        hashes[:going] = (hashes[:going] ^ data[starts[:going] + done]) * prime
        done += 1
    result = np.empty(len(texts), np.uint64)
    result[order] = hashes
    return result[encoded.indices.to_numpy()]


class Hash(Field):
    """id = 2 + 64-bit FNV-1a of the text's UTF-8 bytes mod (size - 2): no vocabulary, a table of `size` rows."""

    kind = "hash"
    dtype = np.dtype(np.int32)
    first_id = 2

    def __init__(self, name, raw_column=None, size=None):
        super().__init__(name, raw_column)
        self.size = size

    @property
    def missing_id(self):
        return 1

    @property
    def table_size(self):
        return self.size

    def parameters(self):
        return {"first_id": self.first_id, "function": "fnv1a64", "modulus": self.size - self.first_id}

    def tokens(self, column):
        texts = as_text(column)
        ids = (fnv1a(texts) % np.uint64(self.size - self.first_id)).astype(np.int32) + np.int32(self.first_id)
        offsets = np.frombuffer(texts.buffers()[1], np.int32 if pa.types.is_string(texts.type) else np.int64)
        ids[np.diff(offsets[texts.offset : texts.offset + len(texts) + 1]) == 0] = 1
        return [ids], None

    def local_ids(self, tokens):
        return tokens


HEX_DIGIT = np.full(256, 255, np.uint8)
for _digit in "0123456789abcdefABCDEF":
    HEX_DIGIT[ord(_digit)] = int(_digit, 16)
HEXADECIMAL = "up to 8 hexadecimal digits (--encoding x4 takes any string)"


class Modulus(Field):
    """id = value mod modulus; a missing value is 0. base 10: whole numbers; 16: texts of up to 8 hexadecimal digits."""

    kind = "modulus"
    dtype = np.dtype(np.int32)

    def __init__(self, name, raw_column=None, modulus=None, base=10):
        super().__init__(name, raw_column)
        self.modulus, self.base = modulus, base
        self.raw_type = pa.int64() if base == 10 else pa.string()

    @property
    def missing_id(self):
        return 0

    @property
    def table_size(self):
        return self.modulus

    def parameters(self):
        return {"first_id": 0, "modulus": self.modulus, "base": self.base}

    def tokens(self, column):
        if self.base == 10:
            return [(whole_numbers(column) % self.modulus).astype(np.int32)], None
        texts = as_text(column)
        keys, long = string_keys(texts)
        characters = keys.view(np.uint8).reshape(-1, 8)
        values = np.zeros(len(keys), np.uint64)
        bad = np.zeros(len(keys), bool) if long is None else characters[:, 0] == 0xFF
        for position in range(8):
            digit = HEX_DIGIT[characters[:, position]]
            present = characters[:, position] != 0
            bad |= present & (digit == 255)
            values = np.where(present, values * np.uint64(16) + digit, values)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise BadValue(row, repr(texts[row].as_py()), HEXADECIMAL)
        return [(values % np.uint64(self.modulus)).astype(np.int32)], None

    def local_ids(self, tokens):
        return tokens


class Foreign(Field):
    """A field that another program encoded, in a way that cannot be read: its ids are known, its tokens are not.

    described: {"by": which program, "oov": id or None, "missing": id or None, "digest": of what it saved, or None}.
    """

    kind = "foreign"

    def __init__(self, name, raw_column=None, table_size=None, described=None):
        super().__init__(name, raw_column)
        self.size, self.described = table_size, described or {}

    @property
    def oov(self):
        return self.described.get("oov")

    @property
    def missing_id(self):
        return self.described.get("missing")

    @property
    def table_size(self):
        return self.size

    def parameters(self):
        return {"table_size": self.size, "by": self.described.get("by"), "digest": self.described.get("digest")}

    def tokens(self, column):
        raise UserError(f"field {self.name} was encoded by {self.described.get('by')}, which kept no vocabulary that "
                        "can be read; encode new rows with that program and convert them with h5_to_parquet.py --like")


# ------------------------------------------------------------------------------------------------ dataset_info.json


def field_from_json(entry):
    """The Field (its vocabulary not read) of an entry of dataset_info.json. Raises: KeyError, TypeError, ValueError."""
    encoding = entry["encoding"]
    name, raw_column = entry["name"], entry.get("raw_column", entry["name"])
    kind = encoding["kind"]
    if kind == "category":
        listed = encoding.get("list") or {}
        field = Category(name, raw_column, encoding["min_count"], listed.get("length"), listed.get("separator"))
        field.first_id = encoding["first_id"]
    elif kind == "bucket":
        field = Bucket(name, raw_column, encoding["min_count"], encoding["own_missing"])
    elif kind == "quantile":
        field = Quantile(name, raw_column, encoding["num_bins"], encoding["borders"])
    elif kind == "hash":
        field = Hash(name, raw_column, encoding["modulus"] + encoding["first_id"])
    elif kind == "modulus":
        field = Modulus(name, raw_column, encoding["modulus"], encoding["base"])
    elif kind == "foreign":
        field = Foreign(name, raw_column, encoding["table_size"],
                        {**encoding, "missing": encoding["missing"]["id"]})
    else:
        raise ValueError(f"field {name} has an encoding of the unknown kind {kind}")
    return field


def check_entry(field, entry):
    """Raise a ValueError unless a Field is described as its entry of dataset_info.json does."""
    if field.columns != entry.get("columns", [field.name]):
        raise ValueError(f"field {field.name} has the columns {brief(field.columns)}, not {brief(entry['columns'])}")
    for key, value in field.encoding().items():
        found = entry["encoding"].get(key)
        if found != value:
            raise ValueError(f"field {field.name} has {brief(value)} for {key}, not {brief(found)}")


class Encoder:
    """Raw columns -> global ids: everything that a dataset says about its encoding, and nothing else.

    Attributes: fields (list of Field), offsets {field name: first global id}, info (contents of dataset_info.json),
    fingerprint (hex), raw_columns ({raw column: kind of its field}), columns (names of the id columns, in order),
    label (raw column with the label, or None).
    """

    def __init__(self, info, fields):
        self.info, self.fields = info, fields
        sizes = np.cumsum([0] + [field.table_size for field in fields])
        self.offsets = {field.name: int(offset) for field, offset in zip(fields, sizes)}
        self.id_dtype = np.dtype(np.int32 if sizes[-1] <= np.iinfo(np.int32).max else np.int64)
        self.columns = [column for field in fields for column in field.columns]
        self.fingerprint = fingerprint(fields)
        self.raw_columns = {field.raw_column: field.kind for field in fields}
        self.label = info.get("raw", {}).get("label")

    @classmethod
    def load(cls, folder):
        """The encoder of a dataset, or of a folder that save() wrote. Raises: UserError with one line."""
        folder = as_place(folder)
        info = read_info(folder)
        if not all("encoding" in entry for entry in info["fields"]):
            raise UserError(f"{folder} was made by an older version, which kept no vocabularies: its rows train as "
                            "before, but new rows cannot be encoded; convert the raw data again")
        fields = []
        try:
            for entry in info["fields"]:
                field = field_from_json(entry)
                if field.counted and not field.sampled:
                    check_file(folder, vocabulary_file(field.name), info.get("files"))
                    field.read(folder, entry["encoding"]["num_tokens"])
                check_entry(field, entry)
                if field.table_size != entry["table_size"]:
                    raise ValueError(f"field {field.name} has {field.table_size} ids, not {entry['table_size']}")
                if field.digest() != entry["fingerprint"]:
                    raise UserError(f"{folder}: field {field.name} is not encoded as its fingerprint says: its "
                                    "vocabulary or description was changed or swapped; copy the dataset again, or "
                                    "convert again")
                fields.append(field)
            encoder = cls(info, fields)
            if encoder.fingerprint != info["fingerprint"]:
                raise ValueError(f"the fingerprint is {brief(info['fingerprint'])}, not {encoder.fingerprint}")
            if "raw" not in info:
                raise ValueError("it does not say how raw rows look (raw)")
            return encoder
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise not_a_dataset(folder / INFO, error) from None

    def save(self, folder):
        """Write dataset_info.json and vocabulary/ to a folder, made where it is missing; load() reads them back."""
        folder = Path(folder)
        (folder / "vocabulary").mkdir(parents=True, exist_ok=True)
        for field in self.fields:
            if field.vocabulary is not None:
                field.vocabulary.write(folder / vocabulary_file(field.name), field.first_id)
        (folder / INFO).write_text(json.dumps(self.info, indent=2) + "\n", encoding="utf-8")

    def encode_columns(self, table, unknown=None):
        """Local ids of raw columns: list of arrays (n), one per id column. See `encode`."""
        table = raw_table(table)
        missing = [name for name in self.raw_columns if name not in table.column_names]
        if missing:
            raise UserError(f"the rows have no column {missing[0]} ({len(missing)} of {len(self.raw_columns)} columns "
                            f"are missing); they have {brief(table.column_names)}")
        ids = []
        for number, field in enumerate(self.fields):
            try:
                columns, _ = field.tokens(table.column(field.raw_column))
            except BadValue as error:
                error.column = field.raw_column
                raise
            for tokens in columns:
                ids.append(field.local_ids(tokens))
                if unknown is not None:
                    unknown[number] += field.unknown(tokens, ids[-1])
        return ids

    def encode(self, table, unknown=None):
        """Global ids of raw rows.

        Args:
            table: pyarrow Table or RecordBatch, pandas DataFrame, or {name: values}; it has all raw_columns, in any
                order, and may have more. Texts, numbers and missing values as values.py takes them.
            unknown: None, or int64 array (fields), to which the number of values that are not in the vocabulary of
                their field (and not missing) is added.
        Returns: int32, or int64 where the ids need it, (n, len(columns)).
        Raises: UserError (a column is missing), BadValue (a value that its field cannot have).
        """
        local = self.encode_columns(table, unknown)
        ids = np.empty((len(local[0]), len(local)), self.id_dtype)
        places = [self.offsets[field.name] for field in self.fields for _ in field.columns]
        for index, (column, offset) in enumerate(zip(local, places)):
            np.add(column, offset, out=ids[:, index], casting="unsafe")
        return ids


def raw_table(table):
    """pyarrow Table of a Table, RecordBatch, DataFrame or {name: values}."""
    if isinstance(table, pa.RecordBatch):
        return pa.Table.from_batches([table])
    if isinstance(table, pa.Table):
        return table
    if isinstance(table, dict):
        return pa.table(table)
    return pa.Table.from_pandas(table, preserve_index=False)


def fingerprint(fields):
    """Digest of the encoding of all fields, in order; it does not depend on engine, memory or machine."""
    return hashlib.sha256("\n".join(f"{field.name} {field.digest()}" for field in fields).encode()).hexdigest()


def not_a_dataset(path, error):
    return UserError(f"{path} cannot be used ({type(error).__name__}: {first_line(error)}); {ADVICE}")
