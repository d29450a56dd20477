"""Other people's text made fit to show: nothing in it is invisible, moves the cursor or turns a page around."""

# Signs that people know; other control characters have pictures of their own in Unicode.
_PICTURES = {code: 0x2400 + code for code in range(0x20)}
_PICTURES |= {ord("\n"): ord("↵"), ord("\t"): ord("⇥"), 0x7F: 0x2421}
# What has no picture: C1 controls, spaces of no width, signs that turn the direction of writing (whole lines of a page
# could read in another order than they are), line separators, lone surrogates, tags, what is no character. The joiners
# of Arabic, Indic scripts and emoji stay, and so does the soft hyphen.
_ESCAPED = [
    *range(0x80, 0xA0),
    *(0x061C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
    *range(0xD800, 0xE000),
    *range(0xFDD0, 0xFDF0),
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE0080),
    *(plane << 16 | last for plane in range(17) for last in (0xFFFE, 0xFFFF)),
]
_SHOWN: dict[int, int | str] = _PICTURES | {
    code: f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}" for code in _ESCAPED
}
_SHOWN_IN_LINES = {code: shown for code, shown in _SHOWN.items() if code not in (ord("\n"), ord("\t"))}


def visible(text: str, *, lines: bool = False) -> str:
    """Text with ↵ for a line end, ⇥ for a tab, ␛ and the like for control characters, \\u202e for what has no picture.

    What it gives encodes as UTF-8, whatever was given. Signs of HTML are left as they are: escaping is the page's.

    Args:
        lines: line ends and tabs stay, for text shown in lines as it was written.
    """
    return text.translate(_SHOWN_IN_LINES if lines else _SHOWN)
