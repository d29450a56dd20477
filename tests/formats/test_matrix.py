"""The tables of docs/formats.md are what is found when every kind of SAE goes through every format."""

from formats_matrix import PAGE, tables, with_tables


def test_the_page_says_what_is_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, tables()) == page, "python tests/formats_matrix.py writes the tables anew"
