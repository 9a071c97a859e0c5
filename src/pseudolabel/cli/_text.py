"""Text for a terminal."""

__all__ = ["one_line"]


def one_line(text: str) -> str:
    """The text without line breaks and control characters: names of files may hold any."""
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
