"""Reading an answer: the patterns of numbers and times, and their values."""

import re
from decimal import Decimal, InvalidOperation

# Digits are 0 to 9 only. A minus after a letter, digit or bracket is an operator ("10-3"), not a sign.
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
SIGN = r"(?:(?<![\w)\]])[-−+]\$?|\$[-−]?)?"
NUMBER = re.compile(rf"{SIGN}(?:{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
INTEGER = re.compile(rf"[-−+]?{DIGITS}")
PLAIN_DECIMAL = re.compile(r"[-−+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
CLOCK_TIME = re.compile(r"(?<![0-9:])[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?![0-9:])")
FULL_CLOCK_TIME = re.compile(r"[0-9]{2}:[0-9]{2}:[0-9]{2}")

LONGEST_NUMBER = 64  # characters; no answer needs more, and converting more would not take linear time


def read_number(text: str) -> Decimal | None:
    """The exact value of a number: `1,080`, `$1080`, `1080.00`, `1080` are the same. None if it is none or huge."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER or not NUMBER.fullmatch(text):
        return None
    try:
        value = Decimal(text.replace(",", "").replace("$", "").replace("−", "-"))
    except InvalidOperation:  # an exponent too large even for Decimal
        return None
    return value if abs(value.adjusted()) <= LONGEST_NUMBER else None


def clock_seconds(time: object) -> int | None:
    """Seconds on a 12-hour dial, 0 to 43,199, of an "HH:MM:SS"; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{2}):([0-9]{2})", time) if isinstance(time, str) else None
    return (int(match[1]) * 3600 + int(match[2]) * 60 + int(match[3])) % 43200 if match else None
