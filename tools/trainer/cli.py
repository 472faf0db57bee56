"""What every command line here shares: parser, types of arguments, signals, and the one error line.

Imports nothing beyond the standard library, so that a script can be interrupted quietly before its heavy imports.
"""

import argparse
import errno
import math
import os
import re
import signal
import sys
from contextlib import suppress

LARGEST = 2**31 - 1  # of a whole number for which no option says otherwise
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class UserError(Exception):
    """A mistake in arguments, data or files that the user can mend; its text is shown as one line, no traceback."""


# ---------------------------------------------------------------------------------------------------------- arguments


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written; defaults behind the help texts, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One line per mistake, from the first process only, and exit status 2. Options cannot be abbreviated."""

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        if signal.getsignal(signal.SIGINT) is _end_early:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # its line is said; the end takes a while
        if launch_number("RANK", 0) == 0:
            with suppress(OSError):
                sys.stderr.write(f"error: {message} (see --help)\n")
        sys.exit(2)


def number(kind, low=None, high=None, open_low=False):
    """An argparse type: a finite number with inclusive bounds (`open_low`: the lower one is excluded).

    kind: int, with LARGEST as the upper bound unless `high` is given, or float.
    """
    high = LARGEST if high is None and kind is int else high

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not finite")
        if low is not None and (value < low or open_low and value == low):
            raise argparse.ArgumentTypeError(f"{brief(text)} must be {'above' if open_low else 'at least'} {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{brief(text)} must be at most {high}")
        return value

    return convert


def int_list(text):
    """An argparse type: '1000,1000' -> [1000, 1000], each at least 1"""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{brief(text)!r} is not a comma-separated list of whole numbers") from None
    if min(values) < 1 or max(values) > LARGEST:
        raise argparse.ArgumentTypeError(f"{brief(text)!r} has a value below 1 or above {LARGEST}")
    return values


def float_list(length, low, high):
    """An argparse type: '0.9,0.999' -> [0.9, 0.999], so many numbers, each within the bounds."""
    convert = number(float, low, high)

    def convert_all(text):
        values = [convert(part) for part in text.split(",")]
        if len(values) != length:
            raise argparse.ArgumentTypeError(f"{brief(text)!r} has {len(values)} numbers, expected {length}")
        return values

    return convert_all


def name_list(text):
    """An argparse type: 'a,b' -> ['a', 'b']"""
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{brief(text)!r} is not a comma-separated list of names")
    return names


def boolean(text):
    """An argparse type: 'True' or 'False' (also 1, 0, yes, no)"""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not True or False")


def could_be_given(parser, name, value):
    """Whether a parser could have made a value of an option, which comes from a file."""
    action = parser._option_string_actions[f"--{name}"]
    if action.choices is not None:
        return value in list(action.choices)
    if action.type is None:
        return isinstance(value, bool)
    try:
        return action.type(",".join(map(str, value)) if isinstance(value, list) else str(value)) == value
    except argparse.ArgumentTypeError:
        return False


LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")  # OneFlow heeds them only all together


def is_launched():
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in LAUNCH_VARIABLES)


def launch_number(name, default):
    """A launcher's number for this process, `default` without a launcher. Raises: UserError"""
    text = os.environ.get(name, str(default)) if is_launched() else str(default)
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"the environment variable {name} is {brief(text)!r}, expected a whole number; unset it, or "
                        "let a launcher set it")
    return int(text)


# --------------------------------------------------------------------------------------------------------------- texts


def brief(value, length=60):
    """A value for a message, lists with commas, cut when it is long."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= length else text[:length - 3] + "..."


def shorten(names):
    """'I1, I2, I3, ..., C25, C26 (39)'"""
    names = [str(name) for name in names]
    return ", ".join(names if len(names) <= 6 else names[:3] + ["..."] + names[-2:]) + f" ({len(names)})"


def first_line(error):
    """What an exception says, in one line; the name of its class when it says nothing."""
    lines = str(error).strip().splitlines()
    return brief(lines[0], 200) if lines else type(error).__name__


def os_error_text(error, advice="free some, or choose another folder"):
    """One line for an OSError: which file, what is wrong, what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in NO_SPACE or "No space left on device" in str(error):
        return f"no space left on the disk{where}; {advice}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}: {error.strerror}; choose a folder that you may read and write"
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------- signals, error line


def _end_early(*_):
    if os.environ.get("LOCAL_RANK", "0") in ("-1", "0"):  # one voice is enough
        with suppress(OSError):
            os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)  # there is nothing to clean up yet


def start_script():
    """Before a script's slow imports: let Ctrl-C end it in one line, and refuse what no launcher would set."""
    signal.signal(signal.SIGINT, _end_early)
    try:
        for name in LAUNCH_VARIABLES[1:]:
            launch_number(name, 0)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _terminated(*_):
    raise SystemExit(TERMINATED)


def _prepare_streams():
    """Print to nowhere where the caller closed a stream, and names of files with any letters to any terminal."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the program
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def run_tool(work, ending="", full_disk="free some, or choose another folder"):
    """Call work() and return the exit code: its own, or 0. Mistakes, full disks, signals end in one line.

    ending: said after "interrupted", "; nothing was written to OUT" say; full_disk: advice when the disk is full.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminated)
    _prepare_streams()
    try:
        code = work()
        sys.stdout.flush()
        return code or 0
    except UserError as error:
        message, code = str(error), 1
    except BrokenPipeError:  # nobody reads the output any more; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        message, code = os_error_text(error, full_disk), 1
    except MemoryError:
        message, code = "out of memory; use less data at a time, or a machine with more", 1
    except KeyboardInterrupt:
        message, code = f"interrupted{ending}", INTERRUPTED
    except SystemExit as error:
        message, code = f"terminated{ending}", error.code
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code
