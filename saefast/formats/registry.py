"""The formats: one line each, in the order in which they are tried."""

from saefast.formats.format import Format
from saefast.formats.own import Own
from saefast.formats.saelens import SAELens

formats: dict[str, Format] = {
    one.name: one
    for one in (
        Own(),
        SAELens(),
    )
}  # fmt: skip
