"""Crops for tests, by what they frame."""


def frames(left: float, top: float, wide: float, high: float, mirror: float = 0, width: float = 1, height: float = 1) -> list[float]:
    """The row of `random_crops` that frames these shares of an image of that size."""
    x, y = left / (1 - wide) if wide < 1 else 0.0, top / (1 - high) if high < 1 else 0.0
    return [wide * high, wide * width / (high * height), x, y, float(mirror)]
