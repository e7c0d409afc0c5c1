"""The small Flux.1 of the tests in a server: 200 MB with its VAE, which has its real size."""

from functools import partial

from make_checkpoint import Recipe

WIDTHS = {"hidden": 256, "t5": 256, "clip_l": 96}
"""Of transformer and text encoders. ``small_flux.py`` has a server take them."""

small_recipe = partial(Recipe, **WIDTHS)
