"""When a training saves its state, beside the checkpoints that its arguments name."""

import time

from ..arguments.training import TrainArguments
from ..process import interruption
from ..ranks.group import Ranks


class Saves:
    """When checkpoints are saved, beside those that ``save_strategy`` names: by the clock, and when a run is to end.

    A checkpoint of an epoch's last step waits for what the epoch's end brings, such as an evaluation: a run that goes
    on from it begins with the next epoch.
    """

    def __init__(self, ranks: Ranks, given: TrainArguments):
        self._ranks, self._every_s = ranks, given.seconds_between_saves
        self._last = time.monotonic()
        self._stops = self._waits = False
        self.is_temporary = False

    def ask(self, control, ends_epoch: bool = False) -> None:
        """Whether to save now; every rank asks at the same places."""
        is_due = self._every_s is not None and time.monotonic() - self._last >= self._every_s
        wishes = self._ranks.gather_object((interruption.asked(), is_due))
        self._stops = self._stops or any(asked for asked, _ in wishes)
        wished = self._stops or wishes[0][1]
        self._waits = ends_epoch and (wished or control.should_save)
        if not control.should_save:
            self.is_temporary = wished
        control.should_save = (control.should_save or wished) and not ends_epoch

    def end_epoch(self, control) -> None:
        """Save what has waited for the epoch's end."""
        if self._waits:
            self.is_temporary = self.is_temporary and not control.should_save
            control.should_save = True

    def keep(self, control) -> None:
        """Save now, and do not replace it by the next one."""
        control.should_save, self.is_temporary = True, False

    def done(self) -> None:
        """A checkpoint is saved."""
        self._last, self.is_temporary = time.monotonic(), False
        if self._stops or any(self._ranks.gather_object(interruption.asked())):
            interruption.stop()
