import subprocess
import sys

from llama_jax.watchdog import Watchdog
from tests.helpers import ROOT


def run(code):
    code = f"import os, signal, time\nfrom llama_jax.watchdog import Watchdog\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_hang_ends_with_a_message_and_stacks():
    process = run("""
def stuck():
    time.sleep(50)
with Watchdog(1) as dog:
    dog.beat("step 7")
    stuck()
""")
    assert process.returncode == 1
    first = process.stderr.splitlines()[0]
    assert first.startswith("error: no sign of life in step 7 for longer than 1 s (")
    assert "in stuck" in process.stderr  # the stack


def test_beats_keep_it_alive_and_its_end_calls_it_off():
    process = run("""
with Watchdog(1.5) as dog:
    for step in range(10):
        dog.beat(f"step {step}")
        time.sleep(0.3)
    dog.beat("step 10", compiles=True)
    time.sleep(4)
time.sleep(3)
print("alive")
""")
    assert (process.returncode, process.stdout, process.stderr) == (0, "alive\n", "")


def test_a_stopped_process_did_not_hang():
    process = run("""
if (child := os.fork()) == 0:
    time.sleep(0.3)
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(4)
    os.kill(os.getppid(), signal.SIGCONT)
    os._exit(0)
with Watchdog(2) as dog:
    dog.beat("step 1")
    os.waitpid(child, 0)
print("alive")
""")
    assert (process.returncode, process.stdout, process.stderr) == (0, "alive\n", "")


def test_none_at_all():
    with Watchdog(0) as dog:
        dog.beat("step 1")
        assert not dog._thread.is_alive()
