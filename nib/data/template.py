"""Chat templates in jinja2's sandbox, set up as in transformers, with limits on time, memory and output.

A template comes with a model or from a file, so it is untrusted code. It renders byte for byte the same text as in
transformers (5.24, `utils/chat_template_utils.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nib.common.exits import InputError

# Characters that Unicode reserves for a program's internal use: the start and end of a {% generation %} block, and a
# mark put into special tokens in messages, so that they stay text.
OPEN, CLOSE, GUARD = "\ufdd0", "\ufdd1", "\ufdd2"
# A rendering of a long conversation takes milliseconds and a few MB.
CPU_SECONDS, OUTPUT_CHARACTERS, MEMORY_BYTES, NUMBER_BITS = 5.0, 1 << 26, 1 << 31, 1 << 12
OTHER = "Give another one as the model's chat_template.jinja, or with prepare_data.py --chat-template=FILE"
REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFault(InputError):
    """A template that can render no conversation: it is not valid jinja, exceeds a limit, or accesses internals."""


class ChatTemplate:
    """A compiled template. Raises TemplateFault."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        """`variables` are the special tokens by the names that templates use: bos_token, eos_token and so on."""
        environment = sandbox()
        try:
            with limits():
                self.template = environment.from_string(source)
        except Exception as error:
            raise TemplateFault(f"the chat template is not valid: {_reason(error)}. {OTHER}") from None
        self.variables = variables

    def render(self, messages: list[dict[str, Any]], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text, with the characters OPEN and CLOSE around what is in {% generation %}.

        Raises InputError if the template does not render these messages, TemplateFault if it exceeds a limit or
        accesses internals.
        """
        blocks, size = [], 0
        given: dict[str, Any] = {"messages": [_message(message) for message in messages], "tools": tools}
        given |= {"documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            with limits():
                for block in self.template.generate(**self.variables, **given):
                    blocks.append(block)
                    size += len(block)
                    if size > OUTPUT_CHARACTERS:
                        raise OverflowError("it writes without end")
            return "".join(blocks)
        except Exception as error:  # any error of the template's code
            reason, kind = _reason(error), type(error).__name__
        if kind in ("TimeoutError", "MemoryError", "OverflowError", "SecurityError"):
            raise TemplateFault(f"the chat template was stopped: {reason}. {OTHER}")
        raise InputError(f"the chat template does not render the messages: {reason}")


def _reason(error: Exception) -> str:
    place = f", line {line}" if (line := getattr(error, "lineno", None)) else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:200]}".strip(": .")


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it to a template: without nulls; thinking and reasoning_content are the same."""
    found = {key: value for key, value in message.items() if value is not None}
    thought = next((found[key] for key in REASONING if key in found), None)
    return found if thought is None else {"thinking": thought, **found, "reasoning_content": thought}


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raise in the body if it uses more than CPU_SECONDS of processor time or MEMORY_BYTES more memory.

    Signals are handled only in the main thread; in another thread there is no time limit.
    """
    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGVTALRM, _too_long)
            undo.callback(signal.signal, signal.SIGVTALRM, before)
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
            undo.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        with contextlib.suppress(OSError, ValueError):  # not Linux, or a hard limit that is lower already
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            if soft < 0 or has + MEMORY_BYTES < soft:
                resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY_BYTES, hard))
                undo.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        yield


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"it does not end within {CPU_SECONDS:g} seconds")


@functools.cache
def sandbox() -> Any:
    """The environment that templates are compiled in. Raises InputError if jinja2 is missing or too old."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    except ImportError:
        raise InputError("chat templates need jinja2. Run: pip install 'jinja2>=3.1.6'") from None
    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):  # older sandboxes have known escapes
        raise InputError(f"chat templates need jinja2 3.1.6, not {jinja2.__version__}. Run: pip install -U jinja2")

    class Generation(Extension):
        """{% generation %}, which encloses what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Refuse products and powers of large integers, which no signal can interrupt."""
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                if bits > NUMBER_BITS:
                    raise OverflowError("it computes numbers without end")
            return super().call_binop(context, operator, left, right)

    class Namespace(jinja2.utils.Namespace):
        """jinja2's namespace without names that begin with an underscore, which reach Python's internals."""

        def __init__(*args: Any, **given: Any) -> None:
            names = dict(*args[1:], **given)
            for name in names:
                check_name(name)
            jinja2.utils.Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    class Dict:
        """dict without its attributes other than fromkeys."""

        def __call__(self, *args: Any, **given: Any) -> dict[Any, Any]:
            return dict(*args, **given)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": Dict(), "namespace": Namespace}
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment
