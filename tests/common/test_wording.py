"""How numbers are written in messages."""

import pytest

from nib.common.wording import amount


@pytest.mark.parametrize(
    ("number", "written"),
    [(0, "0"), (38.4, "38.4"), (926, "926"), (999.7, "1k"), (15_249, "15.2k"), (99_999, "100k"), (510_000, "0.51M"),
     (3_490_000, "3.49M"), (999_900_000, "1B")],
)  # fmt: skip
def test_a_small_number_of_tokens_is_not_written_as_zero_millions(number: float, written: str) -> None:
    assert amount(number) == written
