"""Captions of the experiment `wordings`: what training had, and what it did not."""

from collections.abc import Callable


def with_article(word: str) -> str:
    """Return "a" or "an" and the word."""
    return f"an {word}" if word in ("orange", "eight") else f"a {word}"


# (colour, digit) -> caption; training had only the first two, without the held-out pairs
WORDINGS: dict[str, Callable[[str, str], str]] = {
    "trained": lambda colour, digit: f"{with_article(colour)} {digit}",
    "trained, too": lambda colour, digit: f"the digit {digit} in {colour}",
    "capitals": lambda colour, digit: f"{with_article(colour)} {digit}".upper(),
    "wrong article": lambda colour, digit: f"{with_article(digit).split()[0]} {colour} {digit}",
    "no article, so no space": lambda colour, digit: f"{colour} {digit}",
    "templates mixed": lambda colour, digit: f"the {colour} digit {digit}",
    "turned round": lambda colour, digit: f"a {digit} {colour}",
    "shortened": lambda colour, digit: f"the {digit} in {colour}",
    "unknown word before": lambda colour, digit: f"draw {with_article(colour)} {digit}",
    "unknown word behind": lambda colour, digit: f"{with_article(colour)} {digit} please",
}
