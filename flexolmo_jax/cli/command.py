"""The command `flexolmo <verb>`.

Exit status:
    0    done
    1    a run that cannot go on
    2    a user's mistake, told in one line
    42   stopped by SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU; a training run saves first
    75   another process of the run is lost, or nothing moved for too long
    76   the accelerator of this host is held by another process
    129  stopped by a hangup (the terminal is closed); a training run saves first
    130  stopped by Ctrl-C; a training run saves first, and a second Ctrl-C ends it at once

After 42, 75 and 76 (and 134 and 137, by which the runtime and the system kill) a launcher may give
the same command again, after 76 on another host: a run resumes. Progress and notes go to stderr;
stdout holds the result, as one JSON object with --json.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.errors import RunError, UserError, printable
from flexolmo_jax.runtime import environment, processes
from flexolmo_jax.runtime.interrupts import catch, raised
from flexolmo_jax.runtime.processes import ending, is_first
from flexolmo_jax.runtime.progress import note_once
from flexolmo_jax.runtime.streams import set_streams
from flexolmo_jax.storage.files import is_disk_full
from flexolmo_jax.storage.paths import is_refusal, reason

from . import coordinator, data, owner, runs, use
from .printing import show
from .verbs import parser_of

PARSER = parser_of((data, runs, owner, coordinator, use))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit status. The command itself, which gives no `argv`, ends
    here, as does one of several processes."""
    if argv is None:
        catch([*map(str, Path(__file__).parent.glob("*.py")), processes.__file__])
        set_streams()
    return ending(lambda: _run(argv), whole=argv is None)


def _run(argv: Sequence[str] | None) -> int:
    args = argparse.Namespace(debug=False)
    try:
        args = PARSER.parse_args(argv)
        if not args.debug:
            # What JAX, Orbax and others tell themselves is no news to a user.
            logging.disable(logging.WARNING)
        note_once.cache_clear()
        environment.check(os.environ)
        result = args.run_verb(args)
    except Exception as error:
        if ended := raised():
            raise ended from error
        told = _told(error, getattr(args, "out", None))
        if told is None or args.debug:
            raise
        print(f"flexolmo: {printable(told)}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    finally:
        logging.disable(logging.NOTSET)
    try:
        if is_first():
            show(result, args.json)
    except OSError as error:
        print(f"flexolmo: the result cannot be written: {reason(error)}", file=sys.stderr)
        return 1
    return 1 if result.get("fits") is False else 0


def _told(error: Exception, out: Path | None) -> str | None:
    """What a user is told of an error of a command that writes `out`. None: it is a bug, which is
    shown whole."""
    if isinstance(error, UserError | RunError):
        return str(error)
    if is_disk_full(error):
        place = getattr(error, "filename", None) or out
        return (
            f"no space left on the disk{f' while writing {place}' if place else ''}; free some and"
            " run it again: a run goes on from its last checkpoint"
        )
    if isinstance(error, MemoryError):
        return f"not enough memory ({error!s:.120}); give smaller numbers, or a machine with more"
    if is_refusal(error):
        return (
            f"the object store refused: {reason(error)}; check the bucket's name and your"
            " credentials, and run it again"
        )
    if (told := environment.refusal(error)) is not None:
        return told
    if isinstance(error, OSError):  # a file that may not be read, where the verb did not foresee it
        return f"{reason(error)}: {error.filename or ''}".rstrip(": ")
    return None
