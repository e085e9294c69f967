r"""How answers are read: numbers and times as people and models write them.

Reading has three steps.

1. `plain_text` turns typography and LaTeX into plain characters: `−5`, `\$1{,}080`, `３：４５` become `-5`, `$1,080`,
   `3:45`.
2. `NUMBER` and `TIME` find every number and time in a plain text.
3. The first row of `NUMBER_CASES` or `TIME_CASES` that matches all of a find gives its value. A find without a row is
   unreadable: None, never a part of it. To read one more spelling, add a row.

What an answer block is worth in the tasks whose answers are right or wrong numbers:

- `correctness` and `integer`: a whole number and nothing else: `1080`, `-5`, `–5`, `1,080`, `1 080`, `1'080`.
- `correctness` alone: any other readable number, with words, a unit, a currency or a percent sign around it: `72.00`,
  `$18`, `18 €`, `18%` (18), `72 clips`, `\boxed{72}`, `1{,}080`, `72k`, `5 million`, `3/2`, `1 1/2`, `1e3`,
  `7.2 × 10^3`.
- Nothing: what is unreadable. A comma that cannot separate thousands (`3,5`, `1,08`, `0,080`) is not guessed to be a
  decimal point. Calculations, ranges and ratios have no result (`10-3`, `2 * 3`, `5–7`, `3:2`). Powers, roots,
  constants and variables are not computed (`5²`, `√2`, `5π`, `x5`). Digits are 0 to 9, fullwidth ones included.

A dash of any kind is a minus if the number follows at once and no letter, digit or closing bracket precedes it. If a
blank follows, it is a minus at the beginning and after `=`, `:`, `(` or "is"; elsewhere it may be an operator or a
bullet, and the number is unreadable. A sign before a number is never ignored. A quotient of two integers is read as a
fraction unless it is an integer: `48/2` is a calculation without its result.

The texts are untrusted. Reading takes time linear in their length: apart from the digits of one find, no pattern
repeats anything without a bound.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

LONGEST_NUMBER = 64  # characters; no answer needs more, and converting more would not take linear time


# ---------------------------------------------------------------------------------------------------------------------
# Typography and LaTeX
# ---------------------------------------------------------------------------------------------------------------------
CURRENCIES = "¢£¤¥֏؋৲৳૱௹฿៛﷼" + "".join(map(chr, range(0x20A0, 0x20D0)))
REPLACEMENTS = {
    "-": "−‐‑‒–—―⁃⸺⸻﹘﹣֊־˗➖─━\u00ad",
    " ": "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000",
    "": "\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff",
    "'": "’‘ʼʹ′",
    "*": "×·⋅∙✕✖",
    "/": "÷⁄∕",
    ":": "∶꞉﹕",
    "%": "﹪٪",
    "$": CURRENCIES + "￠￡￥￦﹩",
    "^": "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉",  # powers and indices are not read; they only mark a number as unreadable
}
TYPOGRAPHY: dict[int, int | str] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # fullwidth forms of ASCII
TYPOGRAPHY |= {ord(old): new for new, olds in REPLACEMENTS.items() for old in olds}
ONE_CHARACTER_FRACTIONS = {c: str(Fraction(unicodedata.numeric(c)).limit_denominator(10)) for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}

CODES = "USD EUR GBP JPY CNY RMB INR AUD CAD NZD CHF SEK NOK DKK PLN CZK HUF RUB TRY BRL MXN ZAR KRW SGD HKD TWD THB"
CODES += " IDR MYR PHP VND AED SAR ILS NGN KES PKR BDT LKR UAH RON EGP ARS CLP COP"
QUOTES = r"""(?:[*_`"'(\[{]|\$[ ]?){0,4}"""  # what may come between a sign and its number
WORDS = [  # words and letters of currencies, signs, magnitudes and units -> symbols
    (r"\b(?:US|A|AU|C|CA|HK|NZ|S|R)(?=\$)", ""),
    (rf"\b(?:{CODES.replace(' ', '|')}|Rs\.?|Rp\.?)(?= ?[-+]?[$ ]?[\d.])", "$"),
    (rf"\b(?i:negative) ?(?={QUOTES}[\d.])", "-"),
    (rf"\b(?i:minus) ?(?={QUOTES}[\d.])", "- "),
    (r"(\$ ?\d[\d.,]{0,30}) ?[mM]\b", r"\1mn"),  # $5m is five million, 5m five metres
    (r"(\$ ?\d[\d.,]{0,30}) ?[bB]\b", r"\1bn"),
    (r"(?<![A-Za-z])([kcdm]?m|in|ft|yd|mi)(\}?)\^?[23](?!\d)", r"\1\2"),  # 72 cm^2
]
PART = r" ?(?:\{ ?(-?\d[\d.]{0,30}) ?\}|(\d))"  # numerator or denominator
LATEX = [
    (r"\\!", ""),
    (r"\\[,;: ]", " "),
    (r"\\([$%#&_()\[\]])", r"\1"),
    (r"\{([-+,.:'])\}", r"\1"),  # 1{,}080
    (r"(?<=[\d}])(?=\\[a-z]{0,4}(?:frac|text|boxed))", " "),
    (rf"\\[a-z]{{0,4}}frac{PART}{PART}", r"\1\2/\3\4"),
    (r"\\(?:[a-z]{0,4}frac|sqrt)", "√"),  # other fractions are not read
    (r"\\(?:times|cdot|ast)(?![a-z]) ?", "*"),
    (r"\\(?:div|over)(?![a-z]) ?", "/"),
    (r"\\pi(?![a-z])", "π"),
    (r"\\pm(?![a-z]) ?", "±"),
    (r"\\(?:text[a-z]*|math[a-z]*|boxed|fbox|mbox|left|right|displaystyle|bf|rm)(?![a-z]) ?", ""),
    (r"\^ ?\{([-+]?\d{1,9})\}", r"^\1"),
    (r"\^ ?\{?\\circ\}?", "°"),
]
PLAIN = re.compile(r"[-0-9.,:/ \n]*")
HTML_ENTITY = re.compile(r"&#?\w{2,8};")
ONE_CHARACTER_FRACTION = re.compile(rf"(\d?)([{''.join(ONE_CHARACTER_FRACTIONS)}])")


def plain_text(text: str) -> str:
    """A text with its dashes, blanks, quotes, currencies, fullwidth characters and LaTeX in plain characters."""
    if PLAIN.fullmatch(text):  # fast: most answers, and all right ones
        return text
    if "&" in text:
        text = HTML_ENTITY.sub(lambda m: html.unescape(m[0]), text)  # of a bounded length: &minus; &nbsp; &#8722;
    text = ONE_CHARACTER_FRACTION.sub(lambda m: m[1] + " " * len(m[1]) + ONE_CHARACTER_FRACTIONS[m[2]], text)
    text = text.translate(TYPOGRAPHY)
    for pattern, new in (LATEX if "\\" in text or "{" in text else []) + WORDS:
        text = re.sub(pattern, new, text)  # re keeps compiled patterns
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """One way to write a number."""

    example: str
    pattern: str
    value: Callable[[re.Match[str]], Fraction | None]
    whole: bool = False  # whether an answer block with such a number, a sign and nothing else earns `integer`


MAGNITUDES = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
MAGNITUDES |= {"k": 3, "mn": 6, "bn": 9}  # written by a number -> its power of 10
MAGNITUDE = r"(?:(?:[ -]?(?i:(?:hundred|thousand|lakh|million|crore|billion|trillion)s?)|[ ]?[kK]|mn|bn)(?![A-Za-z]))"
GROUPS = r"[1-9][0-9]{0,2}(?P<separator>[,' _])[0-9]{3}(?:(?P=separator)[0-9]{3})*"
DECIMAL = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"


def _digits(text: str) -> Fraction:
    return Fraction(re.sub("[,' _]", "", text))


def _magnitude(word: str) -> int:
    return 10 ** MAGNITUDES[word.lower().strip(" -").rstrip("s")]


def _quotient(numerator: str, denominator: str) -> Fraction | None:
    """A fraction; None for a division that has an integer as its result or none at all."""
    value = Fraction(int(numerator), int(denominator)) if int(denominator) else Fraction(0)
    return value if value.denominator > 1 else None


def _mixed(whole: str, numerator: str, denominator: str) -> Fraction | None:
    part = _quotient(numerator, denominator)
    return int(whole) + part if part is not None and part < 1 else None


NUMBER_CASES = [
    Case("1080", r"[0-9]+", lambda m: _digits(m[0]), whole=True),
    Case("1,080", GROUPS, lambda m: _digits(m[0]), whole=True),
    Case("72.50", DECIMAL, lambda m: _digits(m[0])),
    Case("1,080.50", rf"{GROUPS}\.[0-9]+", lambda m: _digits(m[0])),
    Case(
        "72k", rf"({DECIMAL}|{GROUPS})(?P<magnitude>{MAGNITUDE})", lambda m: _digits(m[1]) * _magnitude(m["magnitude"])
    ),
    Case("3/2", r"([0-9]+) ?/ ?([0-9]+)", lambda m: _quotient(m[1], m[2])),
    Case("1 1/2", r"([0-9]+) ([0-9]+)/([0-9]+)", lambda m: _mixed(m[1], m[2], m[3])),
    Case("1.5e3", rf"{DECIMAL}[eE][-+]?[0-9]{{1,2}}", lambda m: Fraction(m[0])),
    Case("7.2*10^3", rf"({DECIMAL}) ?[*x] ?10\^([-+]?[0-9]{{1,2}})", lambda m: Fraction(f"{m[1]}e{m[2]}")),
]
INTEGER = re.compile(rf"[-+]?(?:{'|'.join(case.pattern for case in NUMBER_CASES if case.whole)})")
PLAIN_DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")  # "0." is an answer, but not written plainly


def is_integer(text: str) -> bool:
    """Whether a text is a whole number, in any typography, and nothing else."""
    return INTEGER.fullmatch(text.translate(TYPOGRAPHY)) is not None


def is_decimal(text: str) -> bool:
    """Whether a text is a number in plain digits, in any typography, and nothing else."""
    return PLAIN_DECIMAL.fullmatch(text.translate(TYPOGRAPHY)) is not None


# Symbols between digits join them to one find, except those that certainly separate.
SYMBOL = r"""(?:_|[^\s\w()\[\]{}<>=|;"?!#&@≈→⇒、。])"""
OPERATOR = r" {0,3}[-+*/^xX] {0,3}\$?[-+]?"
THOUSANDS, MIXED = r"(?<!\d{4}) (?=\d{3}(?!\d))", r" (?=\d+ ?/ ?\d)"  # blanks in 1 080 and in 1 1/2
JOIN = rf"(?:{SYMBOL}{{1,3}}|{OPERATOR}| : |[eE][-+]?|{THOUSANDS}|{MIXED})"
# What after a number makes it unreadable: a power, a constant, a letter that may be a factor or a unit.
FACTOR = r"(?: ?\*? ?(?:π|√|pi\b|sqrt\b)| ?\^|‰|[MBT](?![A-Za-z])|[百千万萬億亿만억]| and an? (?:half|third|quarter))"
NUMBER = re.compile(
    rf"(?P<number>(?:\d+|\.\d+){MAGNITUDE}?(?:{JOIN}\d+{MAGNITUDE}?)*)(?P<percent> ?%)?(?P<factor>{FACTOR})?"
)
BEFORE_NUMBER = re.compile(
    rf"""(?:
        (?:\A|[=:(≈>]|\b(?:is|are|was|equals))[ ]{{0,3}}(?P<spaced_sign>[-+])[ ]{{1,3}}{QUOTES}  # = - 5
      | (?P<undecided>
            [A-Za-z0-9)\]}}%°^](?:[-+][ ]{{0,3}}|[ ]{{1,3}}[-+][ ]{{1,3}})  # x-5, x - 5: a sign or an operator
          | [-+][ ]{{1,3}} | [-+±][ ]?\$?[ ]?[-+] | ±[ ]?                   # - 5, --5, ±5
          | [A-Za-z√π^] | [A-Za-z)\]}}]_                                    # x5, x_5
          | (?:\\[A-Za-z]{{1,20}}|[}}^_√])[ ]?\{{                           # \log{{5}}
        )[-+]?{QUOTES}
      | (?P<sign>[-+]){QUOTES}
      | (?P<unclear>[-+±][ ]{{0,3}}(?:_|[^\s\w<>=:;,.!?|]){{1,6}}[ ]{{0,3}})  # other symbols after a sign
    )\Z""",
    re.VERBOSE,
)
LONGEST_BEFORE = 32  # characters before a number that are looked at


def read_number(match: re.Match[str]) -> Fraction | None:
    """The exact value of what `NUMBER` found; None if it is unreadable."""
    text, start = match["number"], match.start()
    before = BEFORE_NUMBER.search(match.string, max(0, start - LONGEST_BEFORE), start)
    if match["factor"] or len(text) > LONGEST_NUMBER or (before and (before["undecided"] or before["unclear"])):
        return None
    for case in NUMBER_CASES:
        if found := re.fullmatch(case.pattern, text):
            value = case.value(found)
            return -value if value and before and "-" in (before["spaced_sign"], before["sign"]) else value
    return None


def write_number(value: Fraction) -> str:
    """The plain decimal, "1080" or "-2.5", or else the fraction, "1/3": equal numbers are equal texts."""
    with localcontext(prec=4 * LONGEST_NUMBER):
        decimal = Decimal(value.numerator) / Decimal(value.denominator)
        return f"{decimal.normalize():f}" if Fraction(decimal) == value else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------------
HOUR, MINUTE, SECOND = r"[ ]?h(?:(?:ou)?rs?)?", r"[ ]?m(?:in(?:ute)?s?)?", r"[ ]?s(?:ec(?:ond)?s?)?"
AND = r"[ ,]{0,2}(?:and[ ])?"
IN_UNITS = rf"([0-9]{{1,2}}){HOUR}{AND}([0-9]{{1,2}}){MINUTE}(?:{AND}([0-9]{{1,2}}){SECOND})?(?![A-Za-z])"
TIME_CASES = [  # example, and a pattern of hour, minute and perhaps second
    ("08:15:30", r"([0-9]{1,2})[ :]+([0-9]{1,2})[ :]+([0-9]{1,2})"),
    ("8:15", r"([0-9]{1,2}) ?: ?([0-9]{2})()"),
    ("8h 15m 30s", IN_UNITS),
]
# Blanks may surround the colons: two of one kind, or a single one before the seconds. "Clock 1: 08:15:30" is one time.
SPACED = r"\d{1,2}(: | :)\d{1,2}\1\d{1,2}(?!\d)"
COLONS = r"\d+(?::| : )\d+(?: ?: ?\d{2}(?!\d))?(?:(?::| : )\d+)*"
TIME = re.compile(rf"(?<!\d)(?<!\d:)(?<!\d : )(?:{SPACED}|{COLONS}|{IN_UNITS})")


def read_time(match: re.Match[str]) -> str | None:
    """What `TIME` found as HH:MM:SS, with seconds that are not given as 0; None if it is no time of a day."""
    for _, pattern in TIME_CASES:
        if found := re.fullmatch(pattern, match[0]):
            hour, minute, second = (int(part or 0) for part in found.groups())
            return f"{hour:02}:{minute:02}:{second:02}" if hour < 24 and minute < 60 and second < 60 else None
    return None


def is_full_time(text: str) -> bool:
    """Whether a text has the form HH:MM:SS."""
    return re.fullmatch(r"[0-9]{2}:[0-9]{2}:[0-9]{2}", text) is not None


def clock_seconds(time: object) -> int | None:
    """Seconds on a 12-hour dial, 0 to 43,199, of an "HH:MM:SS"; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{2}):([0-9]{2})", time) if isinstance(time, str) else None
    return (int(match[1]) * 3600 + int(match[2]) * 60 + int(match[3])) % 43200 if match else None


# ---------------------------------------------------------------------------------------------------------------------
# Choices and texts
# ---------------------------------------------------------------------------------------------------------------------
# A capital from A to J that stands alone; "A dog" and "I think" have a word after it, other
# than "A or B". Or a small letter with nothing else.
CHOICE = re.compile(r"(?<![\w'])[A-J](?![\w'])(?! (?!or |and )[a-z])|\A[(\[]?[a-j][)\].:]?\Z")
LINE = re.compile(r"\S[^\n]*")
LONGEST_LINE = 1000  # characters; a longer line is no answer
PLAIN_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[0-9]+/[0-9]+)")
MARKS = " \t.,;:!?\"'`*_()[]{}"  # around a text


def is_plain_number(text: str) -> bool:
    """Whether a text is a whole number, a decimal or a fraction in digits, and nothing else."""
    return PLAIN_NUMBER.fullmatch(text.translate(TYPOGRAPHY)) is not None


def read_line(match: re.Match[str]) -> str | None:
    """What `LINE` found in small letters, with single blanks, without punctuation around it; None if nothing is left or
    if it is too long."""
    line = match[0]
    if len(line) > LONGEST_LINE:
        return None
    words = unicodedata.normalize("NFKC", line).casefold().split()
    return " ".join(words).strip(MARKS) or None
