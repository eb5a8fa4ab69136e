"""Instructions for Metaworld's tasks, which have names only."""

from __future__ import annotations

_SENTENCES = {
    "assembly": "put the ring on the peg",
    "basketball": "put the ball in the basket",
    "bin-picking": "move the block from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press": "push the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press-wall": "reach around the wall and push the button",
    "coffee-button": "push the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "turn the faucet off",
    "faucet-open": "turn the faucet on",
    "hammer": "drive the nail in with the hammer",
    "hand-insert": "put the gripper into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole from the side",
    "peg-unplug-side": "pull the peg out of the hole",
    "pick-out-of-hole": "pick the puck out of the hole and bring it to the goal",
    "pick-place": "pick up the puck and bring it to the goal",
    "pick-place-wall": "pick up the puck and bring it over the wall to the goal",
    "plate-slide": "slide the plate into the net",
    "plate-slide-back": "slide the plate out of the net",
    "plate-slide-back-side": "slide the plate out of the net sideways",
    "plate-slide-side": "slide the plate into the net sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the block on the shelf",
    "soccer": "kick the ball into the net",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}


def sentence_of(task: str) -> str:
    """The instruction of a task, for instance `open the drawer` for `drawer-open-v3`."""
    name = task.rpartition("-v")[0] or task
    return _SENTENCES.get(name, name.replace("-", " "))
