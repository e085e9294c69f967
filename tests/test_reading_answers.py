"""How answers are read: which spellings are the same number or time, and which are unreadable.

To test one more spelling, add it to a table.
"""

import json
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answers import NUMBER, NUMBER_CASES, TIME, TIME_CASES, is_integer, plain_text, read_number, read_time, write_number
from evaluator import asked_format, get_evaluator

GSM8K, CLOCK, CORRELATION = (get_evaluator(task) for task in ("gsm8k", "clock", "correlation"))
DASHES = "-−–—‒―‐‑－﹣﹘"
CURRENCIES = "$€£¥₹₩₽₺₫₪₦฿₱₿￥＄"


def flat(table: dict) -> list[tuple]:
    return [(spelling, expected) for expected, spellings in table.items() for spelling in spellings]


def check_number(text: str, expected: str | None) -> None:
    """The reading of an answer block, and its correctness where the number is right and where another one is."""
    completion = GSM8K.parse(asked_format("so", text))
    assert (completion.strict_prediction, completion.prediction) == (expected, expected)
    if expected is not None:
        assert GSM8K.score(completion, expected)["correctness"] == 2.0
    assert GSM8K.score(completion, "31")["correctness"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", NUMBER_CASES, ids=lambda case: case.example)
def test_each_example_is_read_by_its_own_row(case):
    found = NUMBER.fullmatch(plain_text(case.example))
    first = next(one for one in NUMBER_CASES if re.fullmatch(one.pattern, case.example))
    assert first is case
    assert read_number(found) == case.value(re.fullmatch(case.pattern, case.example)) > 0


@pytest.mark.parametrize("case", NUMBER_CASES, ids=lambda case: case.example)
@pytest.mark.parametrize("sign", ["", "-", "–"])
def test_whole_numbers_earn_integer_and_other_rows_do_not(case, sign):
    scores = GSM8K.score(asked_format("so", sign + case.example), "31")
    assert scores["integer"] == (0.5 if case.whole else 0.0)


@pytest.mark.parametrize(("example", "pattern"), TIME_CASES)
def test_each_example_of_a_time_is_read(example, pattern):
    assert re.fullmatch(pattern, example)
    assert read_time(TIME.fullmatch(example)) in ("08:15:30", "08:15:00")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: the value
# ---------------------------------------------------------------------------------------------------------------------
PLAIN = {
    "1080": [
        "1080",
        "1,080",
        "$1080",
        "$1,080.00",
        "1080.0",
        " 1080 ",
        "+1080",
        "01080",
        "1.08e3",
        "1.08E+3",
        "１０８０",
    ],
    "0": ["0", "-0", "0.00", "$0"],
    "72": [
        "72",
        "72.",
        "(72)",
        "[72]",
        "**72**",
        "`72`",
        "_72_",
        "“72”",
        "#### 72",
        "= 72",
        "x=72",
        "72!",
        "It is 72.",
    ],
    "0.42": [".42", "0.42", "0.420"],
    "100000000000000000001": ["100000000000000000001", "100,000,000,000,000,000,001"],
}
THOUSANDS = {
    "1080": [
        *(f"1{blank}080" for blank in " \u00a0\u2007\u2009\u200a\u202f\u3000"),
        *(f"1{apostrophe}080" for apostrophe in "'’‘ʼ＇"),
        *("1_080", "1，080", "１，０８０", "１ ０８０"),
        *("1{,}080", r"1\,080", r"1\;080", r"1\ 080", r"1\:080", r"1,\!080", "1{,}080.0", "1&nbsp;080", "1&thinsp;080"),
        *("$1 080", "1 080 €", "1'080 CHF", "1 080.00", "It costs 1 080.", "**1 080**"),
    ],
    "1234567": [
        "1,234,567",
        "1 234 567",
        "1'234'567",
        "1{,}234{,}567",
        r"1\,234\,567",
        "1_234_567",
        "1\u202f234\u202f567",
    ],
    "1234567.5": ["1,234,567.50", "1 234 567.5", "1’234’567.5"],
}
CURRENCY_PERCENT_UNITS = {
    "18": [
        *(spelling for sign in CURRENCIES for spelling in (f"{sign}18", f"18{sign}", f"{sign} 18", f"18 {sign}")),
        *("USD 18", "18 USD", "EUR18", "18EUR", "US$18", "R$ 18", "Rs. 18", "Rs18", "18 kr", "18 dollars", "18¢"),
        *(r"\$18", r"18\$", r"\$18.00", "$18$", "$$18$$", r"\(18\)", r"\[18\]", r"\boxed{18}", r"$\boxed{\$18}$"),
        *("18%", "18 %", "18％", r"18\%", "18 percent", "18٪"),
        *(
            "18 clips",
            "18 clips.",
            "18kg",
            "18 km/h",
            "18-year-old",
            "18th",
            "18°",
            r"18^\circ",
            "18 cm²",
            "18 cm^2",
            "18 m2",
        ),
        *(
            r"\text{18}",
            r"18\text{ clips}",
            r"18\ \text{clips}",
            r"\mathbf{18}",
            r"\text{Answer: }18",
            r"18\text{ cm}^2",
        ),
        *("18个", "一共18个。", "答案：18", "<18>", "\u200b18\u200b", "\ufeff18"),
    ],
}
MAGNITUDES = {
    "72000": ["72k", "72K", "72 k", "$72k", "72 thousand", "72 Thousand", "72-thousand", "72,000", "€72k"],
    "1500000": [
        "1.5 million",
        "1.5 millions",
        "$1.5m",
        "$1.5M",
        "€1.5 m",
        "1.5mn",
        "1,500 thousand",
        "1500k",
        "15 lakh",
    ],
    "2000000000": ["2 billion", "$2b", "$2B", "2bn"],
    "5": ["5m", "5 m", "5 meters", "5 kg", "5 men", "5 Kim", "5 minutes"],
}
FRACTIONS = {
    "1.5": [
        *("3/2", "3 / 2", "3⁄2", "3∕2", "3÷2", "6/4", "1 1/2", "1½", "1 ½", "3/2 cups", "$3/2$", "(3/2)"),
        *(r"\frac{3}{2}", r"\dfrac{3}{2}", r"\tfrac{3}{2}", r"\frac32", r"\frac{3}2", r"\frac 3 2", r"\sfrac{3}{2}"),
        *(r"1\frac{1}{2}", r"1 \frac12", r"\boxed{\frac{3}{2}}", r"{3 \over 2}", r"$\frac{3}{2}$", "1&frac12;"),
    ],
    "0.75": ["3/4", "¾", "3/4ths", r"\frac{3}{4}"],
    "1/3": ["1/3", "2/6", "⅓", r"\frac{1}{3}"],
    "-1.5": ["-3/2", "−1½", "-1 1/2", r"-\frac{3}{2}", r"\frac{-3}{2}", "– 3/2"],
}
POWERS_OF_TEN = {
    "7200": [
        "7.2e3",
        "7.2E3",
        "7.2e+03",
        "7.2 × 10^3",
        "7.2x10^3",
        "7.2*10^3",
        r"7.2 \times 10^{3}",
        r"7.2 \cdot 10^3",
    ],
    "0.072": ["7.2e-2", r"7.2 \times 10^{-2}"],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    flat(PLAIN)
    + flat(THOUSANDS)
    + flat(CURRENCY_PERCENT_UNITS)
    + flat(MAGNITUDES)
    + flat(FRACTIONS)
    + flat(POWERS_OF_TEN),
)
def test_spellings_of_a_number(text, expected):
    """Compared as texts, `1,080`, `$1080` and `1080.00` were all wrong answers to `1080`; `1 080` was read as 80."""
    check_number(text, expected)
    assert GSM8K.parse_answer(text) == expected  # as the right answer of an example


UNREADABLE = {
    "decimal comma": ["3,5", "0,5", "-3,5", "3,50 €", "1.080,50", "1 080,50", "0,080", "72,0", "3{,}5"],
    "unclear separators": ["1,08", "10,80", "1,0800", "1,080 000", "1.080.000", "1·080", "1٬080", "1٫5", "5,6", "1..5"],
    "calculations": [
        "3 + 4",
        "3+4",
        "10-3",
        "10 - 3",
        "10 – 3",
        "2*3",
        "2 × 3",
        "2 x 3",
        "2×3",
        r"2 \times 3",
        "48/2",
        "0/5",
    ],
    "more calculations": [
        "$10 - $3",
        "x - 5",
        "x-5",
        "20% - 5%",
        "(3)-5",
        "10 apples - 3",
        "5 minus 3",
        "1/2/3",
        "1/0",
    ],
    "ranges and ratios": ["5–7", "5-7", "$5–$7", "5…7", "5...7", "3:2", "3 : 2", "12/25/2020", "2024-01-05", "10:30"],
    "powers": ["2^3", "5²", "10³", "10⁻³", "2**3", "10^3", "2^{10}", "₇₂", "5 ^ 2"],
    "roots and constants": [
        "√2",
        "2√3",
        r"\sqrt{2}",
        r"2\sqrt{3}",
        r"\frac{\sqrt{3}}{2}",
        "5π",
        r"5\pi",
        "5 pi",
        r"\log{8}",
    ],
    "variables and names": ["x5", "x_5", "mp3", "v1.2.3", "0x48", r"\frac{x}{2}", "2M", "3B", "2T"],
    "other magnitudes": ["72万", "5千万", "72‰", "72 and a half"],
    "other digits": ["٧٢", "७२", "7٢", "²", "½½"],
    "no number": ["", "x", "nan", "inf", "-∞", "seventy-two", "Ⅶ"],
    "too long": ["1e999", "1e" + "9" * 30, "9" * 65, "0." + "0" * 64 + "1"],
}


@pytest.mark.parametrize(("text", "kind"), flat(UNREADABLE))
def test_unreadable_numbers(text, kind):
    """What is not understood is not replaced by the part that is: `3/2` counted as 2, `72k` as 72."""
    check_number(text, None)


@pytest.mark.parametrize("text", ["71 72 73", "71, 72", "72 or 73", "in 2019 300", "72 out of 100", "36 + 36 = 72"])
def test_several_numbers_are_no_answer(text):
    completion = GSM8K.parse(asked_format("so", text))
    assert completion.strict_prediction is None
    assert completion.prediction == re.findall("[0-9]+", text)[-1]


@pytest.mark.parametrize(
    ("text", "integer"),
    [("72", 0.5), ("-72", 0.5), ("−72", 0.5), ("–72", 0.5), ("1,072", 0.5), ("1 072", 0.5), ("1\u202f072", 0.5),
     ("1'072", 0.5), ("７２", 0.5), ("72.00", 0.0), ("$72", 0.0), ("72 apples", 0.0), ("72%", 0.0), ("- 72", 0.0),
     (r"\boxed{72}", 0.0), ("3/2", 0.0), ("72k", 0.0), ("1,08", 0.0), ("72\n72", 0.0), ("--72", 0.0), ("9" * 65, 0.0)],
)  # fmt: skip
def test_integer_needs_a_whole_number_and_nothing_else(text, integer):
    assert GSM8K.score(asked_format("so", text), "31")["integer"] == integer


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: the sign
# ---------------------------------------------------------------------------------------------------------------------
SIGNED = [
    *(
        "{d}5",
        "{d}5.",
        "({d}5)",
        "{d}(5)",
        "={d}5",
        "x = {d}5",
        "It is {d}5",
        "答案是{d}5",
        "{d}5 °C",
        "{d}5%",
        "`{d}5`",
    ),
    *(
        "{d}$5",
        "${d}5",
        "$ {d}5",
        r"{d}\$5",
        r"\${d}5",
        "{d}€5",
        "€{d}5",
        "{d}USD 5",
        "USD {d}5",
        "{d}US$5",
        "{d}Rs. 5",
    ),
    *("**{d}5**", "{d}**5**", "${d}5$", r"\({d}5\)", r"\boxed{{{d}5}}", r"{d}\boxed{{5}}", "{{{d}}}5", "{d}{{5}}"),
    *(r"\text{{{d}5}}", r"{d}\mathbf{{5}}", "{d} 5", "{d} $5", "= {d} 5", "Answer: {d} 5", "It is {d} 5", "{d}\u00a05"),
    *("{d}5.00", "{d}05", "{d}5e0", "\u200b{d}5", "{d}\u200b5"),
]


@pytest.mark.parametrize("form", SIGNED)
@pytest.mark.parametrize("dash", DASHES)
def test_every_dash_is_a_minus(form, dash):
    """An en dash before the digits was skipped, so that –5 was a right answer to 5."""
    check_number(form.format(d=dash), "-5")


@pytest.mark.parametrize(
    "text", ["minus 5", "Minus $5", "negative 5", "Negative **5**", "&minus;5", "&#8722;5", "&ndash;5"]
)
def test_words_and_entities_for_a_minus(text):
    check_number(text, "-5")


UNDECIDED = [
    "{d}{d}5",
    "{d}${d}5",
    "+{d}5",
    "±5",
    "x{d}5",
    "x {d} 5",
    "Total {d} 5",
    "one\n{d} 5 in all",
    "{d}~5",
    "{d}}}5",
]


@pytest.mark.parametrize("form", UNDECIDED)
@pytest.mark.parametrize("dash", DASHES)
def test_an_undecided_sign_is_unreadable(form, dash):
    """A dash may be an operator, a bullet or punctuation. The number is then unreadable, not positive."""
    check_number(form.format(d=dash), None)
    assert GSM8K.predict(form.format(d=dash)) is None


@settings(max_examples=300, deadline=None)
@given(
    before=st.sampled_from(["", "so ", "is ", "= ", "x", "7 ", "(", "$", "**", "\n", "答"]),
    dash=st.sampled_from(DASHES),
    between=st.text("$€*_`'\"({[}])\\~#@&^%+/- \u00a0\u202f\u200b−–", max_size=2),
    number=st.sampled_from(["5", ".5", "5,000", "5 000", "1/2", "½", "5k", "５"]),
)
def test_a_sign_before_a_number_is_never_lost(before, dash, between, number):
    prediction = GSM8K.predict(before + dash + between + number)
    assert prediction is None or prediction.startswith("-")


@given(
    st.integers(-(10**12), 10**12), st.sampled_from([",", " ", "'", "_", "\u202f", "’", "{,}"]), st.sampled_from(DASHES)
)
def test_any_integer_is_read_in_any_grouping(number, separator, dash):
    text = f"{number:,}".replace(",", separator).replace("-", dash)
    assert GSM8K.parse_answer(text) == str(number)
    assert GSM8K.predict(f"So it is **${text}**.".replace("$" + dash, dash + "$")) == str(number)


@given(st.fractions(-1000, 1000, max_denominator=99))
def test_a_written_number_is_read_as_itself(number):
    assert GSM8K.parse_answer(write_number(number)) == write_number(number)
    assert Fraction(write_number(number)) == number


# ---------------------------------------------------------------------------------------------------------------------
# The lenient reading
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>7</answer> or 8", "7"),
        ("<answer>3 + 4 = 7</answer>", "7"),
        ("<answer>none</answer> but 8", "8"),
        ("10-3", None),  # a calculation without its result
        ("10-3=7", "7"),
        ("it is -3", "-3"),
        ("2 and 1,234,567.50", "1234567.5"),
        ("<answer>\n72", "72"),
        ("72 clips, 48 in April", "48"),
        ("It costs 1 080.", "1080"),
        ("She ate 3/2", "1.5"),
        ("He earned 72k", "72000"),
        ("It fell by –0.5", "-0.5"),
        ("On day 5, 2019 300 came", "300"),
        ("* 72 clips", "72"),
        ("1. April\n2. 72 clips", "72"),
        ("- April: **48**\n- May: **24**", "24"),
        ("-> 72", "72"),
        ("nothing", None),
    ],
)
def test_lenient_reading_of_numbers(completion, expected):
    assert GSM8K.predict(completion) == expected


