"""llama_jax: LLaMA training in JAX and Flax, from a laptop to a pod.

Importing the package starts no device, opens no file and imports no TensorFlow.
"""

import sys

__version__ = "0.1.0"


def _is_run_as_command() -> bool:
    """Whether this is the start of `python -m llama_jax.X`, and not an import by a program."""
    # Python's documentation of -m: argv[0] is "-m" while the module is located, which imports us.
    names = (arg.removeprefix("-m") for arg in sys.orig_argv)
    return sys.argv[:1] == ["-m"] and any(name.startswith(f"{__name__}.") for name in names)


if _is_run_as_command():
    from llama_jax.cli import interrupts

    interrupts.end_quietly()
