"""Which rows, windows or batches are looked at where all of them would take too long."""


def evenly_spread(total: int, wanted: int | None) -> list[int]:
    """Indices of `wanted` of `total` items at equal distances, from the first; all where `wanted` is None or more."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return [index * total // wanted for index in range(wanted)]
