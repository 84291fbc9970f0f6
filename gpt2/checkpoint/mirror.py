"""A run's second copy on any storage that fsspec knows: what a machine with an empty disk resumes from.

    URL/checkpoints/step_00001000/...    as in the run's directory; training.json, which makes it complete, comes last
    URL/metrics.jsonl, config.json, environment.json    as they were at the newest checkpoint

A thread brings the copy in line with the disk whenever a checkpoint is finished, the newest first, and tries again
later where that fails: training neither waits nor stops for it. A process that is killed leaves nothing to repair, as
the next one compares again. Where the run goes back behind a checkpoint that is already there, that one's training.json
becomes superseded.json.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2.checkpoint.directory import TEMPORARY, TRAINING, list_checkpoints, read_training, verify_checkpoint
from gpt2.errors import LaterVersion, UserError, first_line
from gpt2.files import parse_json, sync_directory, write_whole

METRICS = "metrics.jsonl"
SETTINGS = ("config.json", "environment.json")
SUPERSEDED = "superseded.json"
FIRST_DELAY, LONGEST_DELAY = 2.0, 300.0
"""Seconds before a copy that failed is tried again; the delay doubles each time."""
LAST_ATTEMPTS = 4
"""How often a run that ends tries to bring the copy in line, before it leaves the rest to its next start."""
_PIN = ".mirroring"


class Mirror:
    """The copy of one run; rank 0 alone has it.

    Args:
        url: where it is: s3://BUCKET/RUN, gs://..., file:///..., or a path.
        run: the run's directory.
        retained: which names stay, of all checkpoints' training.json by name; as on disk.
        say: tells the user a line; called by the thread.

    Raises:
        UserError: fsspec does not know the URL, or lacks the package for it.
    """

    def __init__(
        self, url: str, run: Path, retained: Callable[[Mapping[str, Any]], set[str]], say: Callable[[str], None]
    ):
        from fsspec.core import url_to_fs

        try:
            self._fs, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"--mirror {url} cannot be used: {first_line(error)}") from None
        self.url, self.run, self.retained, self.say = url, run, retained, say
        self.root = root.rstrip("/")
        self._checkpoints = f"{self.root}/checkpoints"
        self._markers: dict[str, bytes] = {}  # training.json of what is complete there, by name
        self._begun: tuple[bytes, set[str]] = (b"", set())  # a checkpoint's, and what is there of its files
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def restore(self, anew: bool = False) -> None:
        """Bring the newest good checkpoint, metrics and settings to the run's directory, if it has none as new.

        Args:
            anew: the run is to begin at step 0.

        Raises:
            UserError: the storage cannot be read and the disk is empty; it holds another run, no good checkpoint, or
                any at all where the run is to begin anew.
        """
        here = list_checkpoints(self.run / "checkpoints")
        try:
            self._read_markers()
            metrics = self._read(METRICS)
        except Exception as error:  # of any storage
            if here:
                self.say(
                    f"warning: the mirror {self.url} cannot be read ({first_line(error)}); resuming from {here[-1]}"
                )
                return
            raise UserError(
                f"the mirror {self.url} cannot be read ({first_line(error)}), and {self.run} holds no checkpoint; put "
                "that right, or leave --mirror out to start anew"
            ) from None
        if anew and self._markers:
            raise UserError(f"the mirror {self.url} holds a run, which --resume never would replace; choose another")
        own = (self.run / METRICS).read_bytes() if (self.run / METRICS).exists() else b""
        if own and metrics and own.partition(b"\n")[0] != metrics.partition(b"\n")[0]:
            raise UserError(f"the mirror {self.url} holds another run than {self.run}; choose another --mirror")
        newer = [name for name in sorted(self._markers, reverse=True) if not here or name > here[-1].name]
        for name in newer:
            try:
                self._fetch(name, metrics, own)
            except LaterVersion:
                raise
            except UserError as error:
                self.say(f"warning: passing over a damaged checkpoint of the mirror: {error}")
                continue
            except Exception as error:
                raise UserError(
                    f"{name} could not be copied from {self.url} ({first_line(error)}); try again"
                ) from None
            self.say(f"{'mirror':<11}{name} copied from {self.url}")
            return
        if newer and not here:
            raise UserError(f"every checkpoint in {self.url} is damaged; choose another --mirror to start anew")

    def start(self, step: int) -> None:
        """Begin to copy; what the storage holds of later steps than the run resumes from is set aside there."""
        self._thread = threading.Thread(target=self._work, args=(step,), name="mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is a new checkpoint."""
        self._wake.set()

    def finish(self) -> None:
        """Wait until the copy is complete, or several attempts have failed."""
        if self._thread is None:
            return
        self._ending.set()
        self._wake.set()
        self._thread.join()

    def _work(self, step: int) -> None:
        delay, last_attempts, known = FIRST_DELAY, 0, False
        while True:
            self._wake.clear()
            last_attempts += self._ending.is_set()
            try:
                if not known:
                    self._set_aside(step)
                    known = True
                self._copy()
            except Exception as error:  # of any storage: it is told, and tried again
                if delay == FIRST_DELAY:
                    self.say(
                        f"warning: the mirror {self.url} could not be brought up to date ({first_line(error)}); "
                        "training continues, and the copy is tried again"
                    )
                if last_attempts == LAST_ATTEMPTS:
                    self.say(f"warning: the mirror {self.url} is behind {self.run}; the next start makes up for it")
                    return
                if last_attempts:
                    time.sleep(FIRST_DELAY)
                else:
                    self._ending.wait(delay)
                delay = min(2 * delay, LONGEST_DELAY)
                continue
            if delay > FIRST_DELAY:
                self.say(f"the mirror {self.url} is up to date again")
            delay = FIRST_DELAY
            if last_attempts:
                return
            self._wake.wait()

    def _copy(self) -> None:
        """Bring the copy in line with the disk, the newest first."""
        for path in reversed(list_checkpoints(self.run / "checkpoints")):
            with self._pinned(path) as pinned:
                if _is_whole(pinned):  # and neither damaged nor just removed
                    marker = (pinned / TRAINING).read_bytes()
                    if self._markers.get(path.name) != marker:
                        self._send(path.name, pinned, marker)
        trainings = {name: parse_json(marker, name) for name, marker in self._markers.items()}
        for name in trainings.keys() - self.retained(trainings):
            self._remove(f"{name}/{TRAINING}")  # first: what is left is not complete
            self._remove(name)
            del self._markers[name]

    @contextlib.contextmanager
    def _pinned(self, path: Path) -> Iterator[Path]:
        """A checkpoint under another name, which stays while it is copied, whatever retention does to the first."""
        pin, pinned = path.with_name(_PIN), path
        shutil.rmtree(pin, ignore_errors=True)
        with contextlib.suppress(OSError):  # a file system without hard links, or a checkpoint that was just removed
            pin.mkdir()
            for file in path.iterdir():
                os.link(file, pin / file.name)
            pinned = pin
        try:
            yield pinned
        finally:
            shutil.rmtree(pin, ignore_errors=True)

    def _send(self, name: str, source: Path, marker: bytes) -> None:
        target = f"{self._checkpoints}/{name}"
        self._markers.pop(name, None)
        if self._begun[0] != marker:
            self._remove(f"{name}/{TRAINING}")
            self._begun = (marker, set())
        self._fs.makedirs(target, exist_ok=True)
        for file in parse_json(marker, name)["files"].keys() - self._begun[1]:
            self._fs.put_file(str(source / file), f"{target}/{file}")
            sent, size = self._fs.info(f"{target}/{file}")["size"], (source / file).stat().st_size
            if sent != size:
                raise OSError(f"{target}/{file} has {sent:,} bytes there, {size:,} here")
            self._begun[1].add(file)
        for file in (METRICS, *SETTINGS):
            if (self.run / file).exists():
                self._fs.pipe_file(f"{self.root}/{file}", (self.run / file).read_bytes())
        self._fs.pipe_file(f"{target}/{TRAINING}", marker)
        self._markers[name] = marker

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # an earlier attempt did it, or somebody else
            self._fs.rm(f"{self._checkpoints}/{name}", recursive=True)

    def _read(self, name: str) -> bytes:
        """A file of the copy; empty where it is not there."""
        try:
            content: bytes = self._fs.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return b""
        return content

    def _read_markers(self) -> None:
        self._fs.invalidate_cache()
        self._markers = {}
        try:
            found = self._fs.ls(self._checkpoints, detail=False)
        except FileNotFoundError:
            return
        for name in (path.rstrip("/").rpartition("/")[2] for path in found):
            if name.startswith("step_") and (marker := self._read(f"checkpoints/{name}/{TRAINING}")):
                with contextlib.suppress(UserError, ValueError, KeyError, TypeError):  # half written
                    if parse_json(marker, name)["step"] == int(name[len("step_") :]):
                        self._markers[name] = marker

    def _set_aside(self, step: int) -> None:
        self._read_markers()
        for name in [name for name in self._markers if int(name[len("step_") :]) > step]:
            place = f"{self._checkpoints}/{name}"
            self._fs.pipe_file(f"{place}/{SUPERSEDED}", self._markers.pop(name))
            self._remove(f"{name}/{TRAINING}")

    def _fetch(self, name: str, metrics: bytes, own: bytes) -> None:
        """Copy a checkpoint to the disk; it appears there, last of all, when it has been found undamaged."""
        final = self.run / "checkpoints" / name
        temporary = final.with_name(f"{TEMPORARY}{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write_whole(temporary / TRAINING, self._markers[name])
            for file in read_training(temporary)["files"]:  # plain names, or it is refused
                with contextlib.suppress(FileNotFoundError):  # `verify_checkpoint` tells
                    self._fs.get_file(f"{self._checkpoints}/{name}/{file}", str(temporary / file))
            verify_checkpoint(temporary)
            if own and not metrics.startswith(own):
                os.replace(self.run / METRICS, self.run / f"superseded_{time.strftime('%Y%m%d_%H%M%S')}_{METRICS}")
            write_whole(self.run / METRICS, metrics)
            for file in SETTINGS:
                if content := self._read(file):
                    write_whole(self.run / file, content)
            os.replace(temporary, final)
            sync_directory(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files are there in full; their checksums are compared by who fetches them."""
    try:
        files = read_training(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, UserError):
        return False


class NoMirror:
    """What a run without a second copy has in place of a `Mirror`."""

    def wake(self) -> None:
        """Nobody sleeps."""

    def finish(self) -> None:
        """Nothing is to be waited for."""
