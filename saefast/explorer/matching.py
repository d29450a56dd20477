"""Matches the latents of two runs, once and in the background: a page that shows them never waits for it.

What was found lies beside latents.db, so that it is there at once the next time; torch is imported only where it is
not.
"""

import atexit
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from saefast.errors import InputError
from saefast.explorer.loading import Loading, NotReady
from saefast.latents.database import LatentsDB
from saefast.latents.matched import Matched, path_of, read

if TYPE_CHECKING:
    from torch import Tensor


class Matching:
    """The matching of two runs; `begin` starts it, and the attributes say how far it is.

    Args:
        run: folder of the run that is shown; db: its latents.db.
        other, other_db: of the run beside it; None where it has no latents.db.

    Attributes:
        error: why there will be nothing, in a line.
        done, of: rows compared, of how many; of is 0 while weights are read.
    """

    def __init__(self, run: Path, db: LatentsDB, other: Path, other_db: LatentsDB | None) -> None:
        self.run, self.db, self.other, self.other_db = run, db, other, other_db
        self.done = self.of = 0
        self._ending = False
        self._known = self._kept()
        self._loading = Loading(self._match)

    @property
    def found(self) -> Matched | None:
        """None as long as it is not there."""
        if self._known is None:
            with contextlib.suppress(NotReady):
                self._known = self._loading.get()
        return self._known

    @property
    def error(self) -> str:
        return self._loading.why

    def begin(self) -> None:
        """Starts the work unless it was ever started or need not be done."""
        if self.found is None and self._loading.state == "not begun":
            # A thread that is in native code while Python comes down aborts the process: it ends before that.
            atexit.register(self._end)
            self._loading.start()

    def _end(self) -> None:
        self._ending = True
        while self._loading.state == "loading":
            time.sleep(0.01)

    def _kept(self) -> Matched | None:
        """The file of an earlier matching of these weights; one that is damaged is made anew."""
        if self.other_db is None:
            return None
        dbs = (self.db, self.other_db)
        try:
            found = read(path_of(self.db.path.parent, *(db.meta["sae"]["digest"] for db in dbs)))
        except InputError:
            return None
        fits = [len(best) for best in (found.a_best, found.b_best)] == [db.n_latents for db in dbs]
        return found if fits else None

    def _match(self) -> Matched:
        from saefast.latents.matching import CONTROL_ROWS, match, write

        a, digest_a = weights(self.run)
        b, digest_b = weights(self.other)
        for run, digest, db in ((self.run, digest_a, self.db), (self.other, digest_b, self.other_db)):
            if db is not None and db.meta["sae"]["digest"] != digest:
                raise InputError(
                    f"{db.path} is of other weights than {run} has now: saefast features {run} makes it anew"
                )
        self.of = len(a) + len(b) + 2 * CONTROL_ROWS
        found = match(a, b, {"a": digest_a, "b": digest_b}, self._advance)
        # In a folder that cannot be written nothing is kept, and the next time the work is done again.
        with contextlib.suppress(OSError):
            write(self.db.path.parent, found)
        return found

    def _advance(self, rows: int) -> None:
        if self._ending:
            raise InterruptedError("saefast explore has ended")
        self.done += rows


def weights(run: Path) -> "tuple[Tensor, str]":
    """The decoder rows that a run's latents are compared by, and the digest of its weights.

    Raises:
        InputError: there is no SAE, or it is damaged.
    """
    from saefast.formats.opening import load
    from saefast.latents.facts import decoder_of
    from saefast.training.residual import stack_of

    stack = stack_of(run, load(run))
    return decoder_of(stack.parts[-1].sae).rows, stack.digest()
