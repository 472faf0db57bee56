"""Raw files: finding them, cutting them into blocks of whole rows, and reading a block as a table.

Two kinds: text (comma, tab or another separator; plain, gzip or zstd) and parquet. Which one a file is, its
compression, separator and header are found by looking into it. Files may lie anywhere (see places.py); paths are never
patterns.
"""

import csv
import gzip
import io
import re
import stat
import zlib
from collections import namedtuple
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.csv as pa_csv

from tools.converter.values import LABELS, is_number
from tools.trainer.cli import UserError, brief, first_line, shorten
from tools.trainer.places import as_place, parquet_file

BLOCK_BYTES = 8 << 20  # raw text parsed at a time, about 33,000 rows of Criteo
BLOCK_ROWS = 1 << 15  # rows of a parquet file read at a time
LONGEST_LINE = 1 << 26  # bytes; a file without line ends must not be read as a whole
LONGEST_HEADER = 1 << 20
SEPARATORS = "\t,;|"
DATA_ENDINGS = (".csv", ".tsv", ".txt", ".gz", ".zst", ".parquet", ".pq")
MARKS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
BOM = b"\xef\xbb\xbf"

Block = namedtuple("Block", "place rows data")
Block.__doc__ = """Some rows of a raw file. place: number of the first line (text) or row (parquet), for messages and
for finding it again; rows: how many; data: bytes of text, or a RecordBatch."""

RawFormat = namedtuple("RawFormat", "columns header separator quotes label unlabelled likely needed",
                       defaults=(None, None, None, True, None, False, None, None))
RawFormat.__doc__ = """How raw text is written.

columns: names of all columns in file order (None: the header has them); header: True, False, or None (found by looking
for their names in the first line); separator (None: found by looking); quotes: whether cells may be quoted; label: name
of the label column, or None; unlabelled: whether a file without header may lack that column; likely: the separator that
is tried first, or None; needed: names that a header must have (None: nothing is known of it).
"""


def format_again(raw, needed, unlabelled=False):
    """RawFormat of new rows that look like those of a dataset.

    raw: the entry of that name in its dataset_info.json; needed: raw columns of its fields.
    """
    # rows without header are told from rows with one by the names; where there was none, or either may be, both
    # are right
    header = None if raw.get("header", True) in (False, None) else True
    return RawFormat(raw.get("columns"), header, None, raw.get("quotes", True), raw.get("label"), unlabelled,
                     raw.get("separator"), list(needed))


# ------------------------------------------------------------------------------------------------------- finding files


def natural_key(name):
    """Sorts part_10 after part_9."""
    pieces = re.split(r"(\d+)", name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def list_files(path):
    """Data files of an input, in order: the file itself, or those in a folder. Raises: UserError"""
    path = as_place(path)
    if not path.is_dir():
        check_file(path)
        return [path]
    found = {file.name: file for file in path.iterdir() if not file.name.startswith((".", "_"))}  # _SUCCESS of Spark
    strange = sorted(name for name in found if not name.lower().endswith(DATA_ENDINGS))
    if strange:
        raise UserError(f"{path} holds {shorten(strange)} beside data files ({', '.join(DATA_ENDINGS)}); move it "
                        "elsewhere, or give the files one by one")
    if not found:
        raise UserError(f"{path} has no data files in it; expected names that end in {', '.join(DATA_ENDINGS)}")
    files = [found[name] for name in sorted(found, key=natural_key)]
    for file in files:
        check_file(file)
    return files


def check_file(path):
    """Raise a UserError unless path is a regular file (or a link to one) that is not empty."""
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"),
                                             (stat.S_ISSOCK, "a socket")) if test(mode)), "a device")
        raise UserError(f"{path} is {kind}, expected a file, which is read more than once; write it to a file first")
    if not size:
        raise UserError(f"{path} is empty, expected rows")


def open_raw(path, form):
    """RawText or RawParquet of a file; form: RawFormat, which only text needs."""
    path = as_place(path)
    check_file(path)
    with path.open("rb") as file:
        head = file.read(4)
    return RawParquet(path) if head == b"PAR1" else RawText(path, form)


# ---------------------------------------------------------------------------------------------------------------- text


