import json
import socket
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from factory import doctor
from factory.devices import Devices, Gpu, Product
from factory.doctor import Finding, as_lines, as_report, examine

SECRET = "hf_notForAnyonesEyes123"
WORKS = Product("cpu", 0.09, 0.002)
NAMES = [
    *("python", "packages", "torch", "gpu", "driver", "bitsandbytes cpu", "cpu", "memory", "disk", "hub token"),
    *("hub cache", "port 7860", "port 6006", "folders"),
]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def machine(workplace, monkeypatch):
    """A function that examines a machine with the given devices, without asking this one for its own."""

    def of(**seen):
        monkeypatch.setattr(doctor, "devices", lambda products: Devices(**{"torch": "2", "products": (WORKS,)} | seen))
        return {finding.name: finding for finding in examine()}

    return of


def test_every_finding_has_its_remedy(machine):
    found = machine()
    assert set(NAMES) <= set(found)
    for finding in found.values():
        assert finding.state in ("ok", "warning", "fault")
        assert finding.said and bool(finding.remedy) == (finding.state != "ok"), finding
    assert found["gpu"].said == "none" and found["gpu"].state == "warning"
    assert found["bitsandbytes cpu"].said == "a 4-bit product is 9.0% from fp32, 0.2% from its own weights"
    assert "llamafactory 0.9.5" in found["packages"].said