WORKED = [
    ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips in April and May.", "72"),
    ("She earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nIn 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.", "10"),
    ("The price rose by 20/100*$1,250 = $<<20/100*1250=250>>250.\nIt is now $1,250 + $250 = $1,500.", "1500"),
    ("In the beginning, he had 100 / 2 = 50 marbles.\nHe has 15% of 50 = 7.5 left", "7.5"),
    ("5 - 12 = -7 degrees\nIt is 7 degrees below zero, that is -7.00.", "-7"),
    ("He walked 1 1/2 + 2 1/2 = 4 miles.\nOf these, 1/2 mile was uphill.", "0.5"),
]


@pytest.mark.parametrize(("solution", "last"), WORKED)
def test_last_number_of_a_worked_solution(solution, last):
    assert GSM8K.predict(solution) == last
    assert GSM8K.predict(f"{solution}\n#### 1,080") == "1080"
    assert GSM8K.predict(asked_format(solution, "$1,080")) == "1080"


def gsm8k_rows() -> list[dict]:
    folder = Path(os.environ.get("GSM8K_PATH", ""))
    files = [folder / f"{split}.jsonl" for split in ("train", "test")]
    if not os.environ.get("GSM8K_PATH") or not all(file.exists() for file in files):
        pytest.skip("GSM8K_PATH does not name a folder with train.jsonl and test.jsonl")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_all_answers_of_gsm8k():
    """Every right answer in a dozen spellings, and at the end of its worked solution."""
    for row in gsm8k_rows():
        solution, _, gold = row["answer"].rpartition("#### ")
        number = gold.replace(",", "")
        grouped = f"{int(number):,}"
        spellings = [
            gold,
            number,
            grouped,
            f"${gold}",
            rf"\${gold}",
            f"{gold} clips.",
            f"**{gold}**",
            rf"\boxed{{{gold}}}",
        ]
        spellings += [grouped.replace(",", separator) for separator in (" ", "\u202f", "'", "{,}", r"\,")]
        for spelling in spellings:
            completion = GSM8K.parse(asked_format(solution, spelling))
            assert completion.strict_prediction == completion.prediction == number, (spelling, row)
        assert GSM8K.predict(row["answer"]) == number, row


