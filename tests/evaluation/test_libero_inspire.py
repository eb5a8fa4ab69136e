"""The reconstructed suite: which edits are made to a task's text, without a simulator."""

from __future__ import annotations

import re

from maps_ray.evaluation.simulators.libero import inspire_task
from maps_ray.evaluation.simulators.suites import suite

TASK = """(define (problem LIBERO_Floor_Manipulation)
  (:domain robosuite)
  (:language Pick the butter and place it in the basket)
    (:regions
      (bin_region
          (:target floor)
          (:ranges (
              (-0.01 0.25 0.01 0.27)
            )
          )
      )
      (target_object_region
          (:target floor)
          (:ranges (
              (-0.145 -0.265 -0.095 -0.215)
            )
          )
      )
      (other_object_region_0
          (:target floor)
          (:ranges (
              (0.025 -0.125 0.075 -0.075)
            )
          )
      )
      (contain_region
          (:target basket_1)
      )
    )
  (:fixtures
    floor - floor
  )
  (:objects
    butter_1 - butter
    chocolate_pudding_1 - chocolate_pudding
    basket_1 - basket
  )
  (:init
    (On butter_1 floor_target_object_region)
    (On chocolate_pudding_1 floor_other_object_region_0)
    (On basket_1 floor_bin_region)
  )
  (:goal
    (And (In butter_1 basket_1_contain_region))
  )
)
"""


def test_a_task_moves_to_the_table_and_butter_and_chocolate_aside() -> None:
    found = inspire_task(TASK)
    assert "floor" not in found.lower()
    assert found.startswith("(define (problem LIBERO_Living_Room_Tabletop_Manipulation)")
    assert found.count("(:target living_room_table)") == 3 and "living_room_table - living_room_table" in found
    assert "(On basket_1 living_room_table_bin_region)" in found
    ranges = [[float(number) for number in part.split()] for part in re.findall(r"\(\s*\(([-\d. ]+)\)", found)]
    assert ranges == [[-0.01, 0.25, 0.01, 0.27], [-0.345, -0.065, -0.295, -0.015], [-0.175, 0.075, -0.125, 0.125]]
    # Goal, objects and sentence stay.
    for part in (":language", ":goal"):
        assert re.search(rf"\({part}.*", found)[0] == re.search(rf"\({part}.*", TASK)[0]
    about = suite("libero_object_inspire")
    assert (about.base, about.max_steps) == ("libero_object", 280)
