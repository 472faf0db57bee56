"""Start OneFlow: the matrix library before it, a quiet import, and how a run schedules its threads.

Everything that needs OneFlow takes it from here, `from tools.trainer.startup import flow`, so that nobody imports it
unprepared. The import leaves environment, signal handlers, priorities and scheduling of the process as they were;
what belongs to a run is in `prepare_run`.
"""

import ctypes
import gc
import glob
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

from tools.trainer.cli import LAUNCH_VARIABLES, UserError, is_launched, launch_number

# what OneFlow says of a machine without a GPU or InfiniBand
HARMLESS = ("libibverbs not available, ibv_fork_init skipped",
            "CUDA driver version is insufficient for CUDA runtime version",
            "no CUDA-capable device is detected", "Failed to get cuda runtime version")
# a sed script: what OneFlow says when another process is gone becomes one line, and nothing comes behind that or behind
# our own last line (see peers.py)
LOST = r"""/^F[0-9]* .*\(ctrl_client\|rpc_client\|io_event_poller\|epoll_comm_network\|socket_[a-z]*_helper\)\.cpp/{
s/.*/error: another process has ended, or cannot be reached; see its output, then continue with --resume/;p;:a;n;ba
}
/^error: /{p;:b;n;bb
}"""
LAUNCHERS = set()  # ids of the threads that start graphs, see `put_launcher_first`
AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}


# --------------------------------------------------------------------------------------------- before and at the import


def preload_blas():
    """Put the OpenBLAS of SciPy's wheel before the older one inside OneFlow; return its name for the log, or None.

    OneFlow calls cblas_sgemm through the dynamic linker, so a library that is loaded first with global symbols serves
    its matrix products. SciPy's OpenBLAS has kernels for newer CPUs (AVX-512 among them), OneFlow's has not. It must
    happen before `import oneflow`. DEEPFM_BLAS=oneflow leaves OneFlow's own library in place.
    """
    spec = importlib.util.find_spec("scipy")
    if os.environ.get("DEEPFM_BLAS", "scipy") == "oneflow" or spec is None or not sys.platform.startswith("linux"):
        return None
    folder = glob.escape(os.path.join(os.path.dirname(os.path.dirname(spec.origin)), "scipy.libs"))
    quadmath, gfortran, openblas = (
        sorted(glob.glob(os.path.join(folder, f"lib{name}*.so*"))) for name in ("quadmath", "gfortran", "openblas"))
    if not openblas:
        return None
    try:
        with best_openblas_kernels():
            for path in quadmath + gfortran + openblas:
                library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        library.cblas_sgemm  # noqa: B018 - SciPy builds with renamed symbols would not replace OneFlow's: AttributeError
        library.openblas_get_corename.restype = ctypes.c_char_p
        return f"OpenBLAS {library.openblas_get_corename().decode()} (SciPy's)"
    except (OSError, AttributeError):
        return None


@contextmanager
def best_openblas_kernels():
    """Let an OpenBLAS that is loaded inside choose AVX-512 kernels where the CPU has them.

    By itself it falls back to AVX2 kernels on CPUs newer than itself; any CPU with these flags runs its AVX-512 ones.
    """
    flags = []
    with suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
    chosen = AVX512.issubset(flags) and "OPENBLAS_CORETYPE" not in os.environ
    if chosen:
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"
    try:
        yield
    finally:
        if chosen:
            del os.environ["OPENBLAS_CORETYPE"]


def wait_for_first_process(patience=60):
    """Let the first process listen before OneFlow calls it at import: after a call in vain it sleeps for 10 seconds.

    See rpc_client.cpp. Gives up after `patience` seconds, because OneFlow says more clearly who is missing.
    """
    if launch_number("RANK", 0) == 0:
        return
    address = os.environ["MASTER_ADDR"], launch_number("MASTER_PORT", 0)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(address, timeout=1):
            return
        time.sleep(0.05)


def machine_has_gpu():
    """Whether the machine shows an NVIDIA device, with or without a working driver."""
    names = os.listdir("/dev") if os.path.isdir("/dev") else []
    return "dxg" in names or any(name.startswith("nvidia") and name[6:].isdigit() for name in names)


def without_harmless_lines():
    """Leave out what OneFlow's libraries print to stderr of a machine without a GPU, see HARMLESS; all else passes."""
    # on one with a GPU they may be the reason why it is not used
    script = "" if machine_has_gpu() else "".join(f"/{line}/d\n" for line in HARMLESS)
    return filtered_stderr(script + LOST if is_launched() else script)


