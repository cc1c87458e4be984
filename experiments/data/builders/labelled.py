"""The base of the builders: one input and one class of each example."""

from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds


class Labelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of inputs with a class each.

    Files are downloaded only with `download`, because without a network TFDS keeps
    trying for minutes.
    """

    VERSION = tfds.core.Version("1.0.0")

    about: ClassVar[str]
    homepage: ClassVar[str]
    key: ClassVar[str]  # The name of the input, "image" or "text".
    feature: ClassVar[tfds.features.FeatureConnector]  # What the input is.
    classes: ClassVar[tuple[str, ...]]

    def __init__(self, *, download: bool = False, **kwargs):
        """Takes the arguments of TFDS, and whether files may be downloaded."""
        super().__init__(**kwargs)
        self._download = download

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=list(self.classes))
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.about,
            features=tfds.features.FeaturesDict(
                {self.key: self.feature, "label": label}
            ),
            supervised_keys=(self.key, "label"),
            homepage=self.homepage,
        )

    def _generate_examples(
        self, inputs, labels
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (each, label) in enumerate(zip(inputs, labels, strict=True)):
            yield key, {self.key: each, "label": int(label)}
