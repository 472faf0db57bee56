"""Growing a dataset: fields of the old one take over, so that their ids stay and new tokens go behind them."""

from tools.converter.encoders import Encoder, VocabularyField
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
            raise UserError(f"--base {folder}: field {field.name} is encoded there as {old.kind}, {old.parameters()}, and "
                            f"would be here as {field.kind}; give the options that the dataset was made with")
        if isinstance(field, VocabularyField):
            old.read_rare(folder)
            field.vocabulary, field.rare = old.vocabulary, old.rare
        elif field.counted:
            field.borders, field.num_bins = old.borders, old.num_bins