class RawText:
    """A text file with one row per line.

    Attributes: path, packed (None, "gzip" or "zstd"), separator, columns (names in file order), has_header, quotes,
    start: offset of the first row (behind byte order mark and header) in the unpacked file.
    """

    is_text = True

    def __init__(self, path, form):
        self.path, self.quotes = path, form.quotes
        self.share_read = 0.0
        with path.open("rb") as file:
            head = file.read(4)
        self.packed = "gzip" if head[:2] == b"\x1f\x8b" else "zstd" if head == b"\x28\xb5\x2f\xfd" else None
        with self.open() as file, self._whole():
            head = file.read(LONGEST_HEADER)
        mark = len(BOM) if head.startswith(BOM) else 0
        encoding = next((name for mark_bytes, name in MARKS if head.startswith(mark_bytes)), None)
        if encoding is None and 4 * head[:200].count(b"\0") > len(head[:200]):
            encoding = "UTF-16, or not text at all"
        if encoding:
            raise UserError(f"{path} is {encoding}, expected text in UTF-8; write it again, say with iconv -t UTF-8")
        end = head.find(b"\n") + 1
        if not end and len(head) == LONGEST_HEADER:
            raise UserError(f"{path} has no line end in its first {LONGEST_HEADER} bytes; expected one row per line")
        line = head[mark : end or None].rstrip(b"\r\n")
        if not line:
            raise UserError(f"{path} is empty or begins with an empty line, expected "
                            f"{f'{len(form.columns)} columns' if form.columns else 'a header'}")
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line 1: {error.reason} at byte {error.start}; expected text in UTF-8") from None
        self.separator = form.separator or find_separator(line, form)
        self._read_header(line, form)
        self.start = mark if not self.has_header else end or len(head)

    def _read_header(self, line, form):
        cells = split_line(line, self.separator, self.quotes)
        self.has_header = is_header(cells, form)
        self.columns = cells if self.has_header else columns_of(cells, form)
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise UserError(f"{self.path} has two columns called {twice[0]!r}; rename one of them"
                            + (", or add a header where it has none" if self.has_header else ""))

    @contextmanager
    def open(self):
        """The unpacked file, for reading; share_read follows it. Errors of the packing: see _whole."""
        with self.path.open("rb") as file:
            if self.packed == "gzip":
                stream = gzip.GzipFile(fileobj=file)
            elif self.packed == "zstd":
                stream = pa.CompressedInputStream(pa.PythonFile(file), "zstd")
            else:
                stream = file
            self._on_disk = file
            try:
                yield stream
            finally:
                self._on_disk = None

    def __getstate__(self):
        return {**self.__dict__, "_on_disk": None}

    @contextmanager
    def _whole(self):
        """Context manager: what the packing's library raises for a damaged file becomes a UserError."""
        try:
            yield
        except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
            if not self.packed or isinstance(error, OSError) and error.errno:  # the disk's errors are not the file's
                raise
            raise UserError(f"{self.path} is not a whole {self.packed} file ({first_line(error)}); "
                            "get it again") from None

    def pieces(self, size):
        """Yield (offset, bytes) of whole lines, about `size` bytes each; sets share_read as it goes."""
        total = max(1, self.path.stat().st_size)
        with self.open() as file:
            with self._whole():
                offset = len(file.read(self.start))
            rest = b""
            while True:
                with self._whole():
                    read = file.read(size)
                self.share_read = min(1.0, self._on_disk.tell() / total)
                data = rest + read
                if not read:
                    if data:
                        yield offset, data + b"\n"  # the last line had no line end
                    return
                end = data.rfind(b"\n") + 1
                block, rest = data[:end], data[end:]
                if len(rest) > LONGEST_LINE:
                    raise self._too_long(offset + len(block))
                if block:
                    yield offset, block
                    offset += len(block)

    def _too_long(self, offset):
        return UserError(f"{self.path} has a line of more than {LONGEST_LINE >> 20} MiB at byte {offset}; expected one "
                         "row per line, with line ends as Unix or Windows write them")

    def blocks(self, columns=None):
        """Yield Blocks of whole lines without the header."""
        line = 2 if self.has_header else 1
        for _, data in self.pieces(BLOCK_BYTES):
            rows = data.count(b"\n")
            yield Block(line, rows, data)
            line += rows

    def piece(self, path, begin, end):
        """(offset, bytes) of the lines that begin in [begin, end) of an unpacked copy of the file, or of itself."""
        with path.open("rb") as file:
            if begin > self.start:
                file.seek(begin - 1)
                begin += self._rest_of_line(file, begin - 1) - 1
            if begin >= end:
                return begin, b""
            file.seek(begin)
            data = file.read(end - begin)
            if not data.endswith(b"\n"):
                file.seek(end)
                data += file.read(self._rest_of_line(file, end))
        return begin, data if data.endswith(b"\n") or not data else data + b"\n"

    def _rest_of_line(self, file, offset):
        """Bytes from here to the next line, or to the end of the file; leaves the file here."""
        size = 0
        while True:
            read = file.read(1 << 16)
            end = read.find(b"\n") + 1
            size += end or len(read)
            if size > LONGEST_LINE:
                raise self._too_long(offset)
            if end or not read:
                file.seek(offset)
                return size

    def check_columns(self, wanted):
        check_columns(self.path, self.columns, wanted)

    def table(self, block, types, problem):
        """A block as a pyarrow Table of the columns in `types` {name: type}.

        problem: function of {column: cell text} that says what is wrong with a line, or None.
        Raises: UserError with the line's number.
        """
        if b"\0" in block.data:
            self.check_lines(block, problem)
        table = self._parsed(block, types)
        if table is None and pa.int64() in types.values():
            # "1.0", as pandas writes integers when some are missing
            table = self._parsed(block, {name: pa.float64() if kind == pa.int64() else kind
                                         for name, kind in types.items()})
        if table is None or table.num_rows != block.rows:
            self.check_lines(block, problem)
            raise UserError(f"{self.path}, near line {block.place}: the lines cannot be read as {len(self.columns)} "
                            f"columns separated by {self.separator!r}")
        return table

    def _parsed(self, block, types):
        try:
            return pa_csv.read_csv(
                pa.BufferReader(block.data),
                # one chunk per column; blocks are already parsed in parallel
                pa_csv.ReadOptions(column_names=self.columns, use_threads=False, block_size=len(block.data) + 1),
                pa_csv.ParseOptions(delimiter=self.separator, quote_char='"' if self.quotes else False,
                                    ignore_empty_lines=False),
                pa_csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[""],
                                      strings_can_be_null=False))  # fmt: skip
        except pa.ArrowInvalid:
            return None

    def check_lines(self, block, problem):
        """Raise a UserError for the first bad line of a block; return if there is none."""
        for number, line in enumerate(block.data.split(b"\n")[:-1], block.place):
            found = self._line_problem(line[:-1] if line.endswith(b"\r") else line, problem)
            if found:
                raise UserError(f"{self.path}, line {number}: {found}")

    def _line_problem(self, line, problem):
        for character, name in ((b"\r", "a carriage return inside the line"), (b"\0", "a zero byte")):
            if character in line:
                return f"{name}; the file is damaged, or not plain text of one byte per character"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"{error.reason} at byte {error.start}, expected text in UTF-8; write it again, say with iconv"
        if self.quotes and has_open_quote(text, self.separator):
            return ("a quote that is not closed; values of several lines cannot be read: write them as parquet, or add "
                    "--no_quotes where quotes are plain characters")
        cells = split_line(text, self.separator, self.quotes)
        if len(cells) != len(self.columns):
            return f"{len(cells)} columns, expected {len(self.columns)} ({brief(self.columns, 40)})"
        return problem(dict(zip(self.columns, cells)))

    def bad_value(self, block, error):
        """UserError of a BadValue in a column of a block."""
        return UserError(f"{self.path}, line {block.place + error.row}: {error.column} is {error.value}, expected "
                         f"{error.expected}")


