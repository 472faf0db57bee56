"""Many machines: Spark deals blocks of rows to its workers, adds up the counts and sorts the rows.

Blocks are read, encoded and written by the functions that the arrow engine uses, so that both give the same rows. The
driver sees how many rows each block has, the tokens of the vocabularies, and (where a rule deals rows by label) one
byte per row; workers do the rest: they also count the lines, and unpack .gz and .zst files, one worker a file, into the
scratch folder.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.converter import raw as raw_files
from tools.converter.progress import Progress
from tools.converter.raw import Block
from tools.converter.source import first_characters
from tools.converter.splits import TRAIN, ByFile, ByFold
from tools.converter.spool import shuffle_keys
from tools.converter.vocabulary import NO_TEXTS, RARE_TOKENS, is_long, text_order, texts_of
from tools.converter.writer import SplitWriter, plan_files, rows_digest
from tools.trainer.cli import UserError, first_line
from tools.trainer.dataset_info import SPLITS

MAX_TASKS = 20_000  # of a stage
BLOCKS_PER_PARTITION = 16  # of what is sorted or added up: about 128 MB of raw text
# log4j2's settings; without an appender Spark would put its own settings in place of these
NO_LOG = """
appender.none.type = Null
appender.none.name = none
rootLogger.level = off
rootLogger.appenderRef.none.ref = none
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = off
"""
CARRIED_TYPES = {"string": "string", "large_string": "string", "bool": "boolean", "int8": "tinyint",
                 "int16": "smallint", "int32": "int", "int64": "bigint", "float": "float", "double": "double",
                 "date32[day]": "date"}
COUNTS = "field int, token long, ord long, count long, text string"

Place = namedtuple("Place", "part number rows first_row begin size firsts")
Place.__doc__ = """Where a worker finds a block. part: index into the source's parts; number: of the first line, or of
the row group; first_row: over all inputs; begin, size: bytes in the unpacked file; firsts: rows of each split before
it."""


def is_master(text):
    return bool(re.fullmatch(r"local(\[.+\])?|yarn|(spark|k8s|mesos)://.+", text))


class SparkEngine:
    """See the head of this file. args: options; scratch: folder for temporary files, which all machines must see."""

    def __init__(self, args, scratch):
        self.args, self.scratch, self.spark = args, scratch, None

    def __enter__(self):
        with signals_held(), contextlib.ExitStack() as stack:
            local_dir = stack.enter_context(path_without_comma(self.scratch / "spark"))
            self.spark = start_spark(self.args, self.scratch, local_dir)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, _):
        with contextlib.suppress(Exception):  # it may have gone already, which is not what to report
            self.spark.stop()
        self.stack.close()
        # Py4JJavaError, PythonException, ...: a worker's error comes as the text of a traceback
        if isinstance(error, Exception) and type(error).__module__.split(".")[0] in ("py4j", "pyspark"):
            raise worker_error(error) from None

    def count(self, raws, labels_of):
        """Per file (rows, labels or None, list of (offset, size, rows)); see Source."""
        tasks = [task for number, raw in enumerate(raws) for task in count_tasks(number, raw, self.scratch)]
        with Progress("counting rows") as progress:
            found = self._map(tasks, count_piece, self._broadcast((raws, bool(labels_of))))
            counted = []
            for number, raw in enumerate(raws):
                blocks = [block for result in found for block in result if block[0] == number]
                labels = None
                if labels_of and blocks:
                    labels = np.concatenate([block[4] for block in blocks])
                    self._check_labels(raw, unpacked_path(number, raw, self.scratch), blocks, labels_of)
                counted.append((sum(block[3] for block in blocks), labels, [block[1:4] for block in blocks]))
                progress.update(counted[-1][0])
        return counted

    @staticmethod
    def _check_labels(raw, path, blocks, problem):
        """Raise the error of the first block with a label that is not 0 or 1; only here line numbers are known."""
        line = 2 if raw.has_header else 1
        for _, begin, size, rows, labels in blocks:
            if (labels > 1).any():
                block = next(blocks_of([(raw, path, None)], Place(0, line, rows, 0, begin, size, None)))[1]
                raw.check_lines(block, problem)
            line += rows

    def convert(self, job):
        """Make the shards of all splits. Returns ({split: rows}, {split: digest of its rows})."""
        places, num_rows = self._places(job)
        job.check_splits(num_rows)
        partitions = max(self.spark.sparkContext.defaultParallelism, -(-len(places) // BLOCKS_PER_PARTITION))
        self.spark.conf.set("spark.sql.shuffle.partitions", partitions)
        if job.counted_fields():
            job.fit(self._counts(job, places))
        job.write_vocabularies()
        encoded = self._encoded(job, places)
        tasks = file_tasks(encoded, num_rows)
        with self._progress("writing", job.source.num_rows):
            shards = self._broadcast((job.folder, job.id_columns(), job.id_dtype(), job.carried_schema))
            digests = self._map(tasks, write_file, shards)
        return num_rows, {split: rows_digest([digest for digest, task in zip(digests, tasks) if task[0] == split])
                          for split in SPLITS}

    def encode(self, job, unknown):
        """Write the ids of all rows in the order of the input, as `convert` for one split; adds to unknown (fields)."""
        places, _ = self._places(job)
        files, start = [], 0
        for name, sizes in plan_files(job.source.num_rows):
            inside = [place for place in places if place.first_row < start + sum(sizes)
                      and place.first_row + place.rows > start]
            files.append((name, sizes, start, inside))
            start += sum(sizes)
        with self._progress("encoding", start):
            shared = self._broadcast((parts_of(job), job.maker, job.folder, job.id_columns(), job.id_dtype(),
                                      job.carried_schema))
            done = self._map(files, encode_file, shared)
        unknown += np.sum([counts for _, counts in done], axis=0)
        return {"rows": start}, {"rows": rows_digest([digest for digest, _ in done])}

    # ---------------------------------------------------------------------------------------------------------- stages

    def _map(self, tasks, work, shared):
        """[work(task, value of a broadcast)] for a list of tasks."""
        context = self.spark.sparkContext
        tasks = context.parallelize(tasks, min(len(tasks), MAX_TASKS))
        return tasks.map(lambda task: work(task, shared.value)).collect()

    def _broadcast(self, value):
        return self.spark.sparkContext.broadcast(value)

    def _progress(self, what, rows):
        return spark_progress(self.spark, what, rows)

    def _places(self, job):
        """(list of Place, {split: rows}) of all blocks in order."""
        blocks = [(number, block) for number, part in enumerate(job.source.parts) for block in part.blocks]
        places, row, line, last = [], 0, 0, None
        for number, (begin, size, rows) in blocks:
            raw = job.source.parts[number].raw
            if number != last:
                line, last = 2 if raw.is_text and raw.has_header else 1, number
            places.append(Place(number, line if raw.is_text else begin, rows, row, begin, size, None))
            row += rows
            line += rows
        counts = self._split_counts(job, places)
        firsts = np.cumsum([np.zeros(len(SPLITS), np.int64), *counts], axis=0)
        places = [place._replace(firsts=before) for place, before in zip(places, firsts)]
        return places, dict(zip(SPLITS, firsts[-1].tolist()))

    def _split_counts(self, job, places):
        """Rows of each split in each block: list of int64 (splits)."""
        rule, none = job.maker.rule, np.zeros(len(SPLITS), np.int64)
        if isinstance(rule, ByFile):
            return [np.bincount([job.source.parts[place.part].split], [place.rows], len(SPLITS)).astype(np.int64)
                    for place in places]
        if isinstance(rule, ByFold):
            return [np.bincount(rule.all[place.first_row : place.first_row + place.rows], minlength=len(SPLITS))
                    for place in places]
        with self._progress("splitting", job.source.num_rows):
            found = self._map(places, split_place, self._broadcast((parts_of(job), job.maker)))
            return [counts + none for counts in found]

    def _counts(self, job, places):
        """Yield per counted field (tokens, counts, texts), as TokenCounter.results does."""
        from pyspark.sql import Window
        from pyspark.sql import functions as F

        fields = job.counted_fields()
        blocks = self.spark.range(0, len(places), 1, numPartitions=min(len(places), MAX_TASKS))
        shared = self._broadcast((parts_of(job), job.maker, places))
        counted = blocks.mapInArrow(count_places(shared), COUNTS)
        if job.base is not None:
            counted = counted.unionByName(self._base_counts(fields))
        counted = counted.groupBy("field", "token", "ord")
        counted = counted.agg(F.sum("count").alias("count"), F.max("text").alias("text"))
        with self._progress("counting tokens", job.source.num_rows):
            thresholds = F.array(*[F.lit(field.min_count) for field in fields])
            counted = counted.withColumn("frequent", F.col("count") >= thresholds[F.col("field")])
            order = Window.partitionBy("field", "frequent").orderBy(F.col("count").desc(), "ord")
            counted = counted.withColumn("rank", F.row_number().over(order))
            counted = counted.filter(F.col("frequent") | (F.col("rank") <= RARE_TOKENS))
            counted.drop("frequent", "rank", "ord").write.partitionBy("field").parquet(str(self.scratch / "counts"))
        return (self._field_counts(number, field) for number, field in enumerate(fields))

    def read(self, path):
        """DataFrame of parquet files in the scratch folder, whose path is no pattern."""
        return self.spark.read.parquet(re.sub(r"([\\*?\[\]{}])", r"\\\1", str(path)))

    def _base_counts(self, fields):
        """DataFrame of what the dataset that is to grow has counted."""
        path = self.scratch / "base.parquet"
        tables = [count_table(number, *field.count_old()) for number, field in enumerate(fields)]
        pq.write_table(pa.concat_tables(tables), path)
        return self.read(path)

    def _field_counts(self, number, field):
        folder = self.scratch / "counts" / f"field={number}"
        tables = [pq.read_table(path) for path in parquet_files(folder)] if folder.is_dir() else []
        if not tables:
            return np.empty(0, field.dtype), np.empty(0, np.int64), NO_TEXTS
        table = pa.concat_tables(tables).combine_chunks()
        tokens = table["token"].to_numpy()
        tokens = tokens.view(np.uint64) if field.dtype == np.uint64 else tokens.astype(field.dtype)
        long = is_long(tokens) if field.dtype == np.uint64 else np.zeros(len(tokens), bool)
        texts = (tokens[long], table["text"].combine_chunks().filter(pa.array(long))) if long.any() else NO_TEXTS
        return tokens, table["count"].to_numpy(), texts

    def _encoded(self, job, places):
        """Encode and sort all rows; returns the folder of the sorted ones."""
        names, kinds = [f"id{i}" for i in range(len(job.id_columns()))], []
        for field in job.carried_schema or ():
            if str(field.type) not in CARRIED_TYPES:
                raise UserError(f"--keep: column {field.name} is of type {field.type}, which --engine spark does not "
                                "carry; use --engine arrow, or make it text")
            kinds.append(f"carried{len(kinds)} {CARRIED_TYPES[str(field.type)]}")
        schema = ", ".join(["split int", "key long", "label int", *(f"{name} int" for name in names), *kinds])
        blocks = self.spark.range(0, len(places), 1, numPartitions=min(len(places), MAX_TASKS))
        shared = self._broadcast((parts_of(job), job.maker, places, job.seed, job.carried_schema))
        rows = job.source.num_rows
        with self._progress("encoding", rows):
            # sorting looks at its input twice
            blocks.mapInArrow(encode_places(shared), schema).write.parquet(str(self.scratch / "encoded"))
        with self._progress("sorting", rows):
            encoded = self.read(self.scratch / "encoded")
            encoded.orderBy("split", "key").drop("split", "key").write.parquet(str(self.scratch / "sorted"))
        return self.scratch / "sorted"


# ------------------------------------------------------------------------------------------------------- starting Spark


@contextlib.contextmanager
def signals_held():
    """Context manager: Ctrl-C and SIGTERM wait for its end, and find the handlers that were there before it.

    A start of Spark that is broken off leaves a Java process that waits for ever; and Spark's own handler of Ctrl-C,
    which it sets when it starts, ends in a traceback.
    """
    came = []
    handlers = {n: signal.signal(n, lambda *which: came.append(which)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        handlers[came[0][0]](*came[0])


@contextlib.contextmanager
def path_without_comma(folder):
    """Context manager: the folder's path, or a link to it where Spark would take it for several ones."""
    if "," not in str(folder):
        yield folder
        return
    folder.mkdir()
    with tempfile.TemporaryDirectory(prefix="spark-") as place:
        link = Path(place) / "link"
        link.symlink_to(folder.absolute())
        yield link


