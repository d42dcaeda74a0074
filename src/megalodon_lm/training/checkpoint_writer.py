"""Writing checkpoints while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..parallel.ranks import Ranks
from .checkpoint import Checkpoint, checkpoints, export, is_sharded, prune, withdraw
from .manifest import is_whole, step_of


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread of its own, then puts its model into the run folder.

    The model of one that many ranks have written stays there until the run ends: to put it together takes time.

    Args:
        run: folder.
        run_id: of the run.
        keep: newest whole checkpoints to keep, besides the best.
        ranks: that write together; each has a writer.
    """

    def __init__(self, run: Path, run_id: str, keep: int, ranks: Ranks | None = None):
        self.run, self.run_id, self.keep = run, run_id, keep
        self._ranks = (ranks or Ranks()).aside()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._whole: set[int] = set()  # steps of checkpoints that were written or looked at by this process

    def submit(self, checkpoint: Checkpoint, best: int | None) -> None:
        """Begin to write; waits for the one before.

        Args:
            checkpoint: its tensors must not change any more.
            best: step of the checkpoint that is kept for its validation.

        Raises:
            InputError: the one before could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, checkpoint, best)

    def _write(self, checkpoint: Checkpoint, best: int | None) -> None:
        written = checkpoint.write(self.run, self.run_id, self._ranks)
        self._ranks.agreeing(lambda: self._tidy(written, checkpoint.step, best) if self._ranks.is_first else None)

    def _tidy(self, written: Path, step: int, best: int | None) -> None:
        if is_sharded(written):
            withdraw(self.run)
        else:
            export(written, self.run)
        prune(self.run, {*self._newest(step), *([] if best is None else [best])}, step)

    def _newest(self, step: int) -> list[int]:
        """The steps of the newest whole checkpoints up to one that was just written."""
        self._whole.add(step)
        newest = [step]
        for path in checkpoints(self.run):
            before = step_of(path)
            if before < step and len(newest) < self.keep and (before in self._whole or is_whole(path, self.run_id)):
                self._whole.add(before)
                newest.append(before)
        return newest

    def failed(self) -> bool:
        """Whether something went wrong in the meantime, which wait raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until the last one is on disk; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread after what it is writing."""
        self._thread.shutdown()