# ---------------------------------------------------------------------------------------------------------------------
# Correlations
# ---------------------------------------------------------------------------------------------------------------------
CORRELATIONS = {
    -0.42: [
        *(form.format(d=dash) for dash in DASHES for form in ("{d}0.42", "{d}.42", "r = {d}.42", "r={d}0.42")),
        *(
            "r = - 0.42",
            "(-0.42)",
            "$r=-0.42$",
            "−０.４２",
            r"\boxed{-0.42}",
            "-21/50",
            "-4.2e-1",
            r"-4.2 \times 10^{-1}",
        ),
    ],
    0.42: ["0.42", ".42", "+0.42", "r≈0.42", "0.420."],
    None: [
        *("-0,42", "0,42", "42%", "0.42%", "-42 %", "1.01", "-42", "0.3–0.5", "0.3 to 0.5", "±0.42", "r - 0.42"),
        *("strong", "–0,42", "--0.42", ""),
    ],
}


@pytest.mark.parametrize(("text", "expected"), flat(CORRELATIONS))
def test_spellings_of_a_correlation(text, expected):
    """An en dash before the digits was skipped, so that –0.42 was rewarded as 0.42."""
    completion = CORRELATION.parse(asked_format("so", text))
    assert completion.strict_prediction == expected
    closeness = CORRELATION.score(completion, "-0.42")["closeness"]
    assert closeness == pytest.approx(-1 if expected is None else 1 - abs(expected + 0.42))


