"""Checkpoints by Orbax that outlast a killed process, damage and a full disk."""

import pathlib
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree


class Checkpoints:
    """The newest checkpoints of one run, each complete or absent.

    Orbax writes into a temporary folder and renames it, so a process that is killed
    leaves no partial checkpoint under the final name.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens the folder, and makes it if needed.

        Raises:
            OSError: The folder cannot be made or written.
        """
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False
            ),
            item_names=("arrays", "host"),
        )

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, arrays: PyTree[Array], host: dict[str, Any]) -> None:
        """Writes a checkpoint and drops all but the newest two.

        `arrays` are on the devices, `host` is the rest of the state, as JSON holds it.

        Raises:
            OSError: It could not be written; the earlier checkpoints are untouched.
        """
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host)
        )
        try:
            self._manager.save(step, args=items, force=True)
        # Orbax raises whatever its writers do: OSError, ValueError from TensorStore.
        except Exception as error:
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.folder}: "
                f"{_first_line(error)}. Those of steps {self.steps} are kept. Make "
                "room or make the folder writable, then continue with --resume."
            ) from error

    def restore(
        self, like: PyTree[Array]
    ) -> tuple[PyTree[Array], dict[str, Any]] | None:
        """`arrays` and `host` of the newest readable checkpoint; None if there is none.

        The arrays get the shapes and the sharding of those in `like`.

        Raises:
            OSError: There are checkpoints, and none can be read.
        """
        steps = self.steps
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
        )
        for i, step in enumerate(steps):
            try:
                restored = self._manager.restore(step, args=items)
            # Each kind of damage raises an exception of its own.
            except Exception as error:
                warnings.warn(
                    f"The checkpoint of step {step} in {self.folder} cannot be read: "
                    f"{_first_line(error)}. Trying the one before.",
                    stacklevel=2,
                )
                continue
            for damaged in steps[:i]:
                self._manager.delete(damaged)
            return restored.arrays, restored.host
        if steps:
            raise OSError(
                f"None of the checkpoints of steps {steps} in {self.folder} can be "
                "read. Start again without --resume in another folder."
            )
        return None

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