def start_spark(args, scratch, local_dir):
    home = os.environ.get("JAVA_HOME")
    if not shutil.which(os.path.join(home, "bin", "java") if home else "java"):
        where = f"in JAVA_HOME {home}" if home else "here"
        raise UserError(f"--engine spark needs Java (8, 11 or 17), which is not {where}; install it or use --engine "
                        "arrow")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if args.spark_master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # no look-up of the machine's name
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError(f"--engine spark needs PySpark ({first_line(error)}); run `bash tools/setup_env.sh spark`, or "
                        "use --engine arrow") from None
    logging.disable()  # on Ctrl-C py4j logs a traceback
    log_settings = scratch / "log4j2.properties"
    log_settings.write_text(NO_LOG)  # errors are reported by worker_error
    builder = SparkSession.builder.master(args.spark_master).appName("converter")
    settings = {
        "spark.driver.memory": f"{int(args.memory_gb * 1024)}m",
        "spark.driver.maxResultSize": "0",
        "spark.local.dir": str(local_dir),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={log_settings.absolute().as_uri()}",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    try:
        spark = builder.getOrCreate()
    except Exception as error:  # no Java that works, a master that is not there, ...
        raise worker_error(error) from None
    spark.sparkContext.addPyFile(str(packed_modules(scratch)))
    return spark


def packed_modules(scratch):
    """A zip file of the modules that workers need."""
    root = Path(__file__).resolve().parents[2]
    path = scratch / "converter_modules.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for folder in ("tools", "tools/converter", "tools/trainer"):
            for name in sorted(os.listdir(root / folder)):
                if name.endswith(".py") and (folder != "tools" or name == "__init__.py"):
                    archive.write(root / folder / name, f"{folder}/{name}")
    return path


@contextlib.contextmanager
def spark_progress(spark, what, num_rows):
    """Context manager: Progress of the Spark jobs in it, by the share of their tasks that are done."""
    spark.sparkContext.setJobGroup(what, what)
    tracker, ended = spark.sparkContext.statusTracker(), threading.Event()

    def watch():
        with contextlib.suppress(Exception):  # Spark has gone
            while not ended.wait(1):
                done = int(num_rows * share_of_tasks(tracker, what))
                progress.update(max(0, done - progress.done))

    with Progress(what, num_rows) as progress:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(10)
        progress.update(num_rows - progress.done)


def share_of_tasks(tracker, group):
    """Share of the tasks of a job group, as far as Spark has planned them, that are done."""
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
    stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
    tasks = sum(stage.numTasks for stage in stages if stage)
    return sum(stage.numCompletedTasks for stage in stages if stage) / max(1, tasks)


def worker_error(error):
    """The one line worth showing of an error that Spark passed on."""
    text = str(error)
    known = re.findall(r"UserError: (.+)", text)
    if known:
        return UserError(known[0].strip())
    if "No space left on device" in text:
        return OSError(errno.ENOSPC, "No space left on device")
    causes = re.findall(r"^(?:Caused by: .+|: .+|\w*(?:Error|Exception): .+)", text, re.MULTILINE)
    cause = causes[-1].lstrip(": ") if causes else first_line(error)
    return UserError(f"Spark failed: {cause}; check Java and --spark_master, or use --engine arrow")


# --------------------------------------------------------------------------------------------- what the workers work on


def parts_of(job):
    """[(raw, path of its unpacked bytes, split)] for the workers."""
    return [(part.raw, unpacked_path(number, part.raw, job.scratch), part.split)
            for number, part in enumerate(job.source.parts)]


def unpacked_path(number, raw, scratch):
    return scratch / f"raw-{number}.txt" if raw.packed else raw.path.absolute()


def count_tasks(number, raw, scratch):
    """[(file number, path, begin, end)]: what workers look at to count rows; a packed or parquet file is one task."""
    path = unpacked_path(number, raw, scratch)
    if not raw.is_text or raw.packed:
        return [(number, path, 0, 0)]
    size = raw.path.stat().st_size
    begins = range(raw.start, max(size, raw.start + 1), raw_files.BLOCK_BYTES)
    return [(number, path, begin, min(begin + raw_files.BLOCK_BYTES, size)) for begin in begins]


def count_piece(task, shared):
    """[(file number, begin, size, rows, labels or None)] of the blocks in a piece of a file."""
    number, path, begin, end = task
    raws, labelled = shared
    raw = raws[number]
    if not raw.is_text:
        return [(number, group, 0, rows, None) for group, rows in enumerate(raw.groups) if rows]
    if not raw.packed:
        begin, data = raw.piece(path, begin, end)
        return [_counted(number, raw, begin, data, labelled)] if data else []
    blocks, offset = [], 0
    with open(path, "wb") as file:
        for _, data in raw.pieces(raw_files.BLOCK_BYTES):
            file.write(data)
            blocks.append(_counted(number, raw, offset, data, labelled))
            offset += len(data)
    return blocks


def _counted(number, raw, begin, data, labelled):
    rows = data.count(b"\n")
    labels = first_characters(raw, Block(0, rows, data), None) if labelled else None
    return number, begin, len(data), rows, labels


def blocks_of(parts, place):
    """Yield (raw, Block, number of its first row, split) of a Place."""
    raw, path, split = parts[place.part]
    if raw.is_text:
        with path.open("rb") as file:
            file.seek(place.begin)
            data = file.read(place.size)
        if not data.endswith(b"\n"):
            data += b"\n"
        yield raw, Block(place.number, place.rows, data), place.first_row, split
        return
    row = place.first_row
    for block in raw.blocks(None, [place.number]):
        yield raw, block, row, split
        row += block.rows


def split_place(place, shared):
    parts, maker = shared
    return sum(maker.count_splits(*block) for block in blocks_of(parts, place))


def count_places(shared):
    """Function for mapInArrow: numbers of blocks -> counts of the tokens of their train rows."""

    def work(batches):
        parts, maker, places = shared.value
        for batch in batches:
            for number in batch.column(0).to_pylist():
                for block in blocks_of(parts, places[number]):
                    for field, counted in enumerate(maker.make(*block).counted or ()):
                        yield from count_table(field, *counted).to_batches()

    return work


def count_table(field, tokens, counts, texts):
    """Table of COUNTS."""
    if tokens.dtype == np.uint64:
        # as signed numbers in the order of unsigned ones
        order = (text_order(tokens) ^ np.uint64(1 << 63)).view(np.int64)
        shown = texts_of(np.where(is_long(tokens), tokens, np.uint64(0)), texts or NO_TEXTS)
        shown = pa.compute.if_else(pa.array(is_long(tokens)), shown, pa.scalar(None, pa.string()))
        tokens = tokens.view(np.int64)
    else:
        order = tokens = tokens.astype(np.int64)
        shown = pa.nulls(len(tokens), pa.string())
    return pa.table({"field": pa.array(np.full(len(tokens), field, np.int32)), "token": tokens, "ord": order,
                     "count": counts.astype(np.int64), "text": shown})


def encode_places(shared):
    """Function for mapInArrow: numbers of blocks -> (split, sort key, label, local ids, carried columns)."""

    def work(batches):
        parts, maker, places, seed, schema = shared.value
        for batch in batches:
            for number in batch.column(0).to_pylist():
                before = places[number].firsts.copy()
                for block in blocks_of(parts, places[number]):
                    made = maker.make(*block)
                    yield encoded_batch(maker, made, before, seed, schema)
                    before += np.bincount(np.broadcast_to(made.splits, len(made.rows)), minlength=len(SPLITS))

    return work


def encoded_batch(maker, made, before, seed, schema):
    splits = np.broadcast_to(made.splits, len(made.rows)).astype(np.int32)
    keys = np.empty(len(splits), np.int64)
    for split in range(len(SPLITS)):
        members = splits == split
        numbers = before[split] + np.arange(np.count_nonzero(members))
        keys[members] = shuffle_keys(numbers, seed) if split == TRAIN else numbers
    labels, ids = maker.unpack(made.rows)
    arrays = [splits, keys, labels.astype(np.int32), *(column.astype(np.int32) for column in ids)]
    arrays = [pa.array(array) for array in arrays]
    names = ["split", "key", "label", *(f"id{i}" for i in range(len(ids)))]
    if schema is not None:
        carried = made.carried.cast(pa.schema([(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type)
                                               for f in schema])).combine_chunks()
        arrays += [column.chunk(0) for column in carried.columns]
        names += [f"carried{i}" for i in range(len(schema))]
    return pa.RecordBatch.from_arrays(arrays, names)


def parquet_files(folder):
    return sorted(folder / name for name in os.listdir(folder) if name.startswith("part-"))


def file_tasks(folder, num_rows):
    """How to write each file of the dataset out of the sorted rows, which lie in folder in the order of the splits.

    Returns a list of (split, file name, row group sizes, list of (path, first row, rows) to read).
    """
    parts = [(path, pq.ParquetFile(path).metadata.num_rows) for path in parquet_files(folder)]
    starts = np.cumsum([0] + [rows for _, rows in parts])
    if starts[-1] != sum(num_rows.values()):
        raise UserError(f"{starts[-1]} rows after sorting, expected {sum(num_rows.values())}; did the input change?")
    start, tasks = 0, []
    for split in SPLITS:
        for name, sizes in plan_files(num_rows[split]):
            end = start + sum(sizes)
            pieces = []
            for (path, rows), first in zip(parts, starts):
                begin, stop = max(start, first), min(end, first + rows)
                if begin < stop:
                    pieces.append((path, int(begin - first), int(stop - begin)))
            tasks.append((split, name, sizes, pieces))
            start = end
    return tasks


def write_file(task, shared):
    """Write one file of the dataset; returns its digest."""
    split, name, sizes, pieces = task
    folder, columns, dtype, schema = shared
    with SplitWriter(folder / split, columns, dtype, None, carried=schema, files=[(name, sizes)]) as writer:
        for path, skip, count in pieces:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1 << 16):
                wanted = batch.slice(min(skip, len(batch)), count)
                skip = max(0, skip - len(batch))
                count -= len(wanted)
                label, *ids = (column.to_numpy() for column in wanted.columns[: 1 + len(columns)])
                carried = None
                if schema is not None:
                    carried = pa.Table.from_arrays(wanted.columns[1 + len(columns):], names=schema.names)
                writer.write(label, ids, carried)
    return writer.digests[0]


def encode_file(task, shared):
    """Write one file of encoded rows; returns (its digest, unknown values per field)."""
    name, sizes, start, places = task
    parts, maker, folder, columns, dtype, schema = shared
    labelled, end = maker.label in parts[0][0].columns, start + sum(sizes)
    unknown = np.zeros(len(maker.fields), np.int64)
    with SplitWriter(folder, columns, dtype, None, labelled, schema, [(name, sizes)]) as writer:
        for place in places:
            for raw, block, row, _ in blocks_of(parts, place):
                first, last = max(0, start - row), min(block.rows, end - row)
                if first < last:
                    writer.write(*maker.encode(raw, block, unknown, first, last))
    return writer.digests[0], unknown
