import pytest

from flagscale.errors import UserError
from pipelines.cluster.cron import check_cron


@pytest.mark.parametrize(
    "text",
    [
        "0 0 2 * * *",
        "0 30 9-17/2 ? * MON-FRI",
        "0 */15 * 1,15 jan,JUL sun",
        "59 59 23 31 12 6",
        "0 0 5/3 * * ?",
    ],
)
def test_what_the_server_takes(text: str) -> None:
    assert check_cron(f"  {text.replace(' ', '   ')} ") == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 2 * * *", "write '0 0 2 \\* \\* \\*'"),
        ("0 0 2 * * * 2026", "must have six fields"),
        ("@daily", "must have six fields"),
        ("", "must have six fields"),
        ("60 0 2 * * *", "second '60' must be 0 to 59"),
        ("0 0 24 * * *", "hour '24' must be 0 to 23"),
        ("0 0 2 0 * *", "day of month '0' must be 1 to 31"),
        ("0 0 2 * 13 *", "month '13' must be 1 to 12, JAN to DEC"),
        ("0 0 2 * * 7", "day of week '7' must be 0 to 6, SUN to SAT"),
        ("0 0 17-9 * * *", "hour '17-9'"),
        ("0 */0 * * * *", "minute '\\*/0'"),
        ("0 0 2 1, * *", "day of month ''"),
        ("0 0 2 * MONDAY *", "month 'MONDAY'"),
        ("0 0 2- * * *", "hour '2-'"),
        ("0 0 ٢ * * *", "hour"),
    ],
)
def test_what_it_does_not_take(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_cron(text)
