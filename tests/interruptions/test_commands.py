"""Each command that writes much, killed at every file operation, on a full disk, and twice at once.

After a kill the output folder holds files of the run before or of the new one, never of both, and the same
command then ends with the files of a run that nothing happened to. The slow tests go through some of each
command's operations; `python -m tests.interruptions.test_commands` goes through all and prints how many.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sae_lens import SAE

from tests.interruptions.commands import COMMANDS, comparable, make_sae, make_small, work
from tests.interruptions.harness import FINISHED, REFUSED, End, contents, end_of, restore, some
from writesae_lens.experiments import ExperimentResult
from writesae_lens.saelens.saving import check_checkpoint

SOME = 12  # points of each kind and command in the slow tests


class Case:
    """A command, the files of an earlier run with another seed, and those of an undisturbed run."""

    def __init__(self, name: str, folder: Path, sae: Path) -> None:
        self.name, self.root, self.sae = name, folder / name.replace(" ", "_"), sae
        self.out = self.root / "out"
        # `reproduce` keeps off the folder of a run with other settings.
        self.before: dict[str, bytes] = {}
        if name != "reproduce":
            self.run(seed=1)
            self.before = contents(self.out)
        self.earlier = comparable(self.out)
        self.restore()
        self.undisturbed = self.run()
        self.whole, self.sizes = comparable(self.out), sorted({len(x) for x in contents(self.root).values()})

    def restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        restore(self.out, self.before)

    def run(self, seed: int = 0) -> End:
        end = end_of(work(self.name, self.root, self.sae, seed), self.root)
        assert end.status == FINISHED, end.said
        return end

    def check_not_mixed(self) -> None:
        """Files that a reader can see are all of the earlier run or all of the new one."""
        seen = comparable(self.out)
        seen = {n: x for n, x in seen.items() if "/.writesae" not in f"/{n}" and "progress/" not in n}
        other = [n for n, x in seen.items() if self.earlier.get(n) != x]
        new = [n for n, x in seen.items() if self.whole.get(n) != x]
        assert not other or not new, f"of the new run only: {other}; of the earlier run only: {new}"
        for path in self.out.rglob("summary.json"):
            if "/.writesae" not in str(path):
                ExperimentResult.load(path.parent)
        for path in self.out.rglob("cfg.json"):
            if "/.writesae" not in str(path):
                SAE.load_from_disk(path.parent)
        names = ("L1H2", "L1H3") if self.name == "train several" else ("",)
        for path in (self.root / "ck").glob("*/*"):
            if not path.name.startswith("."):
                check_checkpoint(path, names)

    def check_goes_on(self) -> None:
        """The same command ends with the files of an undisturbed run, and leaves nothing else."""
        self.run()
        files = comparable(self.out)
        assert {name for name, _ in (files.items() ^ self.whole.items())} == set()
        left = [str(path.relative_to(self.root)) for path in self.root.rglob(".*")]
        assert left == []


def kill(case: Case, at_most: int | None = None) -> int:
    """Kill the command before each of its file operations; the number of points."""
    numbers = some(range(1, len(case.undisturbed.operations) + 1), at_most)
    for number in numbers:
        case.restore()
        end = end_of(work(case.name, case.root, case.sae), case.root, kill_at=number)
        assert end.status is None, f"operation {number}: {end}"
        try:
            case.check_not_mixed()
            case.check_goes_on()
        except Exception as error:
            raise AssertionError(f"{case.name}, killed at operation {number}: {error}") from error
    return len(numbers)


def fill(case: Case, at_most: int | None = None) -> int:
    """Let the disk be full from each operation on, and for files of each size; the number of points."""
    limits = [{"full_from": number} for number in some(case.undisturbed.creating(), at_most)]
    limits += [{"largest": max(size - 1, 0)} for size in case.sizes][:: 1 if at_most is None else 4]
    for limit in limits:
        case.restore()
        end = end_of(work(case.name, case.root, case.sae), case.root, **limit)
        try:
            assert end.status in (FINISHED, REFUSED), end.said
            assert "\n" not in end.said
            case.check_not_mixed()
            if end.status == REFUSED and case.before:  # the earlier files are all there
                assert case.before.items() <= contents(case.out).items() or case.whole == comparable(case.out)
            case.check_goes_on()
        except Exception as error:
            raise AssertionError(f"{case.name}, {limit}: {end}: {error}") from error
    return len(limits)


def twice(case: Case, delays: tuple[float, ...] = (0.0, 0.3, 1.0)) -> int:
    """Run the command twice at once, the second a little later; the number of pairs."""
    ends: list[End] = []

    def run(delay: float) -> None:
        time.sleep(delay)
        ends.append(end_of(work(case.name, case.root, case.sae), case.root))

    for delay in delays:
        case.restore()
        ends.clear()
        threads = [threading.Thread(target=run, args=(pause,)) for pause in (0.0, delay)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert FINISHED in [end.status for end in ends], ends
        for end in ends:
            assert end.status == FINISHED or "another run is writing to" in end.said, end
        assert comparable(case.out) == case.whole
        case.check_not_mixed()
    return len(delays)


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        yield make_sae(tmp_path_factory.mktemp("sae"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_or_on_a_full_disk_or_twice_at_once(name: str, sae: Path, tmp_path: Path) -> None:
    case = Case(name, tmp_path, sae)
    kill(case, SOME)
    fill(case, SOME)
    twice(case)


def main() -> None:
    """All points of the commands that are named, or of all; a number first takes so many of each kind."""
    names, at_most = sys.argv[1:], None
    if names and names[0].isdecimal():
        at_most = int(names.pop(0))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        sae = make_sae(Path(folder, "sae"))
        for name in names or COMMANDS:
            start = time.time()
            case = Case(name, Path(folder), sae)
            counts = kill(case, at_most), fill(case, at_most), twice(case)
            line = "{}: killed at {} operations, disk full at {}, {} pairs; {:.0f} s"
            sys.stdout.write(line.format(name, *counts, time.time() - start) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
