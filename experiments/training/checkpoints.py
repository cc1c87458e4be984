"""Checkpoints by Orbax that outlast a killed process, damage and a full disk."""

import pathlib
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

from .step import State


class Checkpoints:
    """The newest checkpoints of one run, each complete or not there at all.

    Orbax writes into a temporary folder and renames it, so a process that dies leaves
    no half of one under the final name.
    """

    def __init__(self, folder: pathlib.Path, *, max_to_keep: int = 2):
        """Opens or makes the folder.

        Raises:
            OSError: It cannot be made or written.
        """
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep, enable_async_checkpointing=False
            ),
            item_names=("state", "host"),
        )

    @property
    def steps(self) -> list[int]:
        """Of the finished checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: State, host: dict[str, Any]) -> None:
        """Writes a checkpoint and drops the oldest one beyond `max_to_keep`.

        Args:
            step: Its name.
            state: Of the network.
            host: The rest, as JSON can hold it.

        Raises:
            OSError: It could not be written; the earlier ones are untouched.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
        )
        try:
            self._manager.save(step, args=items, force=True)
        # Orbax's writers raise what they like: OSError, or ValueError of TensorStore.
        except Exception as error:
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.folder}: "
                f"{_first_line(error)}. Those of steps {self.steps} are kept. Make "
                "room or make the folder writable, then continue with --resume."
            ) from error

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that can be read; None if there is none.

        Args:
            like: A state of the same shapes and sharding.

        Raises:
            OSError: There are checkpoints, but none can be read.
        """
        steps = self.steps
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
        )
        for i, step in enumerate(steps):
            try:
                restored = self._manager.restore(step, args=items)
            # As many kinds of damage, as many exceptions.
            except Exception as error:
                warnings.warn(
                    f"The checkpoint of step {step} in {self.folder} cannot be read: "
                    f"{_first_line(error)}. Trying the one before.",
                    stacklevel=2,
                )
                continue
            for damaged in steps[:i]:
                self._manager.delete(damaged)
            return restored.state, restored.host
        if steps:
            raise OSError(
                f"None of the checkpoints of steps {steps} in {self.folder} can be "
                "read. Start again without --resume in another folder."
            )
        return None

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
