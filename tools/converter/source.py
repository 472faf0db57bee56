"""The raw files of a conversion, and how many rows they have, after one quick look at all line ends."""

from collections import namedtuple

import numpy as np

from tools.converter import raw as raw_files
from tools.converter.progress import Progress
from tools.converter.values import LABELS
from tools.trainer.cli import UserError

Part = namedtuple("Part", "raw split first_row rows blocks")
Part.__doc__ = """One file. raw: RawText or RawParquet; split: index into SPLITS, or None; first_row: number of its
first row over all inputs; rows: how many it has; blocks: what the engine found them to be in (Spark), or None."""


class Source:
    """Attributes: parts (list of Part), num_rows (all rows), labels (int8 of all rows where they were asked for)."""

    def __init__(self, engine, files, wanted, labels_of=None, may_be_empty=False):
        """engine: counts the rows. files: list of (raw, split or None). wanted: raw columns that every file must have.

        labels_of: None, or a function that says what is wrong with a line's cells; with it the first character of every
        line is kept as its label. may_be_empty: whether files without rows, such as those of an hour without any, pass.
        """
        self.parts, self.num_rows = [], 0
        for raw, _ in files:
            raw.check_columns(wanted)
        counted = engine.count([raw for raw, _ in files], labels_of)
        for (raw, split), (rows, _, blocks) in zip(files, counted):
            if not rows and not may_be_empty:
                raise UserError(f"{raw.path} has a header but no rows" if raw.is_text else f"{raw.path} has no rows")
            self.parts.append(Part(raw, split, self.num_rows, rows, blocks))
            self.num_rows += rows
        self.labels = np.concatenate([labels for _, labels, _ in counted]) if labels_of else None

    def rows_of_splits(self, num_splits):
        """Rows of each split where every file belongs to one; rows of all files where rows are dealt out later."""
        counts = [0] * num_splits
        for part in self.parts:
            for split in range(num_splits) if part.split is None else [part.split]:
                counts[split] += part.rows
        return counts

    def bytes_per_row(self):
        """Size of a raw row on disk, about, unpacked."""
        size = sum(part.raw.path.stat().st_size * (5 if part.raw.packed or not part.raw.is_text else 1)
                   for part in self.parts)
        return size // max(1, self.num_rows)


def count_rows(raw, labels_of):
    """(rows of a file, their labels or None, None), by reading it here."""
    if not raw.is_text:
        return raw.num_rows, None, None
    labels = []
    with Progress(f"counting {raw.path.name}") as progress:
        for block in raw.blocks():
            if labels_of:
                labels.append(first_characters(raw, block, labels_of))
            progress.update(block.rows, raw.share_read)
    return progress.done, np.concatenate(labels) if labels else None, None


LABEL_OF = np.full(256, 2, np.int8)  # by the first byte of a label; 2: it is none
LABEL_OF[[ord(text[0]) for text in LABELS]] = list(LABELS.values())


def first_characters(raw, block, problem):
    """The label of every line, which its first character tells: int8 (rows).

    problem: what is wrong with a line's cells; None: labels that are not 0 or 1 are returned as 2.
    """
    data = np.frombuffer(block.data, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    labels = LABEL_OF[data[np.concatenate([[0], ends[:-1] + 1])]]
    if problem and (labels > 1).any():
        raw.check_lines(block, problem)
    return labels


def open_files(paths, form):
    """[RawText or RawParquet] of all data files of some inputs (files or folders)."""
    return [raw_files.open_raw(file, form) for path in paths for file in raw_files.list_files(path)]