def find_separator(line, form):
    """The separator of a file with this first line.

    The one that makes of it best what is known of a header or a row; of several, the likely one, or else the one that
    the line has most of.
    """
    known = [form.likely] if form.likely else []
    found = [mark for mark in [*known, *sorted(SEPARATORS, key=line.count, reverse=True)] if mark in line]
    return max(found or known or [","], key=lambda mark: fit(split_line(line, mark, form.quotes), form))


def fit(cells, form):
    """How well the cells of a first line fit: 2 where a header has all needed names, or a row all columns and a label
    where it has one; 1 for a row with another label; 0."""
    if is_header(cells, form):
        return 2 * has_needed(cells, form)
    columns = columns_of(cells, form)
    if len(cells) != len(columns):
        return 0
    return 2 if form.label not in columns or cells[columns.index(form.label)] in LABELS else 1


def has_needed(cells, form):
    """Whether the cells of a header, or of what may be one, have all names that it must have."""
    if form.needed is not None:
        return set(form.needed) <= set(cells)
    return form.columns is None or set(form.columns) <= set(cells)


def is_header(cells, form):
    """Whether the first line of a file is a header.

    Where nobody says so it is one without numbers that has all names that are needed, or some that no row would have:
    where they stand in a header, or so many of them, or in a line that is no row. So a header that lacks a name is not
    taken for a row.
    """
    if form.header is not None:
        return form.header
    if any(map(is_number, cells)):
        return False
    if has_needed(cells, form):
        return True
    cells = [cell.strip().lower() for cell in cells]
    columns = [name.lower() for name in columns_of(cells, form)]
    known = sum(cell in columns for cell in cells)
    return known > 0 if len(cells) != len(columns) else 2 * known > len(cells) or any(map(str.__eq__, cells, columns))


