"""A run's scalars for TensorBoard, beside metrics.jsonl."""

import os
import time

from tools.trainer.files import list_folder
from tools.trainer.startup import environment_kept

with environment_kept():
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

NAME = "deepfm.out.tfevents."  # TensorBoard looks for "tfevents"; the rest is our mark


class Events:
    """A file of events in `folder`. A new run removes those of an earlier one, a resumed run adds one of its own."""

    def __init__(self, folder, resumed_step=None):
        if resumed_step is None:
            for name in list_folder(folder):
                if name.startswith(NAME):
                    os.remove(os.path.join(folder, name))
        # not SummaryWriter: its thread may still hold the last event when the process is killed
        self.writer = EventsWriter(os.path.join(folder, "deepfm"))
        if resumed_step is not None:  # TensorBoard then hides what earlier starts logged behind that step
            self.add(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step, scalars):
        """scalars: {tag: number}"""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self.add(step, summary=Summary(value=values))

    def add(self, step, **content):
        self.writer.write_event(Event(step=step, wall_time=time.time(), **content))
        self.writer.flush()

    def close(self):
        self.writer.close()
