"""The table of GPUs."""

from __future__ import annotations

import pytest

from maps_ray.devices import DEVICES, SIZES, device_map_fault, device_named, device_titled


def test_names_end_with_the_label_of_a_memory_that_is_about_that_big():
    for name, device in DEVICES.items():
        label = int(name.rsplit("-", 1)[1])
        assert 0.9 * label < device.memory / 1e9 < 1.1 * label, name
    assert [int(name.rsplit("-", 1)[1]) for name in SIZES] == [24, 40, 48, 80, 141]


def test_an_unknown_device_lists_the_known_ones():
    assert device_named(" H100-80 ") is DEVICES["h100-80"]
    with pytest.raises(ValueError, match=r"known: rtx3090-24, .*h100-80.*b200-180"):
        device_named("tpu-v5")


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H100 PCIe", "h100-pcie-80"),
        ("NVIDIA H200", "h200-141"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A10", "a10-24"),
        ("NVIDIA A10G", "a10g-24"),
        ("NVIDIA A40", "a40-48"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_is_found_by_what_cuda_calls_it(title, name):
    found = device_titled(title)
    assert (found and found.name) == name


def test_the_peak_depends_on_the_precision():
    assert DEVICES["h100-80"].peak_flops("bf16") == pytest.approx(989.4e12)
    assert DEVICES["a100-40"].peak_flops("fp32") == pytest.approx(19.5e12)


def test_the_form_of_a_device_map():
    for right in ("auto", "cpu", "cuda", "cuda:3", '{"language_model": "cpu"}', '{"max_memory": {"0": "20GiB"}}'):
        assert device_map_fault(right) is None
    for wrong in ("gpu", "cuda:x", "[1]", "{", ""):
        assert "must be auto, cpu" in device_map_fault(wrong)
