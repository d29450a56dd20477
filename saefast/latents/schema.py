"""latents.db: what one pass over rows tells of every latent of an SAE, as an SQLite file in the run's folder.

The tables below are the file's contract: exports, the explorer and other people's tools read them. A change to them is
a new VERSION. Arrays are little-endian, as NumPy's `tobytes` gives them. JSON is in `meta` alone.

Words: a *sequence* is what the model read at once (tokens of a text, patches of an image); a *context* is a stretch of
a sequence that is shown whole, a sentence of a text or all of an image; an *example* is a context that a latent fires
in. Contexts of one sequence lie end to end, so that joined they are the sequence again.
"""

import sqlite3
from pathlib import Path

from saefast.errors import InputError

LATENTS_DB = "latents.db"
VERSION = 1
# In the file's header, so that `file` and we know it: "saef".
APPLICATION_ID = 0x73616566

# Bins of a latent's histogram, of equal width from 0 to its largest activation.
BINS = 50
# Intervals of equal width from 0 to the largest activation that examples are drawn from (SAEDashboard's quantiles), how
# many from each, and how many of the strongest come before them.
INTERVALS, PER_INTERVAL, TOP = 5, 5, 20

TABLES = """
-- What the file is of: a name and its value in JSON. See database.Meta.
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- density: rows it fires on / rows. mean_act: of the rows it fires on. score: choice.SCORE, NULL where no tokens are
-- known. dead: it fired on no row. dense: it fired on more than 1 % of them. title: its own tokens, one of each word.
CREATE TABLE latents (
    latent INTEGER PRIMARY KEY,
    n_fired INTEGER NOT NULL,
    density REAL NOT NULL,
    mean_act REAL NOT NULL,
    max_act REAL NOT NULL,
    score REAL,
    dead INTEGER NOT NULL,
    dense INTEGER NOT NULL,
    title TEXT NOT NULL
);

-- The most telling latents, rank 0 first, each of other tokens than those before it; see choice.TELLING.
CREATE TABLE telling (rank INTEGER PRIMARY KEY, latent INTEGER NOT NULL);

-- counts: BINS of int32, firings by activation. Dead latents have none.
CREATE TABLE histograms (latent INTEGER PRIMARY KEY, counts BLOB NOT NULL);

-- Tokens that occur, or that a logit weight names; text as Texts.token shows it, n: occurrences in the rows.
CREATE TABLE tokens (token INTEGER PRIMARY KEY, text TEXT NOT NULL, n INTEGER NOT NULL);

-- The tokens with the most activation of a latent, rank 0 first. share: of its activation; covered: share of the
-- token's occurrences that it fires on; own: whether the token counts as the latent's own (choice.OWN_TOKEN).
CREATE TABLE latent_tokens (
    latent INTEGER, rank INTEGER, token INTEGER NOT NULL, share REAL NOT NULL, covered REAL NOT NULL,
    own INTEGER NOT NULL, PRIMARY KEY (latent, rank)
) WITHOUT ROWID;

-- side 1: the tokens that a latent's decoder row raises most, -1: lowers most. meta "logits" says in what sense.
CREATE TABLE logit_weights (
    latent INTEGER, side INTEGER, rank INTEGER, token INTEGER NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (latent, side, rank)
) WITHOUT ROWID;

-- The latents with the most similar decoder rows.
CREATE TABLE neighbours (
    latent INTEGER, rank INTEGER, other INTEGER NOT NULL, cosine REAL NOT NULL, PRIMARY KEY (latent, rank)
) WITHOUT ROWID;

-- Latents that fire on the same rows. n: rows with both; lift: n · rows / (n_fired · n_fired of the other).
CREATE TABLE cofiring (
    latent INTEGER, rank INTEGER, other INTEGER NOT NULL, lift REAL NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (latent, rank)
) WITHOUT ROWID;

-- source_sequence: its number in the harvest. name: of an image, its file. tokens: int32 ids, special tokens included;
-- empty where rows are of no text. n: its tokens or patches, with those that are no rows (a BOS left out).
CREATE TABLE sequences (
    sequence INTEGER PRIMARY KEY, source_sequence INTEGER NOT NULL, name TEXT, tokens BLOB NOT NULL, n INTEGER NOT NULL
);

-- The sparse code of all rows of a sequence, sorted by latent and then position: int32, uint16 and float32 arrays, as
-- many of each. position counts in the sequence.
CREATE TABLE codes (
    sequence INTEGER PRIMARY KEY, latents BLOB NOT NULL, positions BLOB NOT NULL, acts BLOB NOT NULL
);

-- Positions start to stop (exclusive) of a sequence. lengths: uint16, characters (code points) of text that each
-- position has; a character of several tokens belongs to the last of them. text is that of all, joined.
CREATE TABLE contexts (
    context INTEGER PRIMARY KEY, sequence INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    text TEXT NOT NULL, lengths BLOB NOT NULL
);
CREATE INDEX contexts_of_sequence ON contexts (sequence, start);

-- part 0: the strongest, at most TOP; 1 to INTERVALS: drawn from an interval of activation, the highest first, at most
-- PER_INTERVAL. position: of the strongest firing in the context, in the sequence; act: there.
CREATE TABLE examples (
    latent INTEGER, part INTEGER, rank INTEGER, context INTEGER NOT NULL, position INTEGER NOT NULL, act REAL NOT NULL,
    PRIMARY KEY (latent, part, rank)
) WITHOUT ROWID;

-- Images small enough to show, of sequences with examples. data: a whole file of type `mime`.
CREATE TABLE images (sequence INTEGER PRIMARY KEY, mime TEXT NOT NULL, data BLOB NOT NULL);

-- Columns over all latents that are read at once: "map" float32 (L, 2), "cluster" int16 (L,), "density" float32 (L,).
CREATE TABLE arrays (name TEXT PRIMARY KEY, dtype TEXT NOT NULL, shape TEXT NOT NULL, data BLOB NOT NULL);

-- What people write. sae: meta's digest of the weights that it was written for; written: time, ISO 8601, UTC.
CREATE TABLE labels (latent INTEGER PRIMARY KEY, text TEXT NOT NULL, written TEXT NOT NULL, sae TEXT NOT NULL);

-- Full-text search: parts of words, so that any language and any tokenizer is served.
CREATE VIRTUAL TABLE token_search USING fts5 (text, content='tokens', content_rowid='token', tokenize='trigram');
CREATE VIRTUAL TABLE context_search USING fts5 (text, content='contexts', content_rowid='context', tokenize='trigram');
"""

