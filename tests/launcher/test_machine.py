"""What the launcher finds out about a machine, from device files and environment variables."""

from pathlib import Path

import pytest

from launcher.machine import this_machine


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_device_files_are_counted(devices: Path) -> None:
    found = this_machine(devices)
    assert (found.accelerator, found.devices, found.devices_are_restricted) == ("cuda", ("0", "1", "10"), False)
    assert found.cores >= 1


def test_visible_devices_restrict(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 10")
    found = this_machine(devices)
    assert (found.devices, found.devices_are_restricted) == (("1", "10"), True)


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("DS_ACCELERATOR", "cpu")])
def test_devices_can_be_hidden(devices: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert this_machine(devices).accelerator == "cpu"


def test_other_vendors_are_left_to_deepspeed(devices: Path) -> None:
    (devices / "kfd").touch()
    assert this_machine(devices).accelerator == "other"


def test_machine_without_devices(tmp_path: Path) -> None:
    assert this_machine(tmp_path).accelerator == "cpu"
