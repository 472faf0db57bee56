"""Names of columns in the shards: petastorm, which reads them, takes Python identifiers only."""

import keyword
import unicodedata

from tools.trainer.cli import UserError
from tools.trainer.dataset_info import LABEL, is_readable


def readable(name):
    """A name for the shards that is as close to the column's as can be: 'user-id' -> 'user_id', '2nd' -> 'c2nd'"""
    name = unicodedata.normalize("NFKC", name)
    name = "".join(letter if f"a{letter}".isidentifier() else "_" for letter in name).lstrip("_") or "column"
    name = name if name.isidentifier() else unicodedata.normalize("NFKC", f"c{name}")
    return f"{name}_" if keyword.iskeyword(name) or name == LABEL else name


def shard_names(columns, lengths, kept):
    """Names in the shards: ({column: name} of the fields, {name: column} of the carried ones).

    lengths: {column: number of its columns in the shards} of the lists. A carried column that is a feature as well gets
    raw_ before its name. Raises: UserError where two columns would have one name.
    """
    names = {column: readable(column) if not is_readable(column) or column == LABEL else column for column in columns}
    taken = {LABEL: LABEL}

    def take(name, column):
        if name in taken:
            raise UserError(f"columns {taken[name]!r} and {column!r} would both be called {name} in the dataset; "
                            "rename one of them in the input")
        taken[name] = column

    for column, name in names.items():
        for part in [name] if column not in lengths else [f"{name}_{i}" for i in range(lengths[column])]:
            take(part, column)
    carried = {}
    for column in kept:
        name = f"raw_{names[column]}" if column in names else column if is_readable(column) else readable(column)
        name = f"raw_{name}" if name == LABEL else name
        take(name, column)
        carried[name] = column
    return names, carried
