"""Numbers on the command line are whole ASCII numbers within bounds, or are refused by name."""

from __future__ import annotations

import pytest

from relay.cli.main import build_parser

NOT_WHOLE = ["99999999999999999999", "-5", "1_0", "٣", " 5", "+5", "1.0", "1e3", "x", ""]
NOT_MONEY = ["ten", "1_0", "٣", " 5", "+5", "-5", "nan", "inf", "0", "0.0000000001", "1000000001", "1e400", "1,5", "9" * 5000, ""]
WHOLE = {
    "budgets list --spent": (75, "0 to 1000"),
    "usage --top": (3, "1 to 10000"),
    "logs --limit": (3, "1 to 1000000000"),
    "serve --port": (8080, "0 to 65535"),
    "serve --workers": (2, "1 to 64"),
    "serve --tls-port": (8443, "0 to 65535"),
}


def parsed(*arguments: str) -> dict[str, object]:
    return vars(build_parser([arguments[0]]).parse_args(arguments))


@pytest.mark.parametrize("option", WHOLE)
def test_a_whole_number_is_accepted(option: str) -> None:
    number, _ = WHOLE[option]
    assert parsed(*option.split(), str(number))[option.rpartition("--")[2].replace("-", "_")] == number


@pytest.mark.parametrize("text", NOT_WHOLE)
@pytest.mark.parametrize("option", WHOLE)
def test_another_text_for_a_whole_number_is_refused_with_its_bounds(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    *command, name = option.split()
    with pytest.raises(SystemExit):
        parsed(*command, f"{name}={text}")
    error = capsys.readouterr().err
    assert name in error and f"is not a whole number from {WHOLE[option][1]}" in error


@pytest.mark.parametrize("text", NOT_MONEY)
def test_an_amount_that_is_no_plain_number_is_refused_with_its_bounds(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("budgets", "raise", "--", "b", text)
    assert "is not an amount from 0.000000001 to 1000000000" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "nano_usd"), [("20", 20 * 10**9), ("0.5", 5 * 10**8), ("1e2", 10**11), ("0.000000001", 1)])
def test_an_amount_is_accepted(text: str, nano_usd: int) -> None:
    assert parsed("budgets", "raise", "b", text)["usd"] == nano_usd
