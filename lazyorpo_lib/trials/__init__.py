"""Several runs: recipes, probe."""

_MOVED = {"compare_recipes": "recipes", "probe": "probe"}  # of the module of this name in the flat layout


def __getattr__(name: str):
    if name in _MOVED:
        place = f"{__name__}.{_MOVED[name]}"
        raise ImportError(f"{__name__}.{name} has moved: import it from {place}.", name=place)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
