"""Where a quantised checkpoint may be written, and what is left when writing fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint, resolve_checkpoint
from gptjet.service.quantization.run import QuantizeOptions, quantize
from gptjet.service.quantization.writer import check_output, new_folder


@pytest.fixture
def source(make_gptj_checkpoint: Callable[..., Path]) -> Checkpoint:
    return resolve_checkpoint(str(make_gptj_checkpoint()))


def ours(folder: Path, note: str = "old") -> Path:
    """A folder that looks like an earlier run's."""
    folder.mkdir()
    config = {"quantization_config": {"quant_method": "gptjet"}, "note": note}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def allow() -> None:
    """Nothing has come to lie at the output meanwhile."""


def refusal(source: Checkpoint, output: Path, *, force: bool) -> str:
    with pytest.raises(BackendLoadError) as error:
        check_output(source, output, force=force)
    return str(error.value)


@pytest.mark.parametrize("force", [False, True])
def test_the_source_a_file_and_foreign_folders_are_never_replaced(
    force: bool, source: Checkpoint, tmp_path: Path
) -> None:
    assert "is the checkpoint itself" in refusal(source, source.path, force=force)
    (tmp_path / "file").write_text("x")
    assert "exists and is no folder" in refusal(source, tmp_path / "file", force=force)
    assert "was not written by `gptjet quantize`" in refusal(source, tmp_path, force=force)
    (tmp_path / "config.json").write_text("[]")
    assert "was not written by `gptjet quantize`" in refusal(source, tmp_path, force=force)


def test_a_folder_that_holds_the_source_is_never_replaced(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    outer = ours(tmp_path / "out")
    shutil.copytree(make_gptj_checkpoint(), outer / "source")
    inner = resolve_checkpoint(str(outer / "source"))
    assert "out holds the checkpoint" in refusal(inner, outer, force=True)
    (tmp_path / "link").symlink_to(outer)
    assert "link holds the checkpoint" in refusal(inner, tmp_path / "link", force=True)


def test_an_earlier_run_is_replaced_with_force_only(source: Checkpoint, tmp_path: Path) -> None:
    folder = ours(tmp_path / "out")
    assert "give --force" in refusal(source, folder, force=False)
    check_output(source, folder, force=True)


def test_new_and_empty_folders_are_fine(source: Checkpoint, tmp_path: Path) -> None:
    check_output(source, tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    check_output(source, tmp_path / "empty", force=False)


def test_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    with new_folder(output, check=allow) as folder:
        (folder / "config.json").write_text("new")
        assert "old" in (output / "config.json").read_text()
    assert (output / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")])
def test_failure_leaves_the_old_folder_and_nothing_else(
    error: BaseException, tmp_path: Path
) -> None:
    output = ours(tmp_path / "out")

    def fail() -> None:
        with new_folder(output, check=allow) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "old" in (output / "config.json").read_text()


def interrupt_renames(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Ctrl-C instead of the renames of these numbers, the first being 1."""
    rename, count = Path.rename, iter(range(1, 100))

    def rename_or_not(path: Path, target: Path) -> Path:
        if next(count) in numbers:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_not)


@pytest.mark.parametrize("number", [1, 2])
def test_interrupt_amid_the_swap_leaves_the_old_folder(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ours(tmp_path / "out")
    interrupt_renames(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt), new_folder(output, check=allow) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "old" in (output / "config.json").read_text()


def test_old_folder_is_kept_where_its_restoring_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ours(tmp_path / "out")
    interrupt_renames(monkeypatch, 2, 3)
    with pytest.raises(KeyboardInterrupt), new_folder(output, check=allow):
        pass
    (kept,) = tmp_path.glob(".out.*/old/config.json")
    assert "old" in kept.read_text()


def test_old_folder_that_cannot_be_restored_is_said_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ours(tmp_path / "out")
    rename = Path.rename

    def rename_or_not(path: Path, target: Path) -> Path:
        if target == output:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_not)
    with (
        pytest.raises(BackendLoadError, match=r"Input/output error; what it held is in .*/old$"),
        new_folder(output, check=allow),
    ):
        pass
    (kept,) = tmp_path.glob(".out.*/old/config.json")
    assert "old" in kept.read_text()


def test_what_appears_at_the_output_meanwhile_is_not_deleted(
    source: Checkpoint, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def check() -> None:
        check_output(source, output, force=False)

    with pytest.raises(BackendLoadError, match="give --force"), new_folder(output, check=check):
        ours(output, "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "theirs" in (output / "config.json").read_text()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendLoadError, match=r"out cannot be written: No space left"),
        new_folder(tmp_path / "out", check=allow),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_read_is_named_and_not_the_output(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path == source.path / "tokenizer.json":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    options = QuantizeOptions(
        model=str(source.path), output=tmp_path / "out", bits=8, method="rtn", evaluate=False
    )
    with pytest.raises(BackendLoadError, match=r"tokenizer\.json cannot be read: Input/output"):
        quantize(options, lambda name, size: lambda part: None)
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(BackendLoadError, match="cannot be written"),
        new_folder(tmp_path / "file" / "out", check=allow),
    ):
        pass


def test_new_folder_may_be_read_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "out", check=allow):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
