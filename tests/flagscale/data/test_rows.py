import pytest

from flagscale.data.rows import BadRow, BadRows
from flagscale.errors import UserError


def fill(bad_rows: BadRows, count: int, encoding: bool = False) -> None:
    for i in range(count):
        bad_rows.add(BadRow(f"{'talk' if encoding else 'row'} {i}", "bad"), encoding)


def test_the_eleventh_ends_the_step_with_the_first_ten() -> None:
    bad_rows = BadRows()
    bad_rows.rows = 500
    fill(bad_rows, 10)
    with pytest.raises(UserError) as found:
        fill(bad_rows, 1)
    head, *rows = str(found.value).splitlines()
    assert head.startswith("11 of 500 rows so far cannot be used, more than 10 (data.max_bad_rows)")
    assert rows == [f"  row {i}: bad" for i in range(10)]


@pytest.mark.parametrize(
    ("limit", "rows", "allowed"),
    [(None, 0, 10), (None, 10_999, 10), (None, 11_000, 11), (0, 10**6, 0), (3, 10**6, 3)],
)
def test_limits(limit: int | None, rows: int, allowed: int) -> None:
    bad_rows = BadRows(limit)
    bad_rows.rows = rows
    fill(bad_rows, allowed)
    with pytest.raises(UserError, match=f"more than {allowed} "):
        fill(bad_rows, 1)


def test_the_manifest_holds_a_hundred_in_an_order_that_no_thread_changes() -> None:
    one, two = BadRows(10**6), BadRows(10**6)
    fill(one, 60)
    fill(one, 90, encoding=True)
    fill(two, 90, encoding=True)
    fill(two, 60)
    assert one.facts() == two.facts()
    facts = one.facts()
    assert facts["bad_rows"] == 150
    assert facts["first_bad_rows"] == [
        *(f"row {i}: bad" for i in range(60)),
        *(f"talk {i}: bad" for i in range(40)),
    ]
