import os
import time
from pathlib import Path

from shards.claim import CLAIM_FOLDER, Claims
from shards.owner import own_name


def leave_claim(out: Path, name: str, owner: str, age_s: float = 0.0) -> Path:
    """A claim as another process has left it."""
    path = out / CLAIM_FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(owner)
    touched = time.time() - age_s
    os.utime(path, (touched, touched))
    return path


def test_one_of_two_gets_it(tmp_path: Path) -> None:
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert one.take("a")
        assert not two.take("a")
        assert f"process {os.getpid()} on" in two.holder_of("a")
        one.release("a")
        assert two.take("a")
    assert not (tmp_path / CLAIM_FOLDER).exists()


def test_a_claim_of_another_host_holds_while_it_is_touched(tmp_path: Path) -> None:
    leave_claim(tmp_path, "fresh", "elsewhere_1-7-00000000", age_s=30)
    leave_claim(tmp_path, "old", "elsewhere_1-7-00000000", age_s=90)
    leave_claim(tmp_path, "empty", "", age_s=90)
    with Claims(tmp_path) as claims:
        assert not claims.take("fresh")
        assert claims.holder_of("fresh") == "process 7 on elsewhere"
        assert claims.take("old")
        assert claims.take("empty")
    assert [path.name for path in (tmp_path / CLAIM_FOLDER).iterdir()] == ["fresh"]


def test_a_claim_of_an_ended_process_of_this_host_is_taken_at_once(tmp_path: Path) -> None:
    machine = own_name().rsplit("-", 2)[0]
    leave_claim(tmp_path, "ended", f"{machine}-4194304-00000000")
    leave_claim(tmp_path, "alive", f"{machine}-{os.getppid()}-00000000")
    with Claims(tmp_path) as claims:
        assert claims.take("ended")
        assert not claims.take("alive")


def test_held_claims_are_touched(tmp_path: Path) -> None:
    with Claims(tmp_path, abandoned_after_s=0.3) as holder, Claims(tmp_path, abandoned_after_s=0.3) as other:
        holder.take("a")
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            assert not other.take("a")
            time.sleep(0.05)


def test_a_claim_that_was_taken_over_is_not_given_up_by_its_first_holder(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        claims.take("a")
        leave_claim(tmp_path, "a", "elsewhere_1-7-00000000")
        claims.release("a")
        assert (tmp_path / CLAIM_FOLDER / "a").exists()
