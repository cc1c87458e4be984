"""Data sets, split and ready for the encoder, and batches of them.

    data = load("fashion_mnist", seed=0)
    batches = train_batches(data.train, batch_size=128, seed=0, augment=Augment())
    for batch in eval_batches(data.validation, batch_size=256): ...

`python -m experiments.data <task>` prepares a data set ahead of time.
"""

from .examples import Data as Data
from .examples import Examples as Examples
from .images import Augment as Augment
from .pipeline import Batch as Batch
from .pipeline import eval_batches as eval_batches
from .pipeline import train_batches as train_batches
from .reviews import imdb as imdb
from .tasks import TASKS as TASKS
from .tasks import check_name as check_name
from .tasks import load as load
from .tasks import prepare as prepare
