"""One verb a file: ``f(model, episodes, *, …) -> xarray.Dataset``."""
