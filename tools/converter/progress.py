"""Progress of long work: a bar on a terminal, else a line now and then."""

import sys
import time

LOG_SECONDS = 10


class Progress:
    """Progress of long work in rows: a bar on a terminal, else a line every LOG_SECONDS.

    total: rows to come; None when it is not known, then update() is told the share of the work that is done.
    """

    def __init__(self, what, total=None):
        self.what, self.total, self.done = what, total, 0
        self.start = self.logged = time.monotonic()
        self.bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what, unit="row", unit_scale=True)

    def update(self, rows, share=None):
        self.done += rows
        total = self.total or (round(self.done / share) if share else None)
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(rows)
        elif time.monotonic() - self.logged >= LOG_SECONDS:
            self.logged = time.monotonic()
            rate = self.done / (self.logged - self.start)
            left = f", {(total - self.done) / rate:.0f} s left" if total and rate else ""
            of = f" of {self.total}" if self.total else ""
            print(f"{self.what}: {self.done} rows{of}{left}, {rate:.0f} rows/s", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        seconds = max(time.monotonic() - self.start, 1e-9)
        if self.bar is not None:
            self.bar.close()
        if kind is None:
            print(f"{self.what}: {self.done} rows, {self.done / seconds:.0f} rows/s, {seconds:.1f} s", flush=True)
