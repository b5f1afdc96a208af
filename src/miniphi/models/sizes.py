"""How numbers of bytes are written for people. Knows nothing else."""

__all__ = ["format_bytes"]

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """Write a number of bytes with a binary unit and three or four digits, such as `1.50 GiB`."""
    if abs(count) < 1024:
        return f"{count} B"
    power = 1
    while abs(count) >= 1000 * 1024**power and power < len(_UNITS):
        power += 1
    size = count / 1024**power
    digits = 2 if abs(size) < 10 else 1 if abs(size) < 100 else 0
    return f"{size:.{digits}f} {_UNITS[power - 1]}"
