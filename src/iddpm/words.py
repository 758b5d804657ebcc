"""Numbers as people read them."""


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h, 2.1 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{1 if name == 'h' else 0}f} {name}"
    return f"{seconds / 86400:.1f} days"


def many(n: int, what: str) -> str:
    """1 image, 2 images."""
    return f"{n:,} {what}" + "s" * (n != 1)


def rate(per_second: float) -> str:
    """1,234, 12 or 0.37 a second."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def size(in_bytes: float) -> str:
    """512 kB, 3.4 MB, 1.2 GB."""
    power = 1 if in_bytes < 1e6 else 2 if in_bytes < 1e9 else 3
    return f"{in_bytes / 1000**power:.3g} {['', 'k', 'M', 'G'][power]}B"
