"""Runs and a sweep under random kills, as `benchmarks/chaos.py` does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_no_kind_is_left_out_of_twenty_kills_and_none_waits_for_one_that_is_not_there() -> None:
    from chaos import DECK, MOMENTS, Chance

    chance, same = Chance(3), Chance(3)
    everywhere = [kind for kind in DECK if kind not in ("trial actor", "S3 server")]
    draws = [chance.victim(everywhere, None) for _ in range(5)]
    draws += [chance.victim([*everywhere, "trial actor"], "trial actor") for _ in range(2)]
    draws += [chance.victim([*everywhere, "S3 server"], "S3 server") for _ in range(2)]
    draws += [chance.victim(list(DECK), None) for _ in range(11)]
    assert draws[5:9] == ["trial actor"] * 2 + ["S3 server"] * 2
    assert sum(DECK.values()) == 20 and Counter(draws) == DECK
    assert chance.victim(["node"], None) == "node"
    moments = [chance.moment()[0] for _ in range(8)]
    assert sorted(moments[:4]) == sorted(moments[4:]) == sorted([*MOMENTS, "while starting"])
    assert draws[:5] == [same.victim(everywhere, None) for _ in range(5)]


@pytest.mark.slow
def test_the_s3_server_keeps_its_objects_when_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chaos_machine import _free_ports

    from maps_ray.run_storage import RunStorage

    (port,) = _free_ports(1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    command = [sys.executable, "benchmarks/chaos_s3.py", "--port", str(port), "--bucket", "kept"]
    command += ["--folder", str(tmp_path)]
    content, storage = os.urandom(2**20), RunStorage("s3://kept/a folder", 60)
    for _ in range(2):
        server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            if not storage.exists("again"):
                storage.write("part/first", content)
                storage.write("part/gone", b"")
                storage.copy_folder("part", "copied", last="first")
                storage.remove("part/gone")
                storage.write("again", b"1")
            assert storage.files() == {"again": 1, "copied/first": 2**20, "copied/gone": 0, "part/first": 2**20}
            assert storage.read("copied/first") == storage.read("part/first") == content
        finally:
            server.kill()
            server.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "20", "--seed", "0"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "chaos.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert len(found["kills"]) == 20 and found["faults"] == []
    assert len({kill["victim"] for kill in found["kills"]}) >= 8
    assert {kill["when"] for kill in found["kills"]} >= {"while starting", "at work"}
    assert {course["case"] for course in found["courses"] if course["kills"]} >= {"ZeRO-2", "sweep", "ZeRO-3 on S3"}
