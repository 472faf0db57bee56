"""Growing a dataset: fields of the old one take over, so that their ids stay and new tokens go behind them."""

from tools.converter.encoders import Encoder, VocabularyField
from tools.converter.names import shard_names
from tools.trainer.cli import UserError


def load_base(folder, fields):
    """Encoder of the dataset that is to grow; its vocabularies and borders are put into `fields`. Raises: UserError"""
    base = Encoder.load(folder)
    adopt(base, fields, folder)
    return base


def adopt(base, fields, folder):
    """Give `fields` (made from options) what the dataset knows; they must describe the same encoding."""
    if [field.name for field in fields] != [field.name for field in base.fields]:
        raise UserError(f"--base {folder} has other fields; a dataset grows with the same fields in the same order")
    for field, old in zip(fields, base.fields):
        if not field.counted:
            same = field.identity() == old.identity()
        else:
            same = field.kind == old.kind and field.columns == old.columns and field.raw_column == old.raw_column
        if not same:
            raise UserError(f"--base {folder}: field {field.name} is encoded there as {old.kind}, {old.parameters()}, "
                            f"and would be here as {field.kind}; give the options that the dataset was made with")
        if isinstance(field, VocabularyField):
            old.read_rare(folder, base.info.get("files"))
            field.vocabulary, field.rare = old.vocabulary, old.rare
        elif field.counted:
            field.borders, field.num_bins = old.borders, old.num_bins


def fields_of(base, folder, min_counts):
    """Fields that continue those of a dataset (an Encoder); min_counts: {column or None: new threshold}, or None."""
    for field in base.fields:
        if isinstance(field, VocabularyField):
            field.read_rare(folder, base.info.get("files"))
            for name in (None, field.raw_column):
                field.min_count = (min_counts or {}).get(name, field.min_count)
    return base.fields


def carried_of(base, kept):
    """{name in the shards: raw column} to carry: what the dataset carried, or what --keep names."""
    if kept is None:
        return dict(base.info["raw"].get("carried") or {})
    lengths = {field.raw_column: len(field.columns) for field in base.fields if field.columns != [field.name]}
    return shard_names([field.raw_column for field in base.fields], lengths, kept)[1]
