import json
import subprocess
from collections import namedtuple

import pytest
from chain import call

from factory import doctor
from factory.devices import Devices, Gpu, Product
from factory.doctor import Finding, as_lines, as_report, examine

SECRET = "hf_notForAnyonesEyes123"
WORKS = Product("cpu", 0.002)
NAMES = {"packages", "torch", "gpu", "driver", "bitsandbytes cpu", "cpu", "memory", "disk", "hub token", "hub cache"}
Usage, Memory = namedtuple("Usage", "total used free"), namedtuple("Memory", "total available")


@pytest.fixture
def machine(workplace, monkeypatch):
    """A function that examines a machine with the given devices, without asking this one for its own."""

    def of(**seen):
        monkeypatch.setattr(doctor, "devices", lambda products: Devices(**{"torch": "2", "products": (WORKS,)} | seen))
        return {finding.name: finding for finding in examine()}

    return of


def test_every_finding_has_its_remedy(machine):
    found = machine()
    assert set(found) >= NAMES
    for finding in found.values():
        assert finding.state in ("ok", "warning", "fault")
        assert finding.said and bool(finding.remedy) == (finding.state != "ok"), finding
    assert found["gpu"].said == "none" and found["gpu"].state == "warning"
    assert "llamafactory 0.9.5" in found["packages"].said


def test_gpus_and_what_they_lack(machine, monkeypatch):
    answer = subprocess.CompletedProcess([], 0, "580.95.05\n", "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: answer)
    for gpu, state, remedy in (
        (Gpu("A100", 79.3, 78.9, True), "ok", ""),
        (Gpu("T4", 14.7, 14.5, False), "warning", "fp16: true and bf16: false"),
        (Gpu("A100", 79.3, 9.0, True), "warning", "nvidia-smi"),
    ):
        found = machine(gpus=(gpu,), accelerator="cuda")
        assert found["gpu"].state == state and remedy in found["gpu"].remedy and gpu.name in found["gpu"].said
        assert (found["driver"].state, found["driver"].said) == ("ok", "580.95.05")
    found = machine(cuda="13.0")
    assert (found["driver"].state, found["driver"].said) == ("fault", "580.95.05, but torch sees no GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine(cuda="13.0")
    assert found["driver"].state == "ok" and "hides them" in found["gpu"].said
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], 9, "", ""))
    assert machine()["driver"].state == "ok", "without a GPU no driver is needed"


def test_a_broken_torch_or_bitsandbytes_is_a_fault(machine):
    found = machine(failure="importing torch ended with -11: it said nothing", products=())
    assert found["torch"].state == "fault" and "make install" in found["torch"].remedy
    for product in (Product("cpu", failure="Error: no kernel"), Product("cpu", 0.8), Product("cpu", float("nan"))):
        assert machine(products=(product,))["bitsandbytes cpu"].state == "fault"


def test_versions_are_compared_with_the_pins(tmp_path):
    lock = "click==0.1 \\\n    --hash=sha256:00\nnumpy==9 ; sys_platform == 'no-such'\nabsent==3 \\\n# via\n"
    (tmp_path / "requirements.lock").write_text(lock, encoding="utf-8")
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["click>=8", "numpy", "absent"]\n', encoding="utf-8")
    found = doctor.packages(tmp_path)
    assert (found.state, found.remedy) == ("fault", "make install")
    assert "absent is missing (locked 3), click " in found.said and "numpy" not in found.said
    project.unlink()
    assert doctor.packages(tmp_path).state == "fault"


def test_the_token_is_never_shown(machine, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert machine()["hub token"].state == "warning"
    (tmp_path / "token").write_text(SECRET)
    assert machine()["hub token"].said == f"present in {tmp_path / 'token'}"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    found = machine()
    assert found["hub token"].said == "present in HF_TOKEN"
    assert SECRET not in json.dumps(as_report(list(found.values()))) + "".join(as_lines(list(found.values())))


def test_the_hub_may_be_switched_off_or_its_cache_closed(machine, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = machine()["hub cache"].said
    assert said.startswith(f"{tmp_path / 'hub'}: 1 model(s), ") and "HF_HUB_OFFLINE" in said
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert machine()["hub cache"].state == "fault"


def test_disk_and_memory(machine, monkeypatch):
    for free, states in ((1, ("fault", "warning")), (20, ("warning", "ok")), (500, ("ok", "ok"))):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free * 2**30))
        found = machine()
        assert (found["disk"].state, found["hub cache"].state) == states
    for total, state in ((8, "warning"), (64, "ok")):
        monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda total=total: Memory(total * 2**30, 2**30))
        assert machine()["memory"].state == state


@pytest.mark.parametrize(
    ("flags", "part"),
    [("flags\t\t: sse2 avx512_bf16 amx_bf16", "avx512_bf16 and amx_bf16"), ("Features\t: asimd", "use fp32")],
)
def test_the_flags_of_the_cpu(tmp_path, flags, part):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n", encoding="utf-8")
    assert part in doctor.cpu(tmp_path / "cpuinfo").said and doctor.cpu(tmp_path / "absent").state == "ok"


def test_the_command_ends_with_1_on_a_fault(workplace, monkeypatch):
    findings = [Finding("gpu", "warning", "none", "get one")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    result = call("doctor")
    assert result.exit_code == 0 and "warning gpu: none" in result.output and "get one" in result.output
    findings.append(Finding("disk", "fault", "1.0 GiB free here", "free some"))
    result = call("doctor", "--json")
    assert result.exit_code == 1
    content = json.loads(result.output)
    assert list(content["findings"][1].values()) == ["disk", "fault", "1.0 GiB free here", "free some"]
    assert {key: content[key] for key in ("ok", "faults", "warnings")} == {"ok": False, "faults": 1, "warnings": 1}
