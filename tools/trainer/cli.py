"""What every command line here shares: parser, types of arguments, signals, and the one error line.

Imports nothing beyond the standard library, so that a script can be interrupted quietly before its heavy imports.
"""

import argparse
import atexit
import codecs
import csv
import difflib
import errno
import io
import math
import os
import re
import signal
import sys
from contextlib import suppress

PRINTABLE = "deepfm-printable"  # name of the error handler of the standard streams
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

    def parse_known_args(self, args=None, namespace=None):
        """Before all other mistakes: a misspelt option would be missed as a required one, too."""
        words = sys.argv[1:] if args is None else list(args)
        near = {} if self._subparsers else self.misspelt(words)  # a subcommand has a parser of its own
        if near:
            self.error(f"unrecognized arguments: {' '.join(near)}; did you mean {', '.join(near.values())}?")
        namespace, rest = super().parse_known_args(words, namespace)
        for action in self._actions:  # of a variable in a script that is not set
            value = getattr(namespace, action.dest, None)
            if action.type is None and (value == "" or isinstance(value, list) and "" in value):
                self.error(f"{(action.option_strings or [action.dest])[0]} is empty; give a value"
                           + ", or leave it out" * (not action.required))
        return namespace, rest

    def misspelt(self, words):
        """{what looks like an option: the option that it is near to}"""
        words = words[:words.index("--")] if "--" in words else words
        names = [name for name in (word.partition("=")[0] for word in words)
                 if name.startswith("-") and name not in self._option_string_actions]
        near = {name: difflib.get_close_matches(name, self._option_string_actions, 1, 0.7) for name in names}
        return {name: found[0] for name, found in near.items() if found}

    def print_help(self, file=None):
        """A reader that has gone, or a full disk, is one line as in all output."""
        status = run_tool(lambda: argparse.ArgumentParser.print_help(self, file))
        if status:
            sys.exit(status)

    def error(self, message):
        if signal.getsignal(signal.SIGINT) is _end_early:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # its line is said; the end takes a while
        if launch_number("RANK", 0) == 0:
            with suppress(OSError):
                sys.stderr.write(f"error: {one_line(message)} (see --help)\n")
        sys.exit(2)


def raise_error(message):
    """What a parser does with a mistake where the process is not its own."""
    raise UserError(message)


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
    """An argparse type: 'a,b' -> ['a', 'b'], as a line of CSV: a name with a comma stands in quotes, '"a,b",c'.

    A column may have no name, as the index that pandas writes: '""', or nothing.
    """
    try:
        return next(csv.reader([text], strict=True)) or [""]
    except csv.Error:  # quotes that are part of a name
        return text.split(",")


def join_names(names):
    """The text of which name_list makes the names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(names)
    plain = ",".join(names)
    return plain if plain and name_list(plain) == list(names) else text.getvalue()


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
    names = [str(name) or '""' for name in names]
    return ", ".join(names if len(names) <= 6 else names[:3] + ["..."] + names[-2:]) + f" ({len(names)})"


def one_line(message):
    """A message whose names of files or columns may have line breaks, which become escapes."""
    return "".join(repr(letter)[1:-1] if letter.splitlines() == [""] else letter for letter in message)


def first_line(error):
    """What an exception says, in one line; the name of its class when it says nothing."""
    lines = str(error).strip().splitlines()
    return brief(lines[0], 200) if lines else type(error).__name__


def os_error_text(error, advice="free some, or choose another folder"):
    """One line for an OSError: which file, what is wrong, what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in NO_SPACE or "No space left on device" in str(error):
        return f"no space left on the disk{where}; {advice}"
    if error.errno == errno.EPIPE:
        return "nobody reads the output any more"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}: {error.strerror}; choose a folder that you may read and write"
    text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------- signals, error line


def _end_early(number, _):
    with suppress(OSError, UserError):
        if launch_number("LOCAL_RANK", 0) == 0:  # one voice is enough
            os.write(2, b"error: interrupted\n" if number == signal.SIGINT else b"error: terminated\n")
    os._exit(128 + number)  # there is nothing to clean up yet


def start_script():
    """Before a script's slow imports: let signals and missing packages end it in one line, and refuse what no launcher
    would set."""
    mend_streams()
    sys.excepthook = _say_missing_package
    signal.signal(signal.SIGINT, _end_early)
    signal.signal(signal.SIGTERM, _end_early)
    try:
        check_launch()
    except UserError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        sys.exit(2)


def _say_missing_package(kind, error, trace):
    """An excepthook: one line for a package that this Python has not, tracebacks for all else."""
    if kind is not ModuleNotFoundError or not error.name:
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0":  # one voice is enough
        package = error.name.split(".")[0]
        if package in ("onnx", "onnxruntime"):  # not in every environment
            advice = "run `bash tools/setup_env.sh onnx`, or install it"
        else:
            advice = "install it, or use .venv/bin/python of the environment that `bash tools/setup_env.sh` makes"
        print(f"error: {sys.executable} has no package {package}; {advice}", file=sys.stderr)


def mend_streams():
    """Put /dev/null where a standard stream is closed: a file that is opened later would take its place.

    What the terminal's encoding does not have is printed as the bytes of the path that it comes from, or as an escape.
    """
    codecs.register_error(PRINTABLE, bytes_or_escapes)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors=PRINTABLE)


def bytes_or_escapes(error):
    """Encoding that always works, for codecs.register_error."""
    text = error.object[error.start:error.end]
    with suppress(UnicodeEncodeError):
        return text.encode(error.encoding, "surrogateescape"), error.end
    return text.encode("ascii", "backslashreplace"), error.end


def check_launch():
    """Raise a UserError unless the launcher's variables fit together."""
    processes, process, port, _ = (launch_number(name, default) for name, default in (
        ("WORLD_SIZE", 1), ("RANK", 0), ("MASTER_PORT", 1), ("LOCAL_RANK", 0)))
    if process >= processes or not 0 < port < 2**16:
        raise UserError(f"the environment variables RANK {process}, WORLD_SIZE {processes} and MASTER_PORT {port} do "
                        "not fit together; unset them, or let a launcher set them")


def _interrupted(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C does not disturb the cleaning up
    raise KeyboardInterrupt


def _terminated(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)


def finish_in_peace():
    """Let the interpreter's own end, once the work is done, go on whatever signal comes."""
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    atexit.register(ignore)


def run_tool(work, ending="", full_disk="free some, or choose another folder"):
    """Call work() and return the exit code: its own, or 0. Mistakes, full disks, signals end in one line.

    ending: said after "interrupted", "; nothing was written to OUT" say; full_disk: advice when the disk is full.
    """
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _terminated)
    mend_streams()
    finish_in_peace()
    try:
        code = work()
        sys.stdout.flush()
        return code or 0
    except UserError as error:
        message, code = str(error), 1
    except OSError as error:
        message, code = os_error_text(error, full_disk), 1
    except UnicodeEncodeError as error:  # of Arrow, for a path
        message, code = f"{brief(error.object)} has bytes that are not UTF-8; use names without them", 1
    except MemoryError:
        message, code = "out of memory; use less data at a time, or a machine with more", 1
    except KeyboardInterrupt:
        message, code = f"interrupted{ending}", INTERRUPTED
    except SystemExit as error:
        message, code = f"terminated{ending}", error.code
    with suppress(OSError):
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    drop_output()
    return code


def drop_output():
    """Send what stdout cannot write to nowhere: Python would complain again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
