"""What a PATTERN on the command line matches."""


def as_glob(pattern: str) -> str:
    """Return a glob as it is, and for a bare word the one of every name that holds it."""
    return pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
