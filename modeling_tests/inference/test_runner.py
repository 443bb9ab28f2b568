"""The runner and its journal: what is kept, what is run again, and one file for any number of processes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_denseseg.inference.predict.journal import KEY_FILE, Entry, Journal
from hf_denseseg.inference.predict.runner import Work, run


class Images:
    """Images by name, each a number, run in batches; a result is a file with twice the number."""

    def __init__(self, folder, numbers, batch_size=1, without_state=()):
        self.folder, self.numbers, self.batch_size = folder, numbers, batch_size
        self.without_state = without_state
        self.was_run = []
        folder.mkdir(exist_ok=True)

    def work(self):
        names = list(self.numbers)
        for first in range(0, len(names), self.batch_size):
            batch = names[first : first + self.batch_size]
            states = [None if name in self.without_state else {"number": self.numbers[name]} for name in batch]
            yield Work(batch, states, [(name, self.numbers[name]) for name in batch])

    def double(self, images):
        records = []
        for name, number in images:
            self.was_run.append(name)
            (self.folder / name).write_text(str(2 * number))
            records.append({"file": name, "doubled": 2 * number})
        return records

    def exists(self, record):
        return (self.folder / record["file"]).exists()


@pytest.fixture
def run_all(tmp_path):
    """Run images with the journal of a folder; returns the names that were run, those that were kept, and records."""

    def run_all(numbers, function=None, **options):
        images = Images(tmp_path / "results", numbers, **options)
        journal = Journal(tmp_path / "journal", {"checkpoint": "a"}, 0)
        journal.prepare()
        known = {entry.key: entry for entry in journal.read()}
        try:
            found = list(run(images.work(), function or images.double, journal, known, images.exists))
        finally:
            journal.close()
        assert images.was_run == [entry.key for entry, is_new in found if is_new] or function
        kept = [entry.key for entry, is_new in found if not is_new]
        return images.was_run, kept, {entry.key: entry.record["doubled"] for entry, _ in found}

    return run_all


NUMBERS = {"a": 1, "b": 2, "c": 3, "d": 4}


def test_entries_of_the_same_state_are_kept(run_all):
    expected = {"a": 2, "b": 4, "c": 6, "d": 8}
    assert run_all(NUMBERS) == (["a", "b", "c", "d"], [], expected)
    assert run_all(NUMBERS) == ([], ["a", "b", "c", "d"], expected)
    assert run_all({"d": 4, "b": 2}) == ([], ["d", "b"], {"d": 8, "b": 4}), "in the order of the work"


def test_changed_images_and_those_without_files_are_run_again(run_all, tmp_path):
    run_all(NUMBERS)
    (tmp_path / "results" / "c").unlink()
    changed = NUMBERS | {"b": 7}
    assert run_all(changed) == (["b", "c"], ["a", "d"], {"a": 2, "b": 14, "c": 6, "d": 8})
    assert run_all(changed)[0] == [], "the last entry of an image counts"
    assert (tmp_path / "results" / "c").read_text() == "6"


def test_new_images_are_added(run_all):
    run_all({"a": 1})
    assert run_all(NUMBERS)[:2] == (["b", "c", "d"], ["a"])


def test_an_image_without_a_state_is_never_entered(run_all, tmp_path):
    for expected in (["a", "b", "c", "d"], ["b", "d"]):
        assert run_all(NUMBERS, without_state=("b", "d"))[0] == expected
    assert [entry.key for entry in Journal(tmp_path / "journal", {}, 0).read()] == ["a", "c"]


def test_a_state_that_becomes_none_is_run_again(run_all):
    run_all(NUMBERS)
    assert run_all(NUMBERS, without_state=("a",))[:2] == (["a"], ["b", "c", "d"])


def test_a_batch_is_kept_only_if_all_its_images_are(run_all, tmp_path):
    run_all(NUMBERS, batch_size=2)
    (tmp_path / "results" / "d").unlink()
    assert run_all(NUMBERS, batch_size=2)[:2] == (["c", "d"], ["a", "b"])
    assert run_all(NUMBERS | {"a": 9}, batch_size=3)[:2] == (["a", "b", "c"], ["d"])
    assert run_all(NUMBERS | {"a": 9}, batch_size=4)[:2] == ([], ["a", "b", "c", "d"])


def test_images_for_which_nothing_is_returned_are_left_out(run_all):
    def only_the_first(images):
        return [{"file": images[0][0], "doubled": 2 * images[0][1]}]

    assert run_all(NUMBERS, only_the_first, batch_size=3)[2] == {"a": 2, "d": 8}
    assert run_all({"b": 2})[0] == ["b"]


def test_an_interrupted_run_loses_only_the_image_at_hand(run_all, tmp_path):
    images = Images(tmp_path / "results", NUMBERS)

    def interrupted(batch):
        if batch[0][0] == "c":
            raise KeyboardInterrupt
        return images.double(batch)

    with pytest.raises(KeyboardInterrupt):
        run_all(NUMBERS, interrupted)
    assert run_all(NUMBERS)[:2] == (["c", "d"], ["a", "b"])


def test_without_a_journal_everything_is_run_and_nothing_is_written(tmp_path):
    images = Images(tmp_path / "results", NUMBERS)
    found = [(entry, is_new) for entry, is_new in run(images.work(), images.double)]
    assert [entry.key for entry, is_new in found if is_new] == list(NUMBERS)
    assert found[0][0] == Entry("a", {"number": 1}, {"file": "a", "doubled": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


ENTRIES = [Entry(f"image {number}", {"size": number}, {"id": number, "score": number / 3}) for number in range(9)]


@given(ranks=st.lists(st.integers(0, 3), min_size=9, max_size=9), shuffled=st.permutations(range(9)))
def test_compacted_journals_are_equal_for_any_distribution_over_processes(tmp_path_factory, ranks, shuffled):
    """Entries of six images are given, one of them without a state; three more are left from an earlier run."""
    folder = tmp_path_factory.mktemp("journal")
    journals = [Journal(folder, {"checkpoint": "a"}, rank) for rank in range(4)]
    journals[0].prepare()
    for number in shuffled:
        journals[ranks[number]].add(ENTRIES[number])
    for journal in journals:
        journal.close()
    given_entries = [*ENTRIES[:5], Entry("image 9", None, {"id": 9})]
    journals[0].compact(given_entries)
    assert sorted(path.name for path in folder.iterdir()) == [KEY_FILE, "process-00000.jsonl"]
    lines = (folder / "process-00000.jsonl").read_text().splitlines()
    assert [json.loads(line.partition(" ")[2]) for line in lines] == [list(entry) for entry in ENTRIES]
    assert Journal(folder, {"checkpoint": "a"}, 0).read() == ENTRIES


def test_compaction_replaces_entries_of_the_same_image(tmp_path):
    journals = [Journal(tmp_path / "journal", {}, rank) for rank in range(2)]
    journals[0].prepare()
    journals[0].add(ENTRIES[0])
    journals[1].add(ENTRIES[0]._replace(state={"size": 5}))
    for journal in journals:
        journal.close()
    newest = ENTRIES[0]._replace(state={"size": 7})
    journals[0].compact([newest])
    assert Journal(tmp_path / "journal", {}, 0).read() == [newest]
