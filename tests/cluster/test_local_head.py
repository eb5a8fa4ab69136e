"""head.sh, for real: a head on free ports, a job with the token, none without."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_scripts import LOCAL, ROOT, Head, clean_environment, status


def test_jobs_api_asks_for_the_token(head: Head) -> None:
    jobs = f"{head.dashboard}/api/jobs/"
    assert status(jobs) == 401
    assert status(jobs, Authorization=f"Bearer {'0' * 64}") == 403
    assert status(jobs, Authorization=f"Bearer {head.token_path.read_text()}") == 200
    assert stat.S_IMODE(head.token_path.stat().st_mode) == 0o600
    assert len(head.token_path.read_text()) == 64


def test_a_submitted_job_runs_on_the_head(head: Head, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import ray\n"
        "ray.init(log_to_driver=False)\n"
        "task = ray.remote(num_cpus=1)(lambda: 19 + 23)\n"
        "print('nodes:', len(ray.nodes()), 'sum:', ray.get(task.remote()))\n"
    )
    metadata = ["--metadata-json", '{"run": "trivial"}']
    arguments = ["--address", head.dashboard, "--working-dir", str(tmp_path), *metadata, "--submission-id", "trivial"]
    job = head.ray("job", "submit", *arguments, "--", "python", "job.py")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "nodes: 1 sum: 42" in job.stdout
    assert f"ray job submit --address {head.dashboard}" in head.output
    listed = head.ray("job", "list", "--address", head.dashboard)
    assert "'run': 'trivial'" in listed.stdout and "SUCCEEDED" in listed.stdout


@pytest.mark.slow
def test_a_sweep_is_submitted_under_its_name_and_commit(head: Head) -> None:
    def submit(spec: str) -> subprocess.CompletedProcess[str]:
        address = ["--address", head.dashboard]
        return head.run(sys.executable, "jobs/submit.py", "sweep", spec, "--dry-run", *address)

    for attempt in (1, 2):
        done = submit("jobs/sweep_tiny.yaml")
        assert done.returncode == 0 and f"tiny-sweep-a{attempt} is submitted" in done.stdout, done.stderr
        output = head.ray("job", "logs", "--address", head.dashboard, "--follow", f"tiny-sweep-a{attempt}").stdout
        assert "budget: 4 schedules" in output, output
    listed = head.ray("job", "list", "--address", head.dashboard).stdout
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "'name': 'tiny-sweep'" in listed and (commit.stdout.strip() or "unknown") in listed
    refused = submit("jobs/none.yaml")
    assert refused.returncode == 2 and "SPEC = jobs/none.yaml" in refused.stderr


def test_a_second_head_on_the_same_port_is_refused(head: Head) -> None:
    second = subprocess.run(
        [LOCAL / "head.sh"], capture_output=True, text=True, timeout=30, check=False, env=head.environment
    )
    assert second.returncode == 1
    assert f"port {head.environment['HEAD_PORT']} on 127.0.0.1 is in use" in second.stderr
    assert "HEAD_PORT" in second.stderr


def refused(**variables: str) -> str:
    result = subprocess.run(
        [LOCAL / "head.sh"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=clean_environment() | variables,
    )
    assert result.returncode == 1, result.stdout
    return result.stderr


def test_bad_settings_are_named() -> None:
    assert "HEAD_PORT=ray is no port number" in refused(HEAD_PORT="ray")
    assert "HEAD_PORT=70000 is no port number" in refused(HEAD_PORT="70000")
    assert "RAY_AUTH_TOKEN is set" in refused(RAY_AUTH_TOKEN="abc")
    assert "longer than 40 characters" in refused(HEAD_TEMP="/tmp/" + "x" * 40)
    assert sys.platform != "linux" or "must be a folder" in refused(HEAD_STATE="/proc/head", HEAD_PORT="6399")


@pytest.mark.slow
# Three submissions, each of which starts a driver and its workers.
@pytest.mark.timeout(1200)
def test_a_run_goes_on_from_another_folder_after_an_edit(head: Head, tmp_path: Path) -> None:
    """Ray unpacks each submission's files into a folder of its own: base and data are the same by content alone."""

    def submit(folder: str, steps: int, *changes: str) -> str:
        fields = {
            **{"training.max_steps": steps, "training.warmup_steps": 0, "training.schedule": "constant"},
            **{"training.batch_size": 2, "training.checkpoint_every": 1, "evaluation.every": 0},
            **{"evaluation.max_samples": 4, "evaluation.batch_size": 2, "cluster.workers": 1},
            "cluster.storage": tmp_path / "runs",
        }
        options = [f"--set={name}={value}" for name, value in fields.items()]
        address = ["--address", head.dashboard]
        script = str(tmp_path / folder / "jobs/submit.py")
        done = head.run(sys.executable, script, "train", str(tmp_path / folder / "jobs/tiny.yaml"), *options, *address)
        assert done.returncode == 0, done.stderr
        job = done.stdout.split()[0]
        return head.ray("job", "logs", "--address", head.dashboard, "--follow", job, timeout=400).stdout

    for folder in ("one", "two", "three"):
        shutil.copytree(ROOT / "jobs", tmp_path / folder / "jobs")
    assert "finished after 2 steps" in submit("one", 2)
    (tmp_path / "two/jobs/notes.txt").write_text("an edit, which makes another package of the folder")
    shutil.rmtree(tmp_path / "one")
    assert "finished after 4 steps" in (said := submit("two", 4)), said
    result = json.loads((tmp_path / "runs/tiny-maps/result.json").read_text())
    assert result["step"] == 4 and result["start_step"] == 2
    # Other content under the same names is another base.
    weights = next((tmp_path / "three/jobs/assets/tiny_base").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = submit("three", 6)
    assert "model.checkpoint = " in said and "the run was started with other content" in said, said
