"""What a PATTERN on the command line matches."""


def as_glob(pattern: str) -> str:
    """Return a glob as it is, and for a bare word the one of every name that holds it."""
    return pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"


def names_in(listed: str | None) -> list[str]:
    """Return names that are listed with commas between them."""
    return [name.strip() for name in (listed or "").split(",") if name.strip()]
