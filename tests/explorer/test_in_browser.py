"""What every page of the explorer holds to, in a browser."""

import pytest
from browsing import Faults, Open

pytestmark = pytest.mark.browser


def test_a_page_that_is_missing_says_so(visit: Open, faults: Faults) -> None:
    page = visit("/nowhere")
    assert page.locator("h1").inner_text() == "There is no such page."
    faults.expect("404")


def test_the_token_leaves_the_address(visit: Open, faults: Faults) -> None:
    page = visit("/nowhere?a=b")
    assert page.url.endswith("/nowhere?a=b")
    faults.expect("404")
