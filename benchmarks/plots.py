def draw() -> list[str]:
    """x."""
    return []
