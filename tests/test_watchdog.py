import subprocess
import sys
import time

from llama_jax.watchdog import Watchdog
from tests.helpers import ROOT


def run(code):
    code = f"import time\nfrom llama_jax.watchdog import Watchdog\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_hang_ends_with_a_message_and_stacks():
    code = """
def stuck():
    time.sleep(50)
with Watchdog(0.5) as dog:
    dog.beat("step 7")
    stuck()
"""
    began = time.monotonic()
    process = run(code)
    assert process.returncode == 1
    assert time.monotonic() - began < 30
    first = process.stderr.splitlines()[0]
    assert first.startswith("error: no sign of life for 0.5 s, in step 7;")
    assert "in stuck" in process.stderr  # the stack


def test_beats_keep_it_alive_and_its_end_calls_it_off():
    code = """
with Watchdog(0.4) as dog:
    for step in range(8):
        dog.beat(f"step {step}")
        time.sleep(0.1)
time.sleep(0.8)
print("alive")
"""
    process = run(code)
    assert (process.returncode, process.stdout, process.stderr) == (0, "alive\n", "")


def test_none_at_all():
    with Watchdog(0) as dog:
        dog.beat("step 1")
        assert not dog._thread.is_alive()
