"""The program that runs inside the sandbox and has the candidate's code tested. Its text is the Program's source.

    judge (this process)  --calls, inputs-->  candidate (a child of it)
          |               <--plain values---
          v
    report to ptlab

The judge never runs the candidate's code and the candidate never sees what is expected. stdin tests and calls: the judge knows no expected
result either, ptlab compares. Asserts: the judge forks the candidate first and reads the asserts afterwards, so they were never in the
candidate's memory; inside an assert the tested function is a stand-in that asks the candidate and gets back plain values, rebuilt here
from text (`decode`): an object with a lying __eq__ arrives as what it is, an object that cannot be compared.

Needs only the standard library, imports nothing that most tests can do without, runs under any Python from 3.8 on.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from ptlab.rewards.code_values import decode, encode, read_frame, write_all, write_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import CodeType
    from typing import Any, NoReturn

MAX_REQUEST_BYTES = 2**31
"""Of what ptlab sends."""
TAIL_CHARS = 300


class CandidateError(Exception):
    """The tested code raised."""


class CandidateGone(BaseException):
    """The tested code ran out of time or its process ended: nothing more can be asked of it."""


class Report:
    """Lines to ptlab, each as soon as it is known, each with the word that only ptlab and the judge know."""

    def __init__(self) -> None:
        self.word = ""
        self.descriptor = os.dup(1)
        os.set_inheritable(self.descriptor, False)

    def say(self, *values: Any) -> None:
        write_all(self.descriptor, encode([self.word, *values]).encode("unicode_escape") + b"\n")


# ---- the candidate's side


def _become_candidate(report: Report) -> None:
    """In the child, before any of the candidate's code: no way back to ptlab, and another user if we are root."""
    os.close(report.descriptor)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    if os.getuid() == 0:  # in a sandbox of others, whose programs are root
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    sys.path.insert(0, "")


def _fresh_main(name: str) -> dict[str, Any]:
    module = type(sys)(name)
    sys.modules["__main__"] = sys.modules[name] = module
    return module.__dict__


def _compile(source: str) -> tuple[CodeType | None, str | None]:
    """(code, None) or (None, why not). Whatever a hostile text does to the compiler is a syntax error of it."""
    try:
        return compile(source, "program.py", "exec"), None
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as err:
        return None, f"{type(err).__name__}: {str(err)[:TAIL_CHARS]}"


def _described(err: BaseException) -> str:
    """Type and message of an exception whose own methods may do anything."""
    try:
        return f"{type(err).__name__}: {str(err)[:TAIL_CHARS]}"
    except BaseException:
        return "an exception that cannot be shown"


def _serve(sources: Sequence[str], requests: int, replies: int) -> None:
    """Load the candidate's code, then answer calls with plain values until the judge closes the pipe."""
    for source in sources:
        code, problem = _compile(source)
        if code is not None:
            break
    write_frame(replies, encode(["compiled", problem]))
    if code is None:
        return
    space = _fresh_main("program")  # not "__main__": a main block is not part of what is called
    try:
        exec(code, space)
        write_frame(replies, encode(["loaded", None]))
    except BaseException as err:
        write_frame(replies, encode(["loaded", _described(err)]))
    while True:
        request = read_frame(requests)
        if request is None:
            return
        number, name, args, kwargs = decode(request)
        try:
            answer = encode([number, "returned", _find(space, name)(*args, **kwargs)])
        except BaseException as err:
            answer = encode([number, "raised", _described(err)])
        try:
            write_frame(replies, answer)
        except ValueError as err:
            write_frame(replies, encode([number, "raised", _described(err)]))


def _find(space: Mapping[str, Any], name: str) -> Any:
    """A function of the program, or a method of its class Solution, made anew for each call."""
    if name not in space and "Solution" in space:
        return getattr(space["Solution"](), name)
    if name not in space:
        raise NameError(f"name {name!r} is not defined")
    return space[name]


# ---- the judge's side