# Made when all rows are in, which is faster.
INDEXES = """
-- Each has all that latents are filtered by as well: a page far down is found in the index alone.
CREATE INDEX latents_by_density ON latents (density DESC, latent, mean_act, max_act, score, dead, dense);
CREATE INDEX latents_by_max_act ON latents (max_act DESC, latent, density, mean_act, score, dead, dense);
CREATE INDEX latents_by_mean_act ON latents (mean_act DESC, latent, density, max_act, score, dead, dense);
CREATE INDEX latents_by_score ON latents (score DESC, latent, density, mean_act, max_act, dead, dense);
CREATE INDEX latents_of_token ON latent_tokens (token, latent);
INSERT INTO token_search (token_search) VALUES ('rebuild');
INSERT INTO context_search (context_search) VALUES ('rebuild');
ANALYZE;
"""


def create(path: str | Path) -> sqlite3.Connection:
    """A new file with empty tables, open for writing; it is on the disk after `finish`."""
    connection = sqlite3.connect(path)
    # The file has a temporary name until it is whole: nothing is lost with a journal that is not kept.
    connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA page_size = 8192;")
    connection.executescript(f"PRAGMA user_version = {VERSION}; PRAGMA application_id = {APPLICATION_ID};{TABLES}")
    return connection


def finish(connection: sqlite3.Connection) -> None:
    """Makes the indexes and closes the file."""
    connection.commit()
    connection.executescript(INDEXES)
    connection.commit()
    connection.close()


def connect(path: str | Path) -> sqlite3.Connection:
    """A whole file, open for reading.

    Raises:
        InputError: it is not there, is no such file, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no {path}: saefast features {path.parent} makes it")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    try:
        application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in _HEADER)
    except UNREADABLE as error:
        connection.close()
        raise InputError(f"{path} is damaged, or no SQLite file ({error}): {_again(path)}") from None
    if application != APPLICATION_ID or version != VERSION:
        connection.close()
        seen = f"version {version}" if application == APPLICATION_ID else "another program's SQLite file"
        raise InputError(f"{path} is {seen}: expected version {VERSION} of latents.db; {_again(path)}")
    return connection


# What reading a damaged file raises: SQLite's own words may quote bytes that nobody can decode.
UNREADABLE = (sqlite3.DatabaseError, UnicodeDecodeError)
_HEADER = ("application_id", "user_version")


def _again(path: Path) -> str:
    return f"move it away, and saefast features {path.parent} makes it anew"
