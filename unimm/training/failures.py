"""What an error that ends a run says: what went wrong, which checkpoint is whole, and how to go on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unimm.distributed.ranks import Ranks, is_lost_connection
from unimm.training.checkpoints import list_checkpoints

# no space, no quota left, and a file that is larger than a limit
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# how torch's loader begins to say that a process of its own is gone
DEAD_WORKER = "DataLoader worker"


@contextmanager
def explain_failures(out: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Add to an error of the body, which trains into a folder, how to go on.

    A loss or gradient that is not finite stays a FloatingPointError, a full disk an OSError with the file; a process that
    makes batches and was killed is a ChildProcessError; a connection to another rank that broke, a ConnectionError.
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}: {describe_checkpoint(out)}") from error
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        message = f"{error.strerror}: free some of the disk, or raise its limit; {describe_checkpoint(out)}"
        raise OSError(error.errno, message, error.filename) from error
    except RuntimeError as error:
        if ranks is not None and is_lost_connection(error, ranks):
            raise ConnectionError(
                f"process {ranks.rank} of {ranks.size} lost another one, whose own output says why: mend that and start "
                f"all of them again; {describe_checkpoint(out)}"
            ) from error
        if not str(error).startswith(DEAD_WORKER):
            raise
        raise ChildProcessError(
            f"a process that makes batches is gone ({' '.join(str(error).split())}): if the system's log says that memory "
            f"ran out, give fewer --workers or smaller batches; {describe_checkpoint(out)}"
        ) from error


def describe_checkpoint(out: Path) -> str:
    """Which checkpoint of a run is the last whole one, and how to go on from it."""
    found = list_checkpoints(out)
    if not found:
        return f"{out} holds no checkpoint yet: start the run again"
    return f"{found[-1]} is whole: --resume goes on from it"
