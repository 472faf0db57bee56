"""A model on the rows of a dataset that grew out of the one it was trained on."""

import os

import numpy as np

from tools.converter.encoders import Encoder
from tools.converter.info import check_growth, row_map
from tools.trainer.checkpoints import ENCODER, check_encoder, find_folder, read_checkpoint
from tools.trainer.cli import UserError
from tools.trainer.dataset_info import read_info
from tools.trainer.tables import Growth


def growth_of(folder, data_dir, new_rows):
    """How the rows of a checkpoint's tables move to the tables of DATA_DIR: a Growth.

    new_rows: how rows of new tokens begin: "oov" as the out-of-vocabulary row of their field, "normal" as in a new
    table. Raises: UserError where the dataset did not grow out of the checkpoint's.
    """
    encoder = Encoder.load(data_dir)
    check_encoder(folder, read_checkpoint(folder))
    old = read_info(os.path.join(find_folder(folder), ENCODER))
    try:
        check_growth(old, encoder)
    except UserError as error:
        raise UserError(f"{folder} was trained on other data than --data_dir {data_dir}: {error}") from None
    places = row_map(old, encoder.info)
    new_ids, origins = [], []
    for before, after in zip(old["fields"], encoder.info["fields"]) if new_rows == "oov" else ():
        oov = before["encoding"]["oov"]
        if oov is not None:  # new tokens take the ids from the old out-of-vocabulary id on
            new = np.arange(oov, after["encoding"]["oov"]) + after["offset"]
            new_ids.append(new)
            origins.append(np.full(len(new), before["offset"] + oov))
    empty = [np.empty(0, np.int64)]
    return Growth(places, np.concatenate(new_ids or empty), np.concatenate(origins or empty))
