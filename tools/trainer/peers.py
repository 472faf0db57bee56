"""How the processes of a run end: together, within seconds, with one line to the user on each node.

Every process holds a connection to the first one. What is said on it: a full stop for a normal end, else the line why
the process ends; one that dies says nothing, and its system closes the connection. OneFlow by itself waits for a
process that died, up to 13 seconds or for ever, then prints a stack trace.
"""

import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import ExitStack, contextmanager, suppress

from tools.trainer.cli import (
    INTERRUPTED,
    TERMINATED,
    UserError,
    finish_in_peace,
    launch_number,
    one_line,
    os_error_text,
)
from tools.trainer.files import UNFINISHED
from tools.trainer.processes import barrier, from_rank0, rank, world_size
from tools.trainer.startup import LOST, filtered_stderr

PARTING = "."  # of a process that ends as it should
END = b"\0"  # of what is said
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}  # seconds, seconds, probes: 14 s for a lost node
PATIENCE = 5  # seconds in which a process that is not the first of its node lets that one speak
MOMENT = 0.2  # seconds in which the others hear what was said, before OneFlow notices that a process is gone
SPEAKING = threading.Lock()


class Peers:
    """The connections of this process: of the first one to all others, of each other one to the first."""

    def __init__(self):
        self.said, self.names = {}, {}  # {connection: bytes}, {connection: what its process is called}
        self.selector, self.parted = selectors.DefaultSelector(), threading.Semaphore(0)  # released by each PARTING
        self.server = socket.create_server(("", 0), backlog=world_size()) if rank() == 0 else None
        port, self.secret = from_rank0(lambda: (self.server.getsockname()[1], uuid.uuid4().hex))
        if self.server:
            self.selector.register(self.server, selectors.EVENT_READ)
        else:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=30)
            connection.sendall(f"{self.secret} {rank()} {socket.gethostname()}\n".encode())
            self.follow(connection, "the first process")
        threading.Thread(target=self.listen, daemon=True).start()

    def follow(self, connection, name):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.said[connection], self.names[connection] = b"", name
        self.selector.register(connection, selectors.EVENT_READ)

    def listen(self):
        """A thread: end this process when another one does."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.server:
                    self.accept()
                else:
                    self.hear(key.fileobj)

    def accept(self):
        """Let in a process of this run, nobody else."""
        connection, _ = self.server.accept()
        connection.settimeout(5)
        with suppress(OSError, ValueError):
            secret, process, host = connection.makefile("rb").readline(500).decode("ascii", "replace").split()
            if secret == self.secret:
                return self.follow(connection, f"process {int(process)} on {host}")
        connection.close()

    def hear(self, connection):
        try:
            heard = connection.recv(4096)
        except OSError:
            heard = b""
        self.said[connection] += heard
        if heard and not heard.endswith(END):
            return
        self.selector.unregister(connection)
        said = self.said[connection].rstrip(END).decode("utf-8", "replace")
        if said == PARTING:
            return self.parted.release()
        del self.said[connection]
        connection.close()
        # the second process speaks for the first one, which cannot
        give_up(said or f"error: {self.names[connection]} has ended, or cannot be reached; see its output, then "
                "continue with --resume", 1, speaks=is_first_of_node() or rank() == 1 and not said)

    def say(self, text):
        """Say a last word to the others."""
        for connection in list(self.said):
            with suppress(OSError):
                connection.sendall(text.encode("utf-8", "replace") + END)


ALL = []  # Peers of the run that is on


def run_together(work, advice):
    """Call work() in every process of a run; mistakes, signals and the end of another process end it in one line.

    advice: what to do after an interruption, said in the line.
    """
    finish_in_peace()
    with ending_on_signals(advice), ExitStack() as ending:
        try:
            if world_size() > 1:
                join(ending)
            work()
            if ALL:
                part()
        except UserError as error:
            give_up(f"error: {error}", 1)
        except OSError as error:
            give_up(f"error: {os_error_text(error)}", 1)
        except MemoryError as error:
            give_up(f"error: not enough memory for these sizes of model, tables and batch ({error})", 1)


def part():
    """The normal end of one process of several: when all have left OneFlow's barrier, which aborts when one is gone."""
    barrier()
    peers = ALL[0]
    if rank() != 0:
        peers.say(PARTING)
    for _ in list(peers.said):  # the first waits for all others, these wait for the first
        peers.parted.acquire(timeout=PATIENCE)
    if rank() == 0:
        peers.say(PARTING)
    sys.stdout.flush()
    os._exit(0)


def join(ending):
    """Tie this process to the others and to the launcher, until `ending` (an ExitStack) closes."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: when the launcher is gone
    python_stderr = sys.stderr  # progress bars are for a terminal, and are not lines
    sys.stderr = ending.enter_context(os.fdopen(os.dup(2), "w", buffering=1, errors=python_stderr.errors))
    ending.callback(setattr, sys, "stderr", python_stderr)
    ending.enter_context(filtered_stderr(LOST if is_first_of_node() or rank() == 1 else LOST.replace("p;", "")))
    try:
        ALL.append(Peers())
    except OSError as error:
        raise UserError(f"cannot reach the first process at {os.environ['MASTER_ADDR']} ({error})") from None


def is_first_of_node():
    return launch_number("LOCAL_RANK", 0) == 0


def give_up(message, status, speaks=None):
    """Say why in one line and end, without waiting for the collective calls of other processes.

    speaks: whether to say it to the user, by default what the first process of a node does; the others tell it, and
    wait until its end has ended their launcher.
    """
    speaks = is_first_of_node() if speaks is None else speaks
    with SPEAKING:  # another thread, or another process by way of it, may have the same to say
        output = 2
        if not speaks:  # what OneFlow says of the others' end is not wanted
            output = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for peers in ALL:
            peers.say(message)
            time.sleep(MOMENT)
        launcher, end = os.getppid(), time.monotonic() + PATIENCE
        while not speaks and os.getppid() == launcher and time.monotonic() < end:
            time.sleep(0.05)
        if speaks or os.getppid() == launcher:
            with suppress(OSError):  # perhaps nobody reads any more
                os.write(output, (one_line(message) + "\n").encode(sys.stderr.encoding or "ascii", sys.stderr.errors))
        for path in UNFINISHED:
            with suppress(OSError):
                os.remove(path)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)


@contextmanager
def ending_on_signals(advice):
    """Ctrl-C and SIGTERM end the process in one line, at once, whatever it is doing: nothing that it writes needs care.

    Python's own handlers would wait until OneFlow returns, which may be never. advice: what to do, said in the line.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    known = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait():
        number = os.read(reader, 1)
        if number:
            interrupted = number[0] == signal.SIGINT
            give_up("error: " + ("interrupted" if interrupted else "terminated") + advice,
                    INTERRUPTED if interrupted else TERMINATED)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in known.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)
