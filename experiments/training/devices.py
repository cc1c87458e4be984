"""All devices of all processes as one mesh, over which a batch is divided."""

import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..data import Batch
from ..networks.encoder import BATCH_AXIS


class Devices:
    """Places parameters and batches; data-parallel over every device there is."""

    def __init__(self):
        axis_types = (AxisType.Auto,)
        self.mesh: Mesh = jax.make_mesh(
            (jax.device_count(),), (BATCH_AXIS,), axis_types=axis_types
        )
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.divided = NamedSharding(self.mesh, PartitionSpec(BATCH_AXIS))

    @property
    def model_mesh(self) -> Mesh | None:
        """What to hand to the encoder; None for a single device."""
        return self.mesh if self.mesh.size > 1 else None

    def check(self, **batch_sizes: int) -> None:
        """Raises a ValueError where a batch cannot be divided over the devices."""
        for name, size in batch_sizes.items():
            if size < 1 or size % self.mesh.size:
                raise ValueError(
                    f"{name} must be a positive multiple of the {self.mesh.size} "
                    f"devices, got {size}: each takes an equal part."
                )

    def wait_for_all(self, name: str) -> None:
        """Returns when every process has come here; at once if there is one alone."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    def place_part(self, batch: Batch) -> Batch:
        """The global batch of which each process has read its own part."""
        put = functools.partial(jax.make_array_from_process_local_data, self.divided)
        return jax.tree.map(put, batch)

    def place_whole(self, batch: Batch) -> Batch:
        """The global batch that each process has read whole."""

        def put(x):
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.divided, x.__getitem__)

        return jax.tree.map(put, batch)