def columns_of(cells, form):
    """Names of the columns of a file without header, of which these are cells of a line."""
    columns = list(form.columns)
    if form.unlabelled and len(cells) == len(columns) - 1 and form.label in columns:
        columns.remove(form.label)
    return columns


def has_open_quote(text, separator):
    """Whether a line has a cell that begins with a quote and does not end; other quotes are plain characters."""
    place = 0
    while True:
        if text.startswith('"', place):
            quoted = re.compile('"(?:[^"]|"")*"(?!")').match(text, place)
            if quoted is None:
                return True
            place = quoted.end()
        place = text.find(separator, place) + 1
        if not place:
            return False


def split_line(text, separator, quotes):
    csv.field_size_limit(LONGEST_HEADER)  # the default is an eighth of it
    if not quotes or '"' not in text:
        return text.split(separator)
    return next(csv.reader(io.StringIO(text), delimiter=separator, strict=False), [""])


def check_columns(path, columns, wanted):
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {shorten(columns)}")


def kept_type(raws, column, option, similar=False):
    """pyarrow type of a column that is handed through: text of text files, its own of parquet.

    similar: whether it may have several types of which one holds the values of all. Raises: UserError
    """
    kinds = {str(kind): kind for kind in (pa.string() if raw.is_text else raw.types[column] for raw in raws)}
    kind = next(iter(kinds.values())) if len(kinds) == 1 else common_type(kinds.values()) if similar else None
    if kind is None:
        raise UserError(f"{option} {column}: the inputs have it as {' and '.join(sorted(kinds))}; give inputs of one "
                        "type")
    return kind


def common_type(kinds):
    """The type that holds all values of some types, else None: as floats, which pandas makes of whole numbers with
    gaps, long numbers would change."""
    if any(map(pa.types.is_floating, kinds)) and any(map(pa.types.is_integer, kinds)):
        return None
    try:
        return pa.unify_schemas([pa.schema([("", kind)]) for kind in kinds], promote_options="permissive").types[0]
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


# ------------------------------------------------------------------------------------------------------------- parquet


class RawParquet:
    """A parquet file of any columns. Attributes: path, columns, num_rows."""

    is_text = False
    share_read = 1.0
    packed = None

    def __init__(self, path):
        self.path = path
        with self._readable(), parquet_file(path) as file:
            schema = file.schema_arrow
            self.columns, self.num_rows = schema.names, file.metadata.num_rows
            self.types = dict(zip(schema.names, schema.types))
            self.groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if len(set(self.columns)) < len(self.columns):
            raise UserError(f"{path} has several columns of one name: {shorten(self.columns)}")

    @contextmanager
    def _readable(self):
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(f"{self.path} is not a readable parquet file ({first_line(error)}); it may be cut short or "
                            "damaged: get it again") from None

    def check_columns(self, wanted):
        check_columns(self.path, self.columns, wanted)

    def blocks(self, columns=None, groups=None):
        """Yield Blocks of the wanted columns; groups: numbers of the row groups to read, default all."""
        row = sum(self.groups[: groups[0]]) if groups else 0
        with self._readable(), parquet_file(self.path) as file:
            batches = file.iter_batches(BLOCK_ROWS, groups, columns)
            while True:
                with self._readable():
                    batch = next(batches, None)
                if batch is None:
                    break
                yield Block(row, batch.num_rows, batch)
                row += batch.num_rows

    def table(self, block, types, problem):
        return pa.Table.from_batches([block.data]).select(list(types))

    def check_lines(self, block, problem):
        pass

    def bad_value(self, block, error):
        return UserError(f"{self.path}, row {block.place + error.row} (counted from 0): {error.column} is "
                         f"{error.value}, expected {error.expected}")
