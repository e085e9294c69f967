"""How answers are read: which spellings are the same number or time, and which are unreadable."""

import pytest

from evaluator import asked_format, get_evaluator


@pytest.mark.parametrize(
    "text", ["1080", "1,080", "$1080", "$1,080.00", "1080.0", " 1080 ", "+1080", "01080", "1.08e3"]
)
def test_one_number_in_many_spellings(text):
    """Compared as texts, `1,080`, `$1080` and `1080.00` were all wrong answers to `1080`."""
    assert get_evaluator("gsm8k").parse_answer(text) == "1080"
    assert get_evaluator("gsm8k").score(asked_format("so", text), "1080")["correctness"] == 2.0
    assert get_evaluator("gsm8k").score(asked_format("so", "1080"), text)["correctness"] == 2.0


@pytest.mark.parametrize(("text", "plain"), [("-5", "-5"), ("−5", "-5"), ("-$5.00", "-5"), ("$-5", "-5"), ("-0", "0")])
def test_negative_numbers(text, plain):
    assert get_evaluator("gsm8k").parse_answer(text) == plain


@pytest.mark.parametrize(
    "text",
    ["", "x", "1,08", "1 080", "1.2.3", "nan", "inf", "1e999", "1e" + "9" * 30, "9" * 65, "٧٢", "²"],
)
def test_what_is_no_number(text):
    assert get_evaluator("gsm8k").parse_answer(text) is None


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>7</answer> or 8", "7"),
        ("<answer>3 + 4 = 7</answer>", "7"),
        ("<answer>none</answer> but 8", "8"),
        ("10-3", "3"),
        ("it is -3", "-3"),
        ("2 and 1,234,567.50", "1234567.5"),
        ("<answer>\n72", "72"),
        ("nothing", None),
    ],
)
def test_lenient_reading_of_numbers(completion, expected):
    assert get_evaluator("gsm8k").predict(completion) == expected
