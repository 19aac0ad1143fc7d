"""Hotness that outlives a server: read when it starts, written now and then and when it ends."""

import logging
import threading
from pathlib import Path

from dynaexq.errors import HotnessError
from dynaexq.runtime.runtime import Runtime

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 30.0


class HotnessKeeper:
    """Keeps what `runtime` has learned in the file `path`, from `start` until `stop`.

    What cannot be read or written is said once and costs no answer. A file that cannot be read is left as it is, as it
    may be that of another model.
    """

    def __init__(self, runtime: Runtime, path: Path, seconds_between: float = SECONDS_BETWEEN):
        self._runtime, self._path, self._seconds = runtime, path, seconds_between
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="dynaexq-hotness", daemon=True)
        self._failing = False

    def start(self) -> None:
        """Take up what the file has, if there is one, and begin to write it."""
        try:
            if self._path.exists():
                self._runtime.load_hotness(self._path)
        except (HotnessError, OSError) as error:
            logger.warning(
                "the hotness in %s is neither used nor written: %s; remove it, or name another", self._path, error
            )
        else:
            self._thread.start()

    def stop(self) -> None:
        """Write it for the last time."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            self._save()

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds):
            self._save()

    def _save(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._runtime.save_hotness(self._path)
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning("the hotness cannot be kept in %s: %s", self._path, error)
            self._failing = True
