"""The process that renders chat templates: `template_renderer` starts it, and talks to its pipes.

A template is the code of others. Jinja's sandbox keeps it from the machine, but bounds neither its
time nor its memory; the limits of a process do, whatever the template computes. The file imports
little, so that it starts quickly.

A request is {"source": Jinja, "variables": {...}}, or without variables to compile only; the answer
is [kind, text], and kind one of "text", "not Jinja", "refused", "memory" and "long".
"""

import contextlib
import datetime
import functools
import json
import resource
import sys
from typing import Any

from jinja2 import TemplateError, ext, nodes, sandbox

from llama_jax.text.child_process import encode_message, exit_with_parent, read_message

# Around what the model writes, in a text that is rendered; Unicode reserves both for such uses.
BEGIN, END = "\ufdd1", "\ufdd2"
LONGEST_TEXT = 2**22  # characters: to make tokens of them takes 300 bytes each


def environment() -> sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: their white space, functions and tags."""

    class Generation(ext.Extension):
        """{% generation %}: what the model writes; shown between two marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
            return [one.set_lineno(line) for one in (begin, nodes.Scope(body), end)]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    found = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    found.filters["tojson"] = to_json  # Jinja's own writes <, > and & as \u003c and so on
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


_environment = functools.cache(environment)


def answer(request: dict[str, Any]) -> list[str]:
    """Kind and text of what a request gets."""
    kind = "not Jinja"
    try:
        template = _compiled(request["source"])
        if "variables" not in request:
            return ["text", ""]
        kind = "refused"
        text = template.render(request["variables"])
        return ["text", text] if len(text) <= LONGEST_TEXT else ["long", ""]
    except MemoryError:
        return ["memory", ""]
    except RecursionError:
        return [kind, "it is nested too deeply, or calls itself without end"]
    except Exception as error:  # a template may do what Python may
        return [kind, str(error) or type(error).__name__]


def serve(seconds: int, memory: int) -> None:
    """Answers requests on standard input until it ends.

    Args:
      seconds: of processor time that a request may take; then the process ends by SIGXCPU.
      memory: bytes of address space of the whole process.
    """
    exit_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    while True:
        try:
            request = read_message(sys.stdin.buffer)
            used = resource.getrusage(resource.RUSAGE_SELF)
            soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
            with contextlib.suppress(ValueError):  # more than is left to this process
                resource.setrlimit(resource.RLIMIT_CPU, (soft, most))
            message = encode_message(answer(request))
        except EOFError:
            return
        except MemoryError:  # of the request, or of the answer's bytes
            message = encode_message(["memory", ""])
        sys.stdout.buffer.write(message)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
