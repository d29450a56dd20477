"""Matches the latents of two runs, once and in the background: a page that shows them never waits for it.

What was found lies beside latents.db, so that it is there at once the next time; torch is imported only where it is
not.
"""

import contextlib
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from saefast.errors import InputError
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
        found: what was found, None as long as it is not there.
        error: why there will be nothing, in a sentence.
        done, of: rows compared, of how many; of is 0 while weights are read.
    """

    def __init__(self, run: Path, db: LatentsDB, other: Path, other_db: LatentsDB | None) -> None:
        self.run, self.db, self.other, self.other_db = run, db, other, other_db
        self.found: Matched | None = None
        self.error = ""
        self.done = self.of = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Reads what was found before, or starts the work; nothing where that has begun."""
        with self._lock:
            if self.found is not None or self._thread is not None:
                return
            self.found = self._kept()
            if self.found is None:
                self._thread = threading.Thread(target=self._work, name="matching", daemon=True)
                self._thread.start()

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

    def _work(self) -> None:
        try:
            self._match()
        except (InputError, MemoryError, OSError) as error:
            self.error = str(error) or "there is not enough memory to compare the two runs"
        except Exception:
            # The terminal gets what a page has no place for.
            traceback.print_exc()
            self.error = "the two runs could not be compared; the terminal says what went wrong"

    def _match(self) -> None:
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
        self.found = found

    def _advance(self, rows: int) -> None:
        self.done += rows


def weights(run: Path) -> "tuple[Tensor, str]":
    """The decoder rows that a run's latents are compared by, and the digest of its weights.

    Raises:
        InputError: there is no SAE, or it is damaged.
    """
    from saefast.formats.opening import load
    from saefast.training.residual import stack_of

    stack = stack_of(run, load(run))
    sae = stack.parts[-1].sae
    # Of several hooks that are reconstructed, those of the last: as latents.db compares them.
    return sae.W_dec.detach()[:, -sae.architecture.target_parts()[-1] :], stack.digest()
