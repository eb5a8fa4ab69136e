"""What people call LIBERO's objects, following the words of LIBERO's own task sentences."""

from __future__ import annotations

_NAMES = {
    "akita_black_bowl": "black bowl",
    "chefmate8_frypan": "frying pan",
    "cookies": "cookie box",
    "cream_cheese": "cream cheese",
    "desk_caddy": "caddy",
    "flat_stove": "stove",
    "glazed_rim_porcelain_ramekin": "ramekin",
    "new_salad_dressing": "salad dressing",
    "porcelain_mug": "white mug",
    "red_coffee_mug": "red mug",
    "short_cabinet": "white cabinet",
    "short_fridge": "fridge",
    "slide_cabinet": "sliding cabinet",
    "white_yellow_mug": "yellow and white mug",
    "wooden_two_layer_shelf": "wooden shelf",
}


def human_name(category: str) -> str:
    """The name of a LIBERO object category, for instance `black bowl` for `akita_black_bowl`."""
    return _NAMES.get(category, category.replace("_", " "))
