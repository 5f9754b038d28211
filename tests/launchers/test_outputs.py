"""Folders and files that commands write: proved writable before the work begins, and one line where the disk fails in it."""

import subprocess
import sys
import textwrap

import pytest

from common import cli
from common.errors import UserError
from common.files import refuse_unwritable, said_in_one_line


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for words, message in (
        (("/proc/x/y",), "out=/proc/x/y cannot be written (No such file or directory)"),
        ((f"{file}/x",), f"{file} is a file; it must be a folder"),
        ((f"{tmp_path}/{'n' * 300}",), "cannot be written (File name too long)"),
        ((f"{tmp_path}/a\0b",), "cannot be written (embedded null byte)"),
        ((str(tmp_path), True), "is a folder; it must name a file"),
        (("/proc/version", True), "out=/proc/version cannot be written ("),
    ):
        with pytest.raises(UserError) as refused:
            refuse_unwritable("out", *words)
        assert message in str(refused.value)
    refuse_unwritable("out", str(tmp_path / "a/b"))
    refuse_unwritable("out", str(file), is_file=True)
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "mine"


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace (unshare -rm)",
)
def test_read_only_and_full_disks_are_one_line_before_the_work_and_in_it(tmp_path):
    """Real file systems: what is refused, and a checkpoint's file that meets the end of the disk."""
    program = """
        import torch
        from safetensors.torch import save_file
        from common.errors import UserError
        from common.files import refuse_unwritable, said_in_one_line

        def said(work):
            try:
                work()
            except UserError as error:
                print(error)

        def export():
            with said_in_one_line("export"):
                save_file({"a": torch.zeros(10**6)}, "full/a.safetensors")

        for folder in ("ro/x", "full/x", "roomy/x"):
            said(lambda: refuse_unwritable("out", folder))
        said(export)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    script = f"""
        mkdir ro full roomy
        mount -t tmpfs -o ro tmpfs ro; mount -t tmpfs -o size=32k tmpfs full; mount -t tmpfs -o size=1m tmpfs roomy
        {sys.executable} program.py; ls roomy
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(cli.ROOT)}, capture_output=True, text=True
    )
    advice = "; choose another, or mend that and run it again"
    assert done.stdout.splitlines() == [
        f"out=ro/x cannot be written (Read-only file system){advice}",
        "out=full/x cannot be written (No space left on device); Make room, then run the same command again",
        "export: No space left on device",
    ], done.stdout + done.stderr


def test_an_error_that_is_no_disk_s_keeps_its_traceback(tmp_path):
    with pytest.raises(UserError, match="^out: No space left on device$"):
        with said_in_one_line("out"), open("/dev/full", "w") as full:
            full.write("x")
    with pytest.raises(FileNotFoundError):
        with said_in_one_line("out"):
            (tmp_path / "absent").read_text()
    with pytest.raises(ConnectionRefusedError):
        with said_in_one_line("out"):
            raise ConnectionRefusedError(111, "Connection refused")


def test_the_revision_is_that_of_the_code_s_own_repository(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path / "code", check=True, capture_output=True, text=True).stdout

    (tmp_path / "code/common").mkdir(parents=True)
    (tmp_path / "code/common/cli.py").write_text("")
    monkeypatch.setattr(cli, "ROOT", tmp_path / "code")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert cli.git_revision() is None
    git("init", "-q", "..")
    git("commit", "-q", "--allow-empty", "-m", "of the folder around it")
    assert cli.git_revision() is None  # not tracked
    git("add", "-f", ".")
    git("commit", "-q", "-m", "copied into it")
    assert cli.git_revision() is None
    git("init", "-q", ".")
    git("commit", "-q", "--allow-empty", "-m", "a repository around which it lies untracked")
    assert cli.git_revision() is None
    git("add", ".")
    git("commit", "-q", "-m", "its own")
    assert cli.git_revision() == git("rev-parse", "HEAD").strip()
