"""Checksums in ONNX files: damage is noticed before ONNX Runtime reads them, which ends the process for some of it.

The last bytes of the file are an entry `crc32` of the model's metadata, the CRC-32 of all bytes before it. Whatever
reads ONNX reads that as any other entry. Where the numbers lie in a file of their own, an entry `data_crc32` before it
is the CRC-32 of that. Needs the standard library only.
"""

import os

from tools.trainer.cli import UserError
from tools.trainer.files import checksum
from tools.trainer.places import open_regular

ADVICE = "copy or export it again, or add --skip_checksums where that was meant"


def entry(key, value):
    """An entry of metadata_props as it stands in a ModelProto: field 14, with a key (1) and a value (2)."""
    pair = b"".join(tag + bytes([len(text)]) + text for tag, text in ((b"\x0a", key), (b"\x12", value)))
    return b"\x72" + bytes([len(pair)]) + pair


def crc_entry(key, value):
    return entry(key, b"%08x" % value)


LENGTH = len(crc_entry(b"crc32", 0))
DATA_LENGTH = len(crc_entry(b"data_crc32", 0))


def data_file(path):
    """Where the numbers of a model lie that are too large for its file."""
    return f"{path}.data"


def add_checksums(path):
    """Append them to a model that was just written."""
    with open(path, "ab") as file:
        if os.path.exists(data_file(path)):
            file.write(crc_entry(b"data_crc32", checksum(data_file(path))))
    value = checksum(path)
    with open(path, "ab") as file:
        file.write(crc_entry(b"crc32", value))


def check_checksums(path):
    """Raise a UserError unless a model is as it was written."""
    size = os.path.getsize(path)
    with open_regular(path) as file:
        file.seek(max(0, size - LENGTH - DATA_LENGTH))
        end = file.read()
    data_tail, tail = end[:-LENGTH], end[-LENGTH:]
    if not tail.startswith(crc_entry(b"crc32", 0)[:-8]):
        raise UserError(f"{path} has no checksum at its end: it was damaged, or is not what tools/export_onnx.py "
                        f"wrote; {ADVICE}")
    if tail != crc_entry(b"crc32", checksum(path, size - LENGTH)):
        raise UserError(f"{path} was changed or damaged since it was written; {ADVICE}")
    if data_tail.startswith(crc_entry(b"data_crc32", 0)[:-8]):
        check_data(data_file(path), data_tail)


def check_data(path, expected):
    try:
        same = crc_entry(b"data_crc32", checksum(path)) == expected
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it belongs to the model: {ADVICE}") from None
    if not same:
        raise UserError(f"{path} was changed or damaged since it was written; {ADVICE}")