# ---------------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------------
TIMES = {
    "03:45:10": [
        *(
            "03:45:10",
            "3:45:10",
            "Time:03:45:10",
            "time：03：45：10",
            "０３：４５：１０",
            "03∶45∶10",
            "It is 03:45:10.",
            "T03:45:10Z",
        ),
        *("03 : 45 : 10", "03: 45: 10", "03 :45 :10", "3:45: 10", "03\u00a0:\u00a045\u00a0:\u00a010", "03 ： 45 ： 10"),
        *("03:45:10 pm", "03:45:10:", "Clock 1: 03:45:10", "(03:45:10)", "$03:45:10$", "\u200b03:45:10", "03:45:10.5"),
        *(r"\text{03:45:10}", r"\boxed{03:45:10}", "03{:}45{:}10", "3h45m10s", "3 h 45 min 10 s"),
        *("3 hours, 45 minutes and 10 seconds", "3 hrs 45 mins 10 secs"),
    ],
    "03:45:01": ["3:45:1", "03:45:01", "3 : 45 : 1"],
    "03:05:01": ["3:5:1", "3: 5: 1"],
    "03:45:00": ["3:45", "03:45", "3 : 45", "3h 45m", "at 3:45 pm"],
    None: [
        *(
            "",
            "3:5",
            "3: 45",
            "25:00:00",
            "08:60:00",
            "08:15:60",
            "12:34:56:78",
            "1:03:45:10",
            "03:45:100",
            "003:45:10",
        ),
        *("03.45.10", "034510", "3h45", "03:45:10 or 04:45:10", "quarter to four", "٠٣:٤٥:١٠", "3 hours"),
    ],
}


