"""All devices of all processes as one mesh, over which a batch is divided."""

import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..data import Batch
from ..networks.step import BATCH_AXIS


class Devices:
    """Places parameters and batches for data-parallel training on every device."""

    def __init__(self):
        self._mesh = jax.make_mesh(
            (jax.device_count(),), (BATCH_AXIS,), axis_types=(AxisType.Auto,)
        )
        self.replicated = NamedSharding(self._mesh, PartitionSpec())
        self.divided = NamedSharding(self._mesh, PartitionSpec(BATCH_AXIS))

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the devices; None for a single device."""
        return self._mesh if self._mesh.size > 1 else None

    def check(self, **batch_sizes: int) -> None:
        """Refuses batches that the devices cannot divide evenly.

        Raises:
            ValueError: A size is no positive multiple of the number of devices.
        """
        for name, size in batch_sizes.items():
            if size < 1 or size % self._mesh.size:
                raise ValueError(
                    f"{name} must be a positive multiple of the {self._mesh.size} "
                    f"devices, got {size}: each takes an equal part."
                )

    def wait_for_all(self, name: str) -> None:
        """Returns when every process has called this with the same name."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    def place_part(self, batch: Batch) -> Batch:
        """The global batch, of which each process has read its own part."""
        put = functools.partial(jax.make_array_from_process_local_data, self.divided)
        return jax.tree.map(put, batch)

    def place_whole(self, batch: Batch) -> Batch:
        """The global batch, which each process has read in full."""
        make, divided = jax.make_array_from_callback, self.divided
        put = lambda x: make(x.shape, divided, np.asarray(x).__getitem__)
        return jax.tree.map(put, batch)
