"""The set sizes at which every ordering of features is evaluated, so that their curves can be compared point by point."""


def grid(candidates: int, per_doubling: int = 2) -> list[int]:
    """Set sizes from 0 to ``candidates``: every size up to 4, then ``per_doubling`` sizes for each doubling, and all."""
    sizes, step = {0, candidates} | set(range(min(candidates, 4) + 1)), 0
    while (size := round(4 * 2 ** (step / per_doubling))) < candidates:
        sizes.add(size)
        step += 1
    return sorted(sizes)