@pytest.mark.parametrize(("text", "expected"), flat(TIMES))
def test_spellings_of_a_time(text, expected):
    """A time that is not read costs as much as one that is six hours off."""
    completion = CLOCK.parse(asked_format("so", text))
    assert completion.strict_prediction == CLOCK.parse_answer(text) == expected
    if expected is not None:
        assert completion.prediction == expected
        assert CLOCK.score(completion, expected)["closeness"] == 3.0


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.sampled_from([":", " : ", ": ", " :", "：", "∶"]))
def test_any_time_is_read_with_any_colon(hour, minute, second, colon):
    plain = f"{hour:02}:{minute:02}:{second:02}"
    assert CLOCK.parse_answer(plain.replace(":", colon)) == plain
    assert CLOCK.parse_answer(f"Time:{hour}{colon}{minute}{colon}{second}") == plain
    assert CLOCK.score(asked_format("so", plain.replace(":", colon)), plain)["closeness"] == 3.0


@pytest.mark.parametrize(("text", "worth"), [("03:45:10", 0.5), ("3:45:10", 0.0), ("03：45：10", 0.0), ("03:45", 0.0)])
def test_time_format_needs_the_asked_form(text, worth):
    assert CLOCK.score(asked_format("so", text), "03:45:10")["time_format"] == worth


def test_integer_pattern_has_the_whole_rows():
    assert [is_integer(case.example) for case in NUMBER_CASES] == [case.whole for case in NUMBER_CASES]


@pytest.mark.parametrize(("text", "plain"), [("0.5", 1), ("-.42", 1), ("1", 1), ("0.", 0), ("-1.", 0), ("5e-1", 0)])
def test_a_plain_decimal_has_digits_behind_its_point(text, plain):
    scorer = get_evaluator("correlation")
    assert scorer.score(asked_format("", text), "0.5")["value_format"] == 0.5 * plain
