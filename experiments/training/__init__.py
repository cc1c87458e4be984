"""Training one network: state and step, devices, checkpoints, metrics."""

from .checkpoints import Checkpoints as Checkpoints
from .devices import Devices as Devices
from .metrics import MetricsLog as MetricsLog
from .metrics import read_metrics as read_metrics
from .step import Optimization as Optimization
from .step import State as State
from .step import accuracy_and_loss as accuracy_and_loss
from .step import init_state as init_state
from .step import keep_best as keep_best
from .step import train_step as train_step