@contextmanager
def filtered_stderr(script):
    """Send what is written to stderr through a script of sed that prints lines by itself, and the rest as it is.

    The filter is a process of its own, so that the last words of a process that aborts are not lost.
    """
    if not script:
        yield
        return
    try:
        stderr = os.dup(2)
        filter_process = subprocess.Popen(["sed", "-u", "-n", f"{script}\np"], stdin=subprocess.PIPE, stdout=stderr,
                                          stderr=subprocess.DEVNULL, start_new_session=True)
    except OSError:  # no sed
        yield
        return
    os.dup2(filter_process.stdin.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        filter_process.stdin.close()
        filter_process.wait()


@contextmanager
def interrupts_held():
    """Let Ctrl-C wait for the end, and find the handler that was there before.

    OneFlow's library sets a handler of its own that ends the process at once, in whichever thread gets the signal.
    Threads that libraries start inside never get it.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def environment_kept():
    """Undo what an import inside does to the environment variables of this process."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in environment]:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def import_oneflow():
    """`import oneflow` without its side effects on this process: environment, messages."""
    with environment_kept():
        if not is_launched():
            for name in LAUNCH_VARIABLES:  # some of them are set for other programs
                os.environ.pop(name, None)
        with without_harmless_lines():
            import oneflow

            oneflow.cuda.is_available()  # looks for a driver, and says so, once
    return oneflow


THREAD = threading.get_ident()  # OneFlow computes in the thread that imports it only
wait_for_first_process()
with interrupts_held():
    BLAS = preload_blas()
    flow = import_oneflow()


# ------------------------------------------------------------------------------------------------------------ for a run


def check_thread():
    """Raise a UserError in a thread where OneFlow cannot compute."""
    if threading.get_ident() != THREAD:
        raise UserError("OneFlow computes in the thread that imported it only, the main one say; give it the rows of "
                        "other threads through a queue, or serve the model as ONNX (tools/export_onnx.py)")


def prepare_run(on_cpu):
    """Schedule this process's threads for a training or scoring run; not for a process that has other work too."""
    avoid_launch_race()
    prepare_graphs()
    if on_cpu:
        calm_scheduler()


def prepare_graphs():
    """What graphs need in any process, before the first one is compiled."""
    with without_harmless_lines():  # OneFlow looks for a driver again
        use_one_compute_thread()
    put_launcher_first()


def avoid_launch_race():
    """Schedule every thread as a batch thread, so that a thread that OneFlow wakes does not displace the waking one.

    OneFlow 0.8 and 0.9 start a graph (Push) before they queue it (EnqueueNNGraph, vm/lazy_job_instruction_policy.h).
    When the thread that does so is displaced in between and the graph is small, its end is taken off an empty queue:
    a segmentation fault now and then. No crash was seen in 20,000 calls of a tiny graph with this, one in a few
    thousand without. New threads inherit the policy.
    """
    if hasattr(os, "SCHED_BATCH"):
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):
                if thread not in LAUNCHERS:
                    os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))


def put_launcher_first():
    """Let the thread in which OneFlow starts graphs go before all others, where the system allows that (root).

    Then no other program displaces it either, see `avoid_launch_race`: on a machine with four times as many busy
    processes as cores, runs of 420 tiny steps crashed in most cases without this, and in none with it. The thread is
    made when the first graph is called, and has the policy of its maker; it works for microseconds a step. All
    processes of a run call this together.
    """
    class First(flow.nn.Graph):
        def build(self, x):
            return x + 1

    if not hasattr(os, "SCHED_FIFO") or LAUNCHERS:
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    processes = launch_number("WORLD_SIZE", 1)
    x = flow.zeros(1, placement=flow.placement("cpu", list(range(processes))), sbp=flow.sbp.broadcast)
    graph = First()
    graph._compile(x)  # here the threads that compute are made
    before = set(os.listdir("/proc/self/task"))
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        graph(x).to_local().numpy()
    finally:
        os.sched_setscheduler(0, policy, parameters)
    LAUNCHERS.update(set(os.listdir("/proc/self/task")) - before)


def use_one_compute_thread():
    """Run the operators of a CPU graph in one thread of this process; before the first graph is compiled.

    OneFlow makes one for every core (cpu_device_num, task_stream_index_manager.cpp) and deals the operators to them.
    With one process per core they displace each other: two processes on two cores took 1.2 times as long per step.
    """
    session = flow.framework.session_context.GetDefaultSession()
    session.TryInit()
    resource = session.resource
    resource.cpu_device_num = 1
    session.update_resource_eagerly(resource)


def calm_scheduler():
    """Let OneFlow's scheduler thread give way to the threads that compute.

    As long as a graph runs, that thread looks for new work without a pause (ScheduleLoop, vm/virtual_machine.cpp). With
    as many compute threads as cores it took 3 to 25 % of the cores; nice values from 5 to 19 leave it below 2 %. It is
    the thread that works most while operators run one by one, since it polls for a millisecond after each.
    """
    with suppress(OSError, LookupError, ValueError):  # a system without these files, or without times in them
        before = thread_times()
        for _ in range(100):  # about 10 are enough, but on a busy machine it may have to wait for a core
            flow.zeros(1)
            time.sleep(0.002)
            worked = {thread: time_now - before.get(thread, 0) for thread, time_now in thread_times().items()}
            *_, second, busiest = sorted(worked, key=worked.get)
            if worked[busiest] > max(5e6, 2 * worked[second]):  # 5 ms
                break
        if worked[busiest] > 0:
            os.setpriority(os.PRIO_PROCESS, busiest, 10)


@contextmanager
def no_garbage_collection():
    """Let nothing be collected inside, in no thread; what is out of use by then waits."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def thread_times():
    """{thread id: nanoseconds on a core} of this process's threads but the calling one (Linux)."""
    times = {}
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            times[int(thread)] = int(file.read().split()[0])
    del times[threading.get_native_id()]
    return times
