"""Runs commands as forks of one process that has done all imports, which take most of a start.

A fork is an ordinary process: it has its own id, environment, pipes and exit status, may be killed,
and may connect to others on loopback. Only the imports are done before the fork. A test of the
imports themselves, or one that sets limits before them, starts an interpreter of its own.

Run as a module, this file is the server: it does the imports, then waits for requests on the socket
whose number it gets as an argument (one JSON object per packet), and ends when the other side
closes the socket.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

ROOT = pathlib.Path(__file__).parent.parent
# Modules that the commands import, also lazily. Modules that define flags when they are imported
# are left out: the fork runs them again, and a flag can be defined only once.
PRELOADED = (
    *("llama_jax.cli.command", "llama_jax.train.run", "llama_jax.data.prepare.job"),
    *(f"llama_jax.data.show.{name}" for name in ("summary", "plot")),
    *(f"llama_jax.inference.{name}" for name in ("chat", "perplexity")),
    "llama_jax.interchange.transfer",
    *("tensorflow", "tensorboardX", "matplotlib.pyplot", "tokenizers", "pyarrow.parquet"),
    "tests.helpers",
)
PACKET = 1 << 17  # bytes; an environment has a few thousand
# For `gc.set_threshold`: a compiled program is many long-lived objects, and each collection visits
# all of them.
SELDOM = (50_000, 20, 100)


class Fork:
    """A running command, with the part of `subprocess.Popen` that tests use.

    Attributes:
      pid: process id.
      stdout: text file with the standard output of the command.
      stderr: text file with its standard error.
      returncode: exit status, or minus the number of the signal that ended it; None while it runs.
    """

    def __init__(self, module, arguments, env, stdin=None, cwd=ROOT):
        """Starts `python -m MODULE ARGUMENTS`.

        Args:
          module: name of the module.
          arguments: arguments of the command.
          env: the whole environment.
          stdin: open file; None: an empty one.
          cwd: the folder in which it runs; default: the root of the repository.
        """
        self.args, self.returncode = [module, *map(str, arguments)], None
        (self.stdout, out), (self.stderr, err) = _pipe(), _pipe()
        with contextlib.ExitStack() as stack:
            stdin = stdin or stack.enter_context(open(os.devnull))
            files = [stdin, stack.enter_context(out), stack.enter_context(err)]
            umask = os.umask(0)
            os.umask(umask)
            request = {"argv": self.args, "env": env, "umask": umask, "cwd": str(cwd)}
            self.pid = _server().ask(request, [file.fileno() for file in files])

    def poll(self):
        """Returns the exit status, or None while the command runs."""
        if self.returncode is None:
            self.returncode = _server().ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout=None):
        """Waits for the end; raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=None):
        """Returns the rest of both pipes, without lines that were read before."""
        texts, began = {}, time.monotonic()

        def read(name):
            texts[name] = getattr(self, name).read()

        names = ("stdout", "stderr")
        readers = [threading.Thread(target=read, args=(name,), daemon=True) for name in names]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout and max(0.0, began + timeout - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout and max(1.0, began + timeout - time.monotonic()))
        return texts["stdout"], texts["stderr"]

    def send_signal(self, number):
        """Sends a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()


def _pipe():
    """Returns a text file to read from, and a binary file whose content the first one reads."""
    read, write = os.pipe()
    return open(read, errors="replace"), open(write, "wb")


class _Server:
    """The client's end of the socket; each process that runs tests has one."""

    def __init__(self):
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with other:
            subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(other.fileno())],
                cwd=ROOT,
                pass_fds=[other.fileno()],
            )

    def ask(self, request, files=()):
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], list(files))
            return json.loads(self._socket.recv(PACKET))


_server = functools.cache(_Server)


def _serve(requests):
    """Answers requests; in a fork, returns the request that the fork shall run."""
    running = set()
    while True:
        packet, files, _, _ = socket.recv_fds(requests, PACKET, 3)
        if not packet:  # the tests have ended, or were killed
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        request = json.loads(packet)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        else:
            answer = os.fork()
            if answer == 0:
                requests.close()
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
                return request
            running.add(answer)
            for file in files:
                os.close(file)
        requests.send(json.dumps(answer).encode())


def _set_environment(env):
    """Replaces the environment, also for JAX options whose variables JAX has read already."""
    import jax

    changed = {name: value for name, value in env.items() if os.environ.get(name) != value}
    os.environ.clear()
    os.environ.update(env)
    for name, value in changed.items():
        option = name.lower()
        if name.startswith("JAX_") and option in jax.config.values:
            jax.config.update(option, type(jax.config.values[option] or "")(value))


def _set_streams(encoding):
    """Makes new streams, because a stream remembers what kind of file it was opened on."""
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding)
    errors = io.BufferedWriter(io.FileIO(2, "w"))
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(errors, encoding, "backslashreplace")
    sys.stderr.reconfigure(line_buffering=True)


_status: int | None = None  # exit status of a fork whose command has ended normally


def _leave():
    """Ends a fork after all exit handlers, without shutting down the interpreter."""
    if _status is not None:
        with contextlib.suppress(OSError):  # on an error, Python itself reports the broken stream
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_status)


def _run(argv):
    """Runs `python -m ARGV`."""
    global _status
    sys.argv = argv
    # A command that another one has imported runs a second time, as with `python -m`.
    warnings.filterwarnings("ignore", "'llama_jax.*' found in sys.modules", RuntimeWarning)
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        _status = 0
    except SystemExit as error:
        _status = (error.code or 0) if isinstance(error.code, int | None) else None
        raise


def main():
    """Runs the server, and in each fork the command."""
    atexit.register(_leave)  # the handler that is registered first is called last
    from llama_jax.cli.command import quieten_libraries

    requests = socket.socket(fileno=int(sys.argv[1]))
    quieten_libraries()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # otherwise the collection at the end of each fork copies all of this memory
    gc.set_threshold(*SELDOM)
    request = _serve(requests)
    _set_environment(request["env"])
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    _set_streams(request["env"].get("PYTHONIOENCODING"))
    _run(request["argv"])


if __name__ == "__main__":
    main()