class Candidate:
    """The child that answers calls. After a timeout or its end every further call raises CandidateGone."""

    def __init__(self, about: Mapping[str, Any], report: Report) -> None:
        self.call_s = about["call_s"]
        self.end = time.monotonic() + about["total_s"]
        self.most_bytes = about["output_bytes"]
        self.count = 0
        self.gone: str | None = None
        their_requests, self.requests = os.pipe()
        self.replies, their_replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.requests)
                os.close(self.replies)
                _become_candidate(report)
                _serve(about["sources"], their_requests, their_replies)
            finally:
                os._exit(0)
        os.close(their_requests)
        os.close(their_replies)

    def stage(self, name: str) -> str | None:
        """None if it came through this stage of its start, else why not."""
        try:
            said = self._receive()
            if said[0] != name:
                self._stop("died: a reply that is none")
            return None if said[1] is None else str(said[1])
        except CandidateGone as err:
            return str(err)

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, Any]:
        """(outcome, value): returned and the value, or raised and what. Raises: CandidateGone."""
        if self.gone is not None:
            raise CandidateGone(self.gone)
        self.count += 1
        try:
            write_frame(self.requests, encode([self.count, name, list(args), dict(kwargs)]))
        except BrokenPipeError:
            self._stop("died")
        said = self._receive()
        if len(said) != 3 or said[0] != self.count or said[1] not in ("returned", "raised"):
            self._stop("died: a reply that is none")
        return said[1], said[2]

    def _receive(self) -> list[Any]:
        try:
            reply = read_frame(self.replies, min(self.end, time.monotonic() + self.call_s), self.most_bytes)
            said = None if reply is None else decode(reply)
        except TimeoutError:
            self._stop("timeout")
        except (ValueError, RecursionError, MemoryError):
            self._stop("died: a reply that is none")
        if not isinstance(said, list) or len(said) < 2:
            self._stop("died")
        return said

    def end_it(self) -> None:
        """No zombie is left for an init that may not be there."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _stop(self, why: str) -> NoReturn:
        self.gone = why
        os.kill(self.pid, signal.SIGKILL)
        raise CandidateGone(why)


def _run_calls(candidate: Candidate, tests: Sequence[Any], report: Report) -> None:
    """tests: [function name, arguments] each."""
    for number, (name, args) in enumerate(tests):
        try:
            outcome, value = candidate.call(name, args, {})
        except CandidateGone as gone:
            report.say("test", number, str(gone), None)
            return
        report.say("test", number, outcome, value)


def _run_asserts(candidate: Candidate, setup: str, names: Sequence[str], tests: Sequence[str], report: Report) -> None:
    """tests: source of each, run in one namespace one after the other; `__record__` counts the parts of a larger one."""
    recorded: list[bool] = []

    def stand_in(name: str) -> Callable[..., Any]:
        def tested(*args: Any, **kwargs: Any) -> Any:
            outcome, value = candidate.call(name, args, kwargs)
            if outcome == "raised":
                raise CandidateError(value)
            return value

        return tested

    def record(check: Callable[[], Any]) -> None:
        try:
            recorded.append(bool(check()))
        except Exception:
            recorded.append(False)

    space = _fresh_main("tests")
    space["__record__"] = record
    try:
        exec(compile(setup, "setup.py", "exec"), space)
    except Exception as err:
        report.say("broken", _described(err))
        return
    space.update((name, stand_in(name)) for name in names)
    for number, source in enumerate(tests):
        del recorded[:]
        try:
            exec(compile(source, "test.py", "exec"), space)
            outcome, why = "passed", None
        except AssertionError:
            outcome, why = "failed", None
        except CandidateGone as gone:
            report.say("test", number, str(gone), [sum(recorded), len(recorded)])
            return
        except CandidateError as err:
            outcome, why = "raised", str(err)
        except Exception as err:  # a test that trips over the value it got
            outcome, why = "failed", _described(err)
        report.say("test", number, outcome, [sum(recorded), len(recorded), why])


def _run_stdin(code: CodeType, tests: Sequence[str], report: Report, about: Mapping[str, Any]) -> None:
    """tests: the input of each; a child of its own for each."""
    end = time.monotonic() + about["total_s"]
    for number, given in enumerate(tests):
        outcome, output, why = _run_once(code, given, report, min(about["call_s"], end - time.monotonic()), about["output_bytes"])
        report.say("test", number, outcome, [output, why])
        if outcome == "timeout":
            return


def _run_once(code: CodeType, given: str, report: Report, call_s: float, output_bytes: int) -> tuple[str, str, str | None]:
    source_fd = os.memfd_create("stdin")
    errors_fd = os.memfd_create("stderr")
    write_all(source_fd, given.encode("utf-8", "surrogatepass"))
    os.lseek(source_fd, 0, os.SEEK_SET)
    out_read, out_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out_read)
            _become_candidate(report)
            for descriptor, place in ((source_fd, 0), (out_write, 1), (errors_fd, 2)):
                os.dup2(descriptor, place)
                os.close(descriptor)
            _run_as_main(code)
        finally:
            os._exit(1)
    os.close(out_write)
    os.close(source_fd)
    output, cut = _read_until_it_ends(pid, out_read, time.monotonic() + call_s, output_bytes)
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    _, status = os.waitpid(pid, 0)
    os.close(out_read)
    size = os.lseek(errors_fd, 0, os.SEEK_END)
    tail = os.pread(errors_fd, 4 * TAIL_CHARS, max(0, size - 4 * TAIL_CHARS)).decode("utf-8", "replace")[-TAIL_CHARS:]
    os.close(errors_fd)
    text = output.decode("utf-8", "replace")
    if cut is not None:
        return cut, text, None
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return "returned", text, None
    return "raised", text, tail or f"ended with status {status}"


def _read_until_it_ends(pid: int, out_read: int, deadline: float, output_bytes: int) -> tuple[bytes, str | None]:
    """(bytes, None or the limit it met). It has ended when its process has, whoever else holds the pipe."""
    output = bytearray()
    open_ended = True
    os.set_blocking(out_read, False)
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return bytes(output), "timeout"
        if open_ended:
            select.select([out_read], [], [], min(left_s, 0.02))
        else:
            time.sleep(min(left_s, 0.001))
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        while open_ended:
            try:
                part = os.read(out_read, 1 << 16)
            except BlockingIOError:
                break
            output += part
            open_ended = bool(part)
            if len(output) > output_bytes:
                return bytes(output[:output_bytes]), "output_limit"
        if ended:
            return bytes(output), None


def _run_as_main(code: CodeType) -> NoReturn:
    """As `python program.py` would, to the exit functions; ends the process."""
    import atexit

    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - they live as long as the process
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    space = _fresh_main("__main__")
    status = 0
    try:
        exec(code, space)
    except SystemExit as err:
        status = err.code if isinstance(err.code, int) else 0 if err.code is None else 1
    except BaseException as err:
        sys.stderr.write(_described(err))
        status = 1
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def _read_request() -> Any:
    text = read_frame(0, most=MAX_REQUEST_BYTES)
    if text is None:
        raise SystemExit("judge: the request was cut off")
    return decode(text)


def _main() -> None:
    sys.path[:] = [path for path in sys.path if path]  # the working folder is the candidate's: nothing of it may be imported here
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if os.path.exists("/proc/self"):  # without /proc nobody can look into this process anyway
        import ctypes

        ctypes.CDLL(None).prctl(4, ctypes.c_ulong(0), 0, 0, 0)  # PR_SET_DUMPABLE
    report = Report()
    about = _read_request()
    if about["mode"] == "stdin":
        for source in about["sources"]:
            code, problem = _compile(source)
            if code is not None:
                break
        secret = _read_request()
        report.word = secret["word"]
        report.say("compiled", problem)
        if code is not None:
            _run_stdin(code, secret["tests"], report, about)
        return
    candidate = Candidate(about, report)
    problem = candidate.stage("compiled")
    loading = None if problem is not None else candidate.stage("loaded")
    secret = _read_request()  # only now: the candidate was forked before this was in memory
    report.word = secret["word"]
    report.say("compiled", problem)
    report.say("loaded", loading)
    if problem is None and about["mode"] == "calls":
        _run_calls(candidate, secret["tests"], report)
    elif problem is None:
        _run_asserts(candidate, secret["setup"], secret["names"], secret["tests"], report)
    candidate.end_it()
