"""The process that renders chat templates; `template_renderer` starts it and uses its pipes.

A template is untrusted code. Jinja's sandbox keeps it away from the machine, but does not limit its
time and memory; the limits of a process do, whatever the template computes. This module imports
little, so that the process starts quickly.

A request is {"source": Jinja, "variables": {...}}; without variables, the template is only
compiled. The answer is [kind, text], where kind is one of "text", "not Jinja", "refused", "memory"
and "long".
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

# Marks around the text that the model writes, in a rendered text. They are noncharacters, which
# Unicode reserves for internal use.
BEGIN, END = "\ufdd1", "\ufdd2"
LONGEST_TEXT = 2**22  # characters; encoding needs 300 bytes for each


def environment() -> sandbox.ImmutableSandboxedEnvironment:
    """Returns a Jinja environment with the white space, functions and tags of chat templates."""

    class Generation(ext.Extension):
        """The tag {% generation %} around the text that the model writes; puts it between marks."""

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
    found.filters["tojson"] = to_json  # Jinja's own filter writes <, > and & as \u003c and so on
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


_environment = functools.cache(environment)


def answer(request: dict[str, Any]) -> list[str]:
    """Returns the answer to a request: its kind and its text."""
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
    except Exception as error:  # a template may raise any exception of Python
        return [kind, str(error) or type(error).__name__]


def serve(seconds: int, memory: int) -> None:
    """Answers requests on standard input until that is closed.

    Args:
      seconds: processor time that a request may take; after it, SIGXCPU ends the process.
      memory: bytes of address space that the whole process may have.
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
            with contextlib.suppress(ValueError):  # the hard limit of this process is lower
                resource.setrlimit(resource.RLIMIT_CPU, (soft, most))
            message = encode_message(answer(request))
        except EOFError:
            return
        except MemoryError:  # while reading the request, or encoding the answer
            message = encode_message(["memory", ""])
        sys.stdout.buffer.write(message)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