def test_gpus_and_what_they_lack(machine, monkeypatch):
    answer = subprocess.CompletedProcess([], 0, "580.95.05\n", "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: answer)
    found = machine(gpus=(Gpu("NVIDIA A100", 79.3, 78.9, True),), accelerator="cuda", cuda="13.0")
    assert (found["gpu"].state, found["gpu"].said) == ("ok", "0: NVIDIA A100, 79.3 GiB, 78.9 free, bf16")
    assert (found["driver"].state, found["driver"].said) == ("ok", "580.95.05")
    found = machine(gpus=(Gpu("Tesla T4", 14.7, 14.5, False),), accelerator="cuda")
    assert (found["gpu"].state, found["gpu"].said.endswith("no bf16")) == ("warning", True)
    assert "fp16: true and bf16: false" in found["gpu"].remedy
    found = machine(gpus=(Gpu("A100", 79.3, 9.0, True),), accelerator="cuda")
    assert found["gpu"].state == "warning" and "nvidia-smi" in found["gpu"].remedy
    found = machine(cuda="13.0")
    assert (found["driver"].state, found["driver"].said) == ("fault", "580.95.05, but torch sees no GPU")
    assert "update the driver for CUDA 13.0" in found["driver"].remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine(cuda="13.0")
    assert found["driver"].state == "ok" and "hides them" in found["gpu"].said


def test_a_broken_torch_or_bitsandbytes_is_a_fault(machine):
    found = machine(failure="importing torch ended with -11: it said nothing", products=())
    assert found["torch"].state == "fault" and "make install" in found["torch"].remedy
    found = machine(products=(WORKS, Product("cuda", failure="RuntimeError: no kernel image")))
    assert found["bitsandbytes cuda"].state == "fault" and "no kernel image" in found["bitsandbytes cuda"].said
    assert machine(products=(Product("cpu", 0.9, 0.8),))["bitsandbytes cpu"].state == "fault"
    assert machine(products=(Product("cpu", float("nan"), 0.001),))["bitsandbytes cpu"].state == "fault"


def test_versions_are_compared_with_the_pins(tmp_path):
    lock = (
        'click==0.1 \\\n    --hash=sha256:00\nJinja2==0.2\ncolorama==9 ; sys_platform == "no-such"\n# via\n    # x==1\n'
    )
    (tmp_path / "requirements.lock").write_text(lock + "absent-package==3 \\\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["click>=8", "numpy"]\n', encoding="utf-8")
    found = list(doctor.packages(tmp_path))
    assert [finding.state for finding in found] == ["fault", "warning"]
    assert found[0].said.startswith("click ") and found[0].said.endswith(", locked 0.1")
    assert "absent-package missing (locked 3)" in found[1].said and "jinja2" in found[1].said
    assert "colorama" not in found[1].said and {finding.remedy for finding in found} == {"make install"}
    (tmp_path / "pyproject.toml").unlink()
    assert [finding.state for finding in doctor.packages(tmp_path)] == ["fault"]


def test_the_token_is_never_shown(machine, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", SECRET)
    found = machine()
    assert found["hub token"] == Finding("hub token", "ok", "present in HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(SECRET)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    kept = machine()
    assert kept["hub token"].said == f"present in {tmp_path / 'token'}"
    (tmp_path / "token").unlink()
    absent = machine()["hub token"]
    assert absent.state == "warning" and "hf auth login" in absent.remedy
    shown = json.dumps([as_report(list(each.values())) for each in (found, kept)])
    assert SECRET not in shown and SECRET not in "\n".join(as_lines(list(kept.values())))


def test_the_hub_may_be_switched_off_or_its_cache_closed(machine, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    found = machine()
    assert found["hub cache"].said.startswith(f"{tmp_path / 'hub'}: 1 model(s), ") and "hub" not in found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert machine()["hub"].state == "warning"
    monkeypatch.setattr(doctor, "writable", lambda folder: False)
    assert machine()["hub cache"].state == machine()["folders"].state == "fault"


def test_disk_and_memory(machine, monkeypatch):
    for free, state in ((1, "fault"), (20, "warning"), (500, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free * 2**30))
        assert machine()["disk"].state == state
    assert "enough for a model of 89.5 billion weights" in machine()["disk"].said
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(0, 0, 46 * 2**30))
    found = machine()
    assert found["disk"].state == found["hub cache"].state == "ok", "the default model takes 8 GB three times"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(0, 0, 9 * 2**30))
    assert "8 GB to download" in machine()["hub cache"].remedy
    import psutil

    Memory = namedtuple("Memory", "total available")
    for total, state in ((8, "warning"), (64, "ok")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: Memory(total * 2**30, 2**30))
        assert machine()["memory"].state == state


def test_without_a_gpu_no_driver_is_needed(machine, monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], 9, "", ""))
    assert machine()["driver"].state == "ok"


def test_a_port_in_use_is_a_warning(machine, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {taken: ("somebody", "do this")})
        finding = machine()[f"port {taken}"]
        assert (finding.state, finding.remedy) == ("warning", "do this")
    assert machine()[f"port {taken}"].state == "ok"


@pytest.mark.parametrize(
    ("flags", "state", "part"),
    [
        ("flags\t\t: sse2 avx2 avx512_bf16 amx_bf16", "ok", "avx512_bf16 and amx_bf16"),
        ("flags\t\t: sse2 avx2", "ok", "bf16 is emulated, use fp32"),
        ("flags\t\t: sse2", "warning", "no avx2"),
        ("Features\t: asimd", "ok", "no avx512_bf16"),
    ],
)
def test_the_flags_of_the_cpu(tmp_path, flags, state, part):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n", encoding="utf-8")
    finding = doctor.cpu(tmp_path / "cpuinfo")
    assert finding.state == state and part in finding.said
    assert doctor.cpu(tmp_path / "absent").state == "ok"


def test_the_command_ends_with_1_on_a_fault(workplace, monkeypatch):
    findings = [Finding("gpu", "warning", "none", "get one")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    result = CliRunner().invoke(run.cli, ["doctor"])
    assert result.exit_code == 0
    assert result.output == "warning gpu: none\n          remedy: get one\n0 fault(s), 1 warning(s)\n"
    findings.append(Finding("disk", "fault", "1.0 GiB free here", "free some"))
    result = CliRunner().invoke(run.cli, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output) == {
        "ok": False,
        "faults": 1,
        "warnings": 1,
        "findings": [
            {"name": "gpu", "state": "warning", "said": "none", "remedy": "get one"},
            {"name": "disk", "state": "fault", "said": "1.0 GiB free here", "remedy": "free some"},
        ],
    }
    assert not list(Path().glob("*.json"))
